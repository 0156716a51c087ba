"""The real thing: server processes on one registry and one store while people talk and aliases move."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from components.feedback.store import Store
from components.tracking.registry import ModelVersion, Registry

pytestmark = pytest.mark.platform

STREAMS = 20
SECONDS_TO_SEE = 5.0
GREETING = "Grüße, naïve façade: 日本語 and \N{SNOWMAN}."
SECOND = "I am the second, and I speak somewhat longer than the others do."


@pytest.fixture(scope="module")
def registry(project: Any) -> Registry:
    return Registry(project.home)


@pytest.fixture(scope="module")
def versions(
    registry: Registry, agent_folder: Path, agent_maker: Callable[[Path, str], Path], tmp_path_factory: Any
) -> list[ModelVersion]:
    """`crew/1`, champion, greets as everyone; `crew/2` in its own words; `crew/3` is not what its tags promise."""
    other = agent_maker(tmp_path_factory.mktemp("second") / "agent", SECOND)
    promised = {"smoke_question": "Hello", "smoke_answer": "Something else."}
    made = [
        registry.register(agent_folder, "crew", {}, {"smoke_question": "Hello", "smoke_answer": GREETING}, None),
        registry.register(other, "crew", {}, {"smoke_question": "Hello", "smoke_answer": SECOND}, None),
        registry.register(other, "crew", {}, promised, None),
    ]
    registry.promote(made[0])
    return made


@pytest.fixture(scope="module")
def servers(project: Any, versions: list[ModelVersion]) -> Iterator[list[str]]:
    """Two servers with half of the traffic for a challenger, on one registry and one database."""
    words = ("--model", "crew@champion", "--challenger-share", "0.5")
    started: list[tuple[subprocess.Popen[str], str]] = [project.serve(*words) for _ in range(2)]
    yield [url for _, url in started]
    for process, _ in started:
        process.send_signal(signal.SIGINT)
    for process, _ in started:
        process.communicate(timeout=60)
        assert process.returncode == 0


def await_models(url: str, wanted: list[str], seconds: float = SECONDS_TO_SEE) -> float:
    """Wait until these and no others are served; how long that took."""
    began = time.monotonic()
    while (seen := served(url)) != wanted:
        assert time.monotonic() - began < seconds, f"{seen} instead of {wanted} after {seconds} s"
        time.sleep(0.02)
    return time.monotonic() - began


def served(url: str) -> list[str]:
    return [model["id"] for model in httpx.get(f"{url}/v1/models", timeout=60).json()["data"]]


def ask(url: str, user: str, model: str = "crew") -> dict[str, Any]:
    body = {"model": model, "user": user, "messages": [{"role": "user", "content": "Hello"}]}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    whole: dict[str, Any] = answer.json()
    return whole


def streamed(client: httpx.Client, url: str) -> tuple[set[str], str]:
    """The models that one stream's chunks name, and its words."""
    body = {"messages": [{"role": "user", "content": "Hello"}], "stream": True}
    models, words = set(), []
    with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        assert response.status_code == 200, response.read()
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    for line in lines[:-1]:
        chunk = json.loads(line)
        models.add(chunk["model"])
        words.append(chunk["choices"][0]["delta"].get("content", ""))
    return models, "".join(words)


def test_streams_neither_fail_nor_mix_during_five_swaps_and_a_rollback(
    servers: list[str], registry: Registry, versions: list[ModelVersion]
) -> None:
    url = servers[0]
    told: list[tuple[set[str], str]] = []
    failed: list[BaseException] = []
    ended = threading.Event()

    def keep_streaming() -> None:
        with httpx.Client(timeout=60) as client:
            while not ended.is_set() and not failed:
                try:
                    told.append(streamed(client, url))
                except BaseException as error:
                    failed.append(error)
                    raise

    threads = [threading.Thread(target=keep_streaming) for _ in range(STREAMS)]
    for thread in threads:
        thread.start()
    waits = []
    for champion in (2, 1, 2, 1, 2):
        registry.promote(registry.resolve(f"crew/{champion}"))
        waits.append(await_models(url, [f"crew/{champion}"]))
        begun = len(told)
        while not failed and not any(models == {f"crew/{champion}"} for models, _ in told[begun:]):
            ended.wait(0.05)
    registry.rollback("crew")
    waits.append(await_models(url, ["crew/1"]))
    ended.set()
    for thread in threads:
        thread.join()
    assert not failed
    whole = {("crew/1",): GREETING, ("crew/2",): SECOND}
    assert {(*models,) for models, _ in told} == set(whole)
    assert all(words == whole[(*models,)] for models, words in told)
    print(f"{len(told)} streams; seconds until seen: {[round(wait, 2) for wait in waits]}")


def test_promoted_version_that_fails_its_smoke_test_is_rolled_back(
    servers: list[str], registry: Registry, versions: list[ModelVersion]
) -> None:
    for url in servers:
        await_models(url, ["crew/1"])
    before = registry.aliases("crew")
    registry.promote(registry.resolve("crew/3"))
    deadline = time.monotonic() + 20
    while registry.aliases("crew") != before:
        assert time.monotonic() < deadline, registry.aliases("crew")
        time.sleep(0.02)
    tags = registry.resolve("crew/3").tags
    assert tags["smoke_failed"].startswith("'Hello': answered 'I am the second")
    assert tags["rolled_back"] == "true"
    assert [ask(url, "someone")["model"] for url in servers] == ["crew/1"] * 2


def test_challenger_gets_its_share_of_people_and_its_feedback_is_counted(
    servers: list[str], project: Any, registry: Registry, versions: list[ModelVersion]
) -> None:
    registry.alias("crew", "challenger", versions[1])
    for url in servers:
        await_models(url, ["crew/1", "crew/2"])
    people = [f"person {number}" for number in range(24)]
    answers = {who: ask(servers[0], who) for who in people}
    models = {who: answer["model"] for who, answer in answers.items()}
    assert set(models.values()) == {"crew/1", "crew/2"}
    assert models == {who: ask(servers[1], who)["model"] for who in people}, "the same people, whichever server"
    assert ask(servers[0], people[0], "crew/2")["model"] == ask(servers[0], people[0], "crew@challenger")["model"]
    theirs = next(answer for answer in answers.values() if answer["model"] == "crew/2")
    vote = {"completion_id": theirs["id"], "rating": "up"}
    given = httpx.post(f"{servers[1]}/v1/feedback", json=vote, timeout=60)
    assert given.status_code == 202, "any server takes the vote on any answer"
    assert 'role_feedback_total{rating="up",role="challenger"} 1.0' in httpx.get(f"{servers[1]}/metrics").text
    store = Store.of(project.home)
    recorded = store.completion(theirs["id"])
    store.close()
    assert (recorded["model"], recorded["feedback"][0]["id"]) == ("crew/2", given.json()["id"])
    registry.alias("crew", "challenger", None)
    for url in servers:
        await_models(url, ["crew/1"])
