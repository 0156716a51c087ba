"""`loopwright chat`, `classify` and `export`, run in this process on registered models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from components.config.params import InputError
from loopwright import client
from loopwright.client import classify
from loopwright.models import export

pytestmark = pytest.mark.platform

GREETING = "Grüße, naïve façade: 日本語 and \N{SNOWMAN}."


@pytest.fixture
def in_project(project: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(project.root)
    monkeypatch.setenv("LOOPWRIGHT_HOME", "var")
    # The default port of this machine may belong to someone.
    monkeypatch.setattr(client, "ADDRESS", "http://127.0.0.1:9")
    return project


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    waiting: Iterator[str] = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)


def test_chat_answers_in_this_process_where_no_endpoint_runs(
    in_project: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    client.chat("What is 6*7?", url=client.ADDRESS, model="agent@champion")
    out, err = capsys.readouterr()
    assert out == "That is 42.\n"
    assert err.splitlines() == [
        "no endpoint on http://127.0.0.1:9: loading agent@champion into this process",
        "→ calculate(expression='6*7')",
        "← 42",
    ]


def test_texts_are_classified_in_this_process_where_no_endpoint_runs(
    in_project: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    classify(["iron", "cow " * 40], url=client.ADDRESS, model="classifier@champion", as_json=False)
    out, err = capsys.readouterr()
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["text", "label", "score"]
    assert rows[1][:2] == ["iron", "metal"]
    assert {row[0] for row in rows[2:4]} == {"fruit", "animal"}
    assert rows[4][-2] == "animal"
    assert err.splitlines() == [
        "no endpoint on http://127.0.0.1:9: loading classifier@champion into this process",
        "1 of 2 texts exceed the context of classifier/1: their ends were truncated",
    ]
    with pytest.raises(InputError, match=r'input\[1\]: " ": an empty text; send words'):
        classify(["iron", " "], url=client.ADDRESS, model="classifier@champion", as_json=False)


def test_conversation_outgrows_the_context_by_forgetting(
    in_project: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(monkeypatch, "x" * 200, "", "Hello " + "y" * 150, "z" * 400, "Hello")
    client.chat(None, url=client.ADDRESS, model="agent@champion")
    out, err = capsys.readouterr()
    assert len(out.splitlines()) >= 3
    assert "tokens do not fit the model's context of 256" in err


def test_interrupt_stops_the_reply_and_not_the_conversation(
    in_project: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(monkeypatch, "Hello", "Hello")
    deltas = client._deltas
    asked: list[int] = []

    def interrupted(address: str, messages: Any) -> Iterator[dict[str, Any]]:
        asked.append(len(messages))
        for delta in deltas(address, messages):
            yield delta
            if len(asked) == 1 and delta.get("content"):
                raise KeyboardInterrupt

    monkeypatch.setattr(client, "_deltas", interrupted)
    client.chat(None, url=client.ADDRESS, model="agent@champion")
    assert asked == [1, 3]
    out, err = capsys.readouterr()
    assert out.startswith("Gr")
    assert " (stopped)" in err


def test_json_needs_a_prompt() -> None:
    with pytest.raises(InputError, match="--json: needs a PROMPT"):
        client.chat(None, url=client.ADDRESS, model="agent@champion", as_json=True)


def test_json_is_the_completion(in_project: Any, capsys: pytest.CaptureFixture[str]) -> None:
    client.chat("Hello", url=client.ADDRESS, model="agent/1", as_json=True)
    completion = json.loads(capsys.readouterr().out)
    assert completion["model"] == "agent/1"
    assert completion["choices"][0]["message"]["content"] == GREETING


def test_chat_with_an_unknown_model_is_refused(in_project: Any) -> None:
    with pytest.raises(InputError, match="nobody: no such model in the registry"):
        client.chat("Hello", url=client.ADDRESS, model="nobody@champion")


def test_export_copies_a_folder_that_loads(
    in_project: Any, tmp_path: Path, agent_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "deep" / "out"
    export("agent@champion", folder)
    assert "agent/1 is in" in capsys.readouterr().out
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        file.name: file.read_bytes() for file in agent_folder.iterdir()
    }
    with pytest.raises(InputError, match="is not an empty folder; choose another, or empty it first"):
        export("agent@champion", folder)
    with pytest.raises(InputError, match="nobody: no such model"):
        export("nobody@champion", tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


def test_export_to_an_unwritable_place_is_one_line(in_project: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written: "):
        export("agent@champion", tmp_path / "file" / "out")
