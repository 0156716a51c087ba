"""A summarizer served as a chat of one message: what it writes, what it refuses, and what is put on record."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest

from components.inference.pyfunc import _load_pyfunc
from components.inference.summarizer import Summarizer
from serving.http.errors import error_body

SOURCE = "add"


@pytest.fixture(scope="module")
def writer(summarizer_folder: Path, tmp_path_factory: pytest.TempPathFactory, local_app: Any) -> Iterator[Any]:
    """An endpoint that serves a summarizer alone."""
    with local_app(summarizer_folder, tmp_path_factory.mktemp("home"), "summarizer") as app:
        yield app


@pytest.fixture(scope="module")
def expected(summarizer_folder: Path) -> str:
    (text,) = Summarizer.load(summarizer_folder).write([SOURCE])
    return text


def test_a_chat_of_one_message_is_answered_with_what_is_written_of_it(writer: Any, expected: str) -> None:
    answer = writer.ask(SOURCE, model="summarizer").json()
    (choice,) = answer["choices"]
    assert (answer["model"], choice["message"]["content"]) == ("summarizer/1", expected)
    assert answer["usage"]["prompt_tokens"] == 2
    assert writer.ask(SOURCE).json()["choices"][0]["message"]["content"] == expected, "nobody else chats here"
    recorded = writer.serving.store.completion(answer["id"])
    assert recorded["answer"]["content"] == expected


def test_it_streams_and_keeps_to_a_limit(writer: Any, expected: str) -> None:
    lines = [line for line in writer.ask(SOURCE, stream=True).text.splitlines() if line.startswith("data: {")]
    deltas = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"] for line in lines]
    assert "".join(delta.get("content") or "" for delta in deltas) == expected
    short = writer.ask(SOURCE, max_tokens=1).json()
    assert short["usage"]["completion_tokens"] == 1
    assert short["choices"][0]["finish_reason"] == "length"


def test_what_it_cannot_do_is_refused(writer: Any) -> None:
    hot = writer.ask(SOURCE, temperature=0.5)
    assert (hot.status_code, hot.json()["error"]["param"]) == (400, "temperature")
    two = writer.post({"messages": [{"role": "user", "content": "add"}, {"role": "user", "content": "add"}]})
    assert "messages: 2: summarizer/1 reads one text" in two.json()["error"]["message"]
    long = writer.ask("add " * 40)
    assert (long.status_code, long.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert "summarizer/1 takes 32 at most; send less" in long.json()["error"]["message"]


def test_a_text_that_waited_too_long_is_told_so(writer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer.serving.chat_watcher("summarizer").engine, "request_seconds", -1.0)
    late = writer.ask(SOURCE)
    assert late.status_code == 503
    message = "no slot became free within serve.request_seconds; try again later"
    assert (late.json()["error"]["message"], late.json()["error"]["code"]) == (message, "timeout")


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 413, 429, 500, 503])
def test_no_error_is_without_a_message(status: int) -> None:
    for message in ("", "  "):
        assert error_body(status, message)["error"]["message"] == HTTPStatus(status).phrase


def test_it_is_listed_with_its_task_and_loads_in_mlflow(writer: Any, summarizer_folder: Path, expected: str) -> None:
    (listed,) = writer.client.get("/v1/models").json()["data"]
    assert (listed["id"], listed["task"]) == ("summarizer/1", "summarize")
    assert _load_pyfunc(str(summarizer_folder)).predict([SOURCE]) == [expected]
