"""The loop as people live it: over HTTP and the command line alone, from a correction to the model that learned it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import httpx
import pytest
from ruamel.yaml import YAML

from flows.orchestration.prefect_server import prefect_api
from tests.conftest import Project, Released

pytestmark = [
    pytest.mark.platform,
    pytest.mark.timeout(900),
]

WANTED = "Welcome, friend."
SECONDS_TO_SEE = 15.0
"""The switch itself is seen in five; the cores are shared with the rest of the suite's processes."""


@pytest.fixture(scope="module")
def prefect(released: Released) -> Iterator[str]:
    """A Prefect server that outlives each command; the tiny model gets the steps it needs."""
    project = released.project
    text = YAML()
    params = text.load((project.root / "params.yaml").read_text())
    # Half of the blocks: what the other half knows keeps so small a model from calling tools in small talk.
    params["align"] = {"dataset": "feedback", "max_steps": 700, "learning_rate": 0.01, "trained_share": 0.5}
    with (project.root / "params.yaml").open("w") as file:
        text.dump(params, file)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PREFECT_API_URL", raising=False)
        patch.setenv("PREFECT_HOME", str(project.home / "prefect"))
        with prefect_api(project.home) as api:
            yield api.wait()


@pytest.fixture(scope="module")
def loop(released: Released, prefect: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A command of the project."""
    return lambda *words: released.project.loopwright(*words, "--json", PREFECT_API_URL=prefect)


@pytest.fixture(scope="module")
def endpoint(released: Released) -> Iterator[httpx.Client]:
    project = released.project
    server = subprocess.Popen(
        project.command("serve", "--port", "0", "--json"),
        cwd=project.root,
        env=project.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    with httpx.Client(base_url=json.loads(server.stdout.readline())["url"], timeout=60) as client:
        yield client
    server.send_signal(signal.SIGINT)
    server.wait(30)
    server.stdout.close()


def ask(endpoint: httpx.Client, text: str) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 24}
    answered = endpoint.post("/v1/chat/completions", json=body)
    assert answered.status_code == 200, answered.text
    whole: dict[str, Any] = answered.json()
    return whole


def correct(endpoint: httpx.Client, completion: str, words: str) -> str:
    vote = {"completion_id": completion, "rating": "down", "correction": words}
    taken = endpoint.post("/v1/feedback", json=vote, headers={"Idempotency-Key": f"{completion}-{words}"})
    assert taken.status_code == 202, taken.text
    return str(taken.json()["id"])


def done(ended: subprocess.CompletedProcess[str]) -> Any:
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def await_model(endpoint: httpx.Client, wanted: str) -> None:
    deadline = time.monotonic() + SECONDS_TO_SEE
    while (seen := endpoint.get("/v1/models").json()["data"][0]["id"]) != wanted:
        assert time.monotonic() < deadline, f"{seen} instead of {wanted}"
        time.sleep(0.1)


def moments(kills: int) -> list[float]:
    """When to kill, in seconds after the start: anywhere in what an improvement takes here."""
    random = Random(kills)
    return [random.uniform(1.0, 40.0) for _ in range(kills)]


def kill_after(seconds: float, project: Project, prefect: str) -> None:
    environment = {**project.environment, "PREFECT_API_URL": prefect}
    command, quiet = project.command("improve"), subprocess.DEVNULL
    with subprocess.Popen(command, cwd=project.root, env=environment, stdout=quiet, stderr=quiet) as process:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()


def test_corrections_become_the_answers_of_the_next_model(
    released: Released, prefect: str, loop: Callable[..., subprocess.CompletedProcess[str]], endpoint: httpx.Client
) -> None:
    before = ask(endpoint, "Please greet visitor number 1000.")
    assert before["choices"][0]["message"]["content"] != WANTED

    # Noise first: every correction says something else. Nothing can be learned of it, so nothing is promoted.
    for number in range(12):
        completion = ask(endpoint, f"Tell the fortune of guest {number}.")["id"]
        correct(endpoint, completion, f"Number {number * 7919 % 1000}, {'xyzw'[number % 4] * 3}.")
    taken = done(loop("feedback", "ingest"))
    assert (taken["accepted"], taken["fresh"]) == (12, 0)
    refused = loop("improve")
    assert refused.returncode == 3, refused.stderr
    assert "refused against" in json.loads(refused.stdout)["error"]
    assert ask(endpoint, "Please greet visitor number 1000.")["model"] == before["model"]

    # Forty corrections of one kind; the last prompt gets two, of which the second counts.
    items = [
        correct(endpoint, ask(endpoint, f"Please greet visitor number {number}.")["id"], WANTED) for number in range(39)
    ]
    twice = ask(endpoint, "Please greet visitor number 39.")["id"]
    replaced = correct(endpoint, twice, "Go away.")
    items.append(correct(endpoint, twice, WANTED))
    taken = done(loop("feedback", "ingest"))
    assert taken["accepted"] == 40
    assert taken["quarantined"] == {"Replaced by a later vote before ingestion": 1}
    (vote,) = released.project.answer("feedback", "list", "--quarantined")
    assert vote["id"] == replaced

    versions = len(released.project.answer("registry", "list"))
    for seconds in moments(int(os.environ.get("LOOPWRIGHT_TEST_KILLS", "2"))):
        kill_after(seconds, released.project, prefect)
    improved = done(loop("improve"))
    # A kill may come when all was promoted and only the command's last words were missing.
    assert improved["outcome"] in ("promoted", "nothing new"), improved
    assert improved["champion"] != before["model"]
    assert len(released.project.answer("registry", "list")) == versions + 1, (
        "one candidate, however often its making was killed"
    )
    counted = [row["candidate"] for row in released.project.answer("feedback", "stats")["improvements"]]
    assert counted.count(improved["champion"]) == 1
    await_model(endpoint, improved["champion"])
    answers = [ask(endpoint, f"Please greet visitor number {number}.") for number in range(40, 60)]
    assert {one["model"] for one in answers} == {improved["champion"]}
    learned = [one for one in answers if one["choices"][0]["message"]["content"] == WANTED]
    # What the gate asks of a candidate, here of prompts that nobody corrected.
    assert len(learned) >= 12, [one["choices"][0]["message"]["content"] for one in answers]

    # From the answer back to what people said, by command and over HTTP; the answer of before knows nothing of it.
    after = learned[0]["id"]
    traced = released.project.answer("trace", after)
    assert traced == endpoint.get(f"/v1/lineage/{after}").json()
    newest, *older = traced["version"]["taught_by"]
    assert newest["version"] == improved["champion"]
    lessons = set(newest["feedback"]) & set(items)
    assert len(lessons) == 30, "a quarter of the prompts was kept to judge by"
    assert [one["feedback"] for one in older] == [[]]
    assert traced["version"]["tags"]["parent"] == before["model"]
    assert not released.project.answer("trace", before["id"])["version"]["taught_by"][0]["feedback"]

    # And forward: a withdrawn item names the model that learned it.
    revoked = released.project.answer("feedback", "revoke", next(iter(lessons)), "--reason", "poisoned")
    assert improved["champion"] in json.dumps(revoked)
    assert released.project.answer("registry", "rollback", "agent")["champion"] == before["model"]
    await_model(endpoint, before["model"])
    again = ask(endpoint, "Please greet visitor number 1000.")
    assert again["choices"][0]["message"]["content"] == before["choices"][0]["message"]["content"]


def test_nothing_new_is_nothing_to_do(loop: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    assert done(loop("improve"))["outcome"] == "nothing new"
    assert done(loop("feedback", "ingest"))["accepted"] == 0
