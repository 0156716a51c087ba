"""`loopwright chat`, `classify` and `export`, run in this process on registered models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from components.config.params import InputError
from loopwright import client
from loopwright.attachments import message_content
from loopwright.client import classify
from loopwright.models import export
from loopwright.trace import trace_lines
from tests.serving.listening import listening

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

    def interrupted(address: str, messages: Any, confirmed: Any) -> Iterator[dict[str, Any]]:
        asked.append(len(messages))
        for delta in deltas(address, messages, confirmed):
            yield delta
            if len(asked) == 1 and delta.get("content"):
                raise KeyboardInterrupt

    monkeypatch.setattr(client, "_deltas", interrupted)
    client.chat(None, url=client.ADDRESS, model="agent@champion")
    assert asked == [1, 3]
    out, err = capsys.readouterr()
    assert out.startswith("Gr")
    assert " (stopped)" in err


@pytest.fixture
def shown(tmp_path: Path) -> dict[str, Path]:
    """A picture, an animation and a file that is neither."""
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "red.png")
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:], duration=500)
    (tmp_path / "notes.txt").write_text("words")
    return {path.stem: path for path in tmp_path.iterdir()}


def test_files_go_with_a_prompt(seeing: Any, shown: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    with listening(seeing.client.app) as url:
        client.chat("What?", [shown["red"], shown["moves"]], url=url)
        assert capsys.readouterr().out.count("8x6 ") == 3
        with pytest.raises(InputError, match=r"messages\[0\].content\[0\].image_url: "):
            client.chat("What?", [shown["notes"]], url=url)
        with pytest.raises(InputError, match=r"nothing\.png: No such file or directory; give the file of a picture"):
            client.chat("What?", [Path("nothing.png")], url=url)


def test_a_file_goes_with_the_next_question(
    seeing: Any, shown: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed(
        monkeypatch,
        f"/image {shown['red']}",
        "/image nothing.png",
        "What?",
        f"/image {shown['notes']}",
        "And?",
        "Well?",
    )
    with listening(seeing.client.app) as url:
        client.chat(None, url=url)
    out, err = capsys.readouterr()
    assert [line.partition(" ")[0] for line in out.split("\n")[:-1]] == ["8x6", "8x6"]
    assert "red.png goes with the next question" in err
    assert "/image: 'nothing.png' is not a file; give the path of a picture or clip" in err
    assert err.count("messages[2].content[0].image_url: ") == 1
    assert [len(message.get("images", ())) for message in seeing.serving.models.engine.requests[-1].messages] == [
        1,
        0,
        0,
    ]


def test_a_trace_names_the_pictures(seeing: Any, shown: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    content = message_content("What?", [shown["red"], shown["moves"]])
    completion = seeing.ask(content).json()["id"]
    report = seeing.client.get(f"/v1/lineage/{completion}").json()
    lines = list(trace_lines(report))
    red = next(each for each in report["pictures"] if each["bytes"])
    assert f"{red['digest']}  8 x 6, {red['bytes']} bytes, /v1/pictures/{completion}/{red['digest']}" in "\n".join(
        lines
    )
    (question,) = [line for line in lines if line.startswith("user")]
    assert question.count("[picture ") == 1
    assert "[clip 0.0 s " in question
    assert question.endswith(" What?")


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
