"""The real thing: `loopwright serve` on a registered model, spoken to by OpenAI's own client and by our commands."""

from __future__ import annotations

import json
import signal
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from components.feedback.store import Store
from components.tracking.registry import Registry

pytestmark = pytest.mark.platform

ROOT = Path(__file__).parents[2]
GREETING = "Grüße, naïve façade: 日本語 and \N{SNOWMAN}."
STORY = "One two three four five six seven eight nine ten. The end of it. And then some more words."
FOUL = [
    b"GET / HTTP/9.9\r\n\r\n",
    b"NOT HTTP AT ALL\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: nine\r\n\r\n{}",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
]


def end(process: subprocess.Popen[str], how: signal.Signals = signal.SIGTERM) -> int:
    process.send_signal(how)
    process.communicate(timeout=60)
    return process.returncode


@pytest.fixture(scope="session")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def asked(client: openai.OpenAI, content: str, **options: Any) -> Any:
    return client.chat.completions.create(model="agent", messages=[{"role": "user", "content": content}], **options)


def test_openai_client_gets_an_answer_with_steps(client: openai.OpenAI) -> None:
    answer = asked(client, "What is 6*7?")
    assert answer.model == "agent/1"
    assert answer.choices[0].message.content == "That is 42."
    assert [step["type"] for step in answer.choices[0].message.steps] == ["call", "result"]
    assert answer.usage.total_tokens > 0


def test_openai_client_streams_the_same_words(client: openai.OpenAI) -> None:
    with asked(client, "A story", stream=True, stream_options={"include_usage": True}) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == STORY
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens > 0


def test_openai_client_gets_its_tool_called(client: openai.OpenAI) -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    function = {"name": "get_weather", "description": "Weather of a city.", "parameters": parameters}
    answer = asked(client, "Weather in Paris?", tools=[{"type": "function", "function": function}])
    [call] = answer.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})


def test_openai_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        asked(client, "Hello", temperature=9)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        asked(client, "long " * 400)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")


def test_openai_client_lists_the_served_version(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["agent/1", "classifier/1"]


def test_openai_client_gets_embeddings(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="classifier", input=["iron", "tin", "cow"])  # as base64, its own choice
    iron, tin, cow = (one.embedding for one in answer.data)
    assert len(iron) == 32
    assert sum(a * b for a, b in zip(iron, tin, strict=True)) > sum(a * b for a, b in zip(iron, cow, strict=True))
    assert answer.usage.total_tokens == 9
    with pytest.raises(openai.BadRequestError) as refused:
        client.embeddings.create(model="classifier", input=[1, 2, 3])
    assert "token ids are not supported" in refused.value.message


def test_texts_that_come_at_once_are_read_together(url: str) -> None:
    words = ["iron", "cow", "apple"] * 16
    found: dict[int, str] = {}
    with httpx.Client(limits=httpx.Limits(max_connections=48), timeout=60) as http:

        def ask(number: int) -> None:
            answer = http.post(f"{url}/v1/classify", json={"input": words[number]})
            found[number] = answer.json()["results"][0]["label"]

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(words))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [found[number] for number in range(len(words))] == ["metal", "animal", "fruit"] * 16
    told = httpx.get(f"{url}/metrics").text.splitlines()
    batches = {
        row.split()[0]: float(row.split()[1]) for row in told if row.startswith("loopwright_classify_batch_size")
    }
    assert batches["loopwright_classify_batch_size_sum"] >= len(words)
    assert batches["loopwright_classify_batch_size_count"] < batches["loopwright_classify_batch_size_sum"]


def test_a_request_of_many_texts_is_split_and_put_together_again(url: str) -> None:
    answer = httpx.post(f"{url}/v1/classify", json={"input": ["iron", "cow", "apple"] * 60}, timeout=60).json()
    assert [one["label"] for one in answer["results"]] == ["metal", "animal", "fruit"] * 60


def test_many_clients_at_once_get_their_own_answers(client: openai.OpenAI) -> None:
    said: list[str] = []
    threads = [
        threading.Thread(target=lambda: said.append(asked(client, "A story").choices[0].message.content))
        for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == [STORY] * 16


def test_leaving_in_the_middle_frees_the_slot_and_is_on_record(url: str, project: Any) -> None:
    body = {"messages": [{"role": "user", "content": "Letters"}], "stream": True}
    ids = []
    for _ in range(6):  # more than there are slots: they would all be taken if leaving did not free them
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response:
            first = next(line for line in response.iter_lines() if line)
            ids.append(json.loads(first.removeprefix("data: "))["id"])
    answer = httpx.post(f"{url}/v1/chat/completions", json=body | {"stream": False, "max_tokens": 2}, timeout=60)
    assert answer.status_code == 200
    store = Store.of(project.home)
    reasons = {store.completion(completion_id)["answer"]["finish_reason"] for completion_id in ids}
    store.close()
    assert reasons <= {"cancelled", "length", "stop"}
    assert "cancelled" in reasons


def test_giving_up_on_a_whole_answer_cancels_it(url: str, project: Any) -> None:
    body = {"messages": [{"role": "user", "content": "Letters"}], "user": "impatient"}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/chat/completions", json=body, timeout=httpx.Timeout(60, read=0.005))
    query = "select finish_reason from requests join answers on id = request_id where body like '%impatient%'"
    with closing(sqlite3.connect(project.home / "feedback.db")) as database:
        deadline = time.monotonic() + 60
        while not (found := database.execute(query).fetchall()) and time.monotonic() < deadline:
            time.sleep(0.01)
    assert found == [("cancelled",)]


@pytest.mark.parametrize("raw", FOUL, ids=[str(raw[:20]) for raw in FOUL])
def test_foul_bytes_get_a_4xx_and_do_no_harm(url: str, raw: bytes) -> None:
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(raw)
        connection.shutdown(socket.SHUT_WR)
        status = connection.recv(64).split(b" ")
    assert status[1].startswith((b"2", b"4")) if len(status) > 1 else True
    assert httpx.get(f"{url}/livez").status_code == 200


def test_body_beyond_the_limit_is_answered_not_cut_off(url: str) -> None:
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{url}/v1/chat/completions", content=b"x" * 8_000_000, headers=headers, timeout=60)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"


def test_unmatched_paths_and_health_have_our_shape(url: str) -> None:
    assert httpx.get(f"{url}/nope").json()["error"]["code"] == "not_found"
    assert httpx.post(f"{url}/readyz").json()["error"]["code"] == "method_not_allowed"
    assert httpx.get(f"{url}/readyz").status_code == httpx.get(f"{url}/livez").status_code == 200
    assert httpx.get(f"{url}/docs/assets/swagger-ui.css").status_code == 200
    assert 'route="other"' in httpx.get(f"{url}/metrics").text


def test_trace_prints_everything_behind_an_answer(client: openai.OpenAI, url: str, project: Any) -> None:
    answer = asked(client, "What is 6*7?")
    vote = httpx.post(f"{url}/v1/feedback", json={"completion_id": answer.id, "rating": "up", "comment": "nice"})
    assert vote.status_code == 202
    code, out, _ = project.call("trace", answer.id)
    assert code == 0
    for part in ("What is 6*7?", "That is 42.", "calculate", "nice", vote.json()["id"], "agent/1", "c0ffee"):
        assert part in out
    code, out, _ = project.call("trace", answer.id, "--json")
    assert json.loads(out) == httpx.get(f"{url}/v1/lineage/{answer.id}").json()
    code, out, err = project.call("trace", "chatcmpl-nope")
    assert (code, out) == (1, "")
    assert err.startswith("chatcmpl-nope: no such completion in sqlite:///")


def test_chat_streams_from_the_running_endpoint(url: str, project: Any) -> None:
    code, out, err = project.call("chat", "What is 6*7?", "--url", url)
    assert (code, out) == (0, "That is 42.\n")
    assert err.splitlines() == ["→ calculate(expression='6*7')", "← 42"]
    code, out, _ = project.call("chat", "What is 6*7?", "--url", url, "--json")
    assert json.loads(out)["choices"][0]["message"]["content"] == "That is 42."


def test_classify_asks_the_running_endpoint(url: str, project: Any) -> None:
    code, out, err = project.call("classify", "iron", "cow", "--url", url, "--json")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert (answer["model"], [one["label"] for one in answer["results"]]) == ("classifier/1", ["metal", "animal"])


def test_chat_names_an_address_where_nothing_answers(project: Any) -> None:
    code, _, err = project.call("chat", "Hello", "--url", "http://127.0.0.1:9")
    assert code == 1
    assert err.startswith("--url: nothing answers on http://127.0.0.1:9; start it with")


def test_taken_port_is_one_line(url: str, project: Any) -> None:
    port = url.rpartition(":")[2]
    code, out, err = project.run("serve", "--port", port)
    assert (code, out) == (1, "")
    assert err == f"--port: {port} is in use; stop what listens there or choose another --port\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--host", "0.0.0.0"), '--host: 0.0.0.0 is open to others; run "loopwright keys create NAME"'),
        (("--host", "127.0.0.1", "--bento", "agent:nope", "--port", "0"), "--bento: 'agent:nope' is not a built Bento"),
        (("--model", "nobody@champion", "--port", "0"), "nobody: no such model in the registry"),
    ],
)
def test_serve_refuses_in_one_line(project: Any, words: tuple[str, ...], line: str) -> None:
    code, out, err = project.run("serve", *words)
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith(line)
    assert "Traceback" not in err


def test_acknowledged_feedback_survives_a_kill(project: Any) -> None:
    process, url = project.serve()
    body = {"messages": [{"role": "user", "content": "Hello"}]}
    completion_id = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()["id"]
    vote = {"completion_id": completion_id, "rating": "down", "correction": "Hi."}
    feedback_id = httpx.post(f"{url}/v1/feedback", json=vote, timeout=60).json()["id"]
    assert end(process, signal.SIGKILL) == -signal.SIGKILL
    store = Store.of(project.home)
    recorded = store.completion(completion_id)
    store.close()
    assert recorded["answer"]["content"].startswith("Grüße")
    assert [item["id"] for item in recorded["feedback"]] == [feedback_id]


def test_moving_the_alias_swaps_the_model_and_drops_nobody(
    agent_maker: Callable[[Path, str], Path], agent_folder: Path, project: Any, tmp_path: Path
) -> None:
    registry = Registry(project.home)
    registry.promote(registry.register(agent_folder, "other", {}, {}, None))
    second = registry.register(agent_maker(tmp_path / "agent", "I am the second."), "other", {}, {}, None)
    process, url = project.serve("--model", "other@champion", LOOPWRIGHT_API_KEYS="secret")
    headers = {"Authorization": "Bearer secret"}
    body = {"model": "other", "messages": [{"role": "user", "content": "Hello"}]}
    assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).status_code == 401
    answers: list[tuple[int, str, str]] = []

    def keep_asking() -> None:
        with httpx.Client(headers=headers, timeout=60) as client:
            left = 3
            while left:  # a few more once the new model answers
                response = client.post(f"{url}/v1/chat/completions", json=body)
                answer = response.json()
                answers.append((response.status_code, answer["model"], answer["choices"][0]["message"]["content"]))
                left -= answer["model"] == "other/2"

    threads = [threading.Thread(target=keep_asking) for _ in range(4)]
    for thread in threads:
        thread.start()
    registry.promote(second)
    for thread in threads:
        thread.join()
    assert set(answers) == {(200, "other/1", GREETING), (200, "other/2", "I am the second.")}
    assert httpx.get(f"{url}/v1/models", headers=headers).json()["data"][0]["id"] == "other/2"
    stop_in_the_middle_of_a_story(process, url, headers)


def stop_in_the_middle_of_a_story(process: subprocess.Popen[str], url: str, headers: dict[str, str]) -> None:
    """SIGTERM finishes what runs, takes nothing new, and ends with 0."""
    body = {"messages": [{"role": "user", "content": "A story"}], "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        rest = "\n".join(lines)
    assert rest.rstrip().endswith("data: [DONE]")
    process.communicate(timeout=60)
    assert process.returncode == 0
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/livez")
