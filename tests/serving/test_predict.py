"""Batch inference: every row as the endpoint answers it, the same bytes from any number of workers and after a kill."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from components.agent.agent import Agent
from components.config.params import InputError, load_params
from components.prediction.predict import MANIFEST, Model, Summary, predict
from components.prediction.predictors import MAX_ROWS, PredictionTask
from components.runtime.object_store import read_bytes, write_file
from components.runtime.stage import digest
from tests.servers import s3_server
from tests.serving.conftest import ROOT, WEATHER

WORDS = ("apple", "iron", "cow", "plum", "zinc", "dog", "pear")
QUESTIONS = ("Hello", "What is 6*7?", "A story", '[{"role": "user", "content": "Hello"}]')
"""The last is no chat: anyone may have typed it."""


def run(
    folder: Path, task: PredictionTask, source: Path | str, to: Path | str, workers: int = 1, **options: Any
) -> Summary:
    params = load_params(ROOT / "params.yaml", {"run.workers": workers, "run.launcher": "local"})
    model = Model(folder, f"{folder.name}/1", task, params.serve, ROOT)
    return predict(str(source), str(to), model, params.run, **options)


def rows(to: Path) -> list[dict[str, Any]]:
    return [row for file in sorted(to.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def manifest(to: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (to / MANIFEST).read_text().splitlines()]


def write_lines(file: Path, *lines: Any) -> Path:
    file.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return file


@pytest.fixture
def words(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "words.jsonl", *({"id": number, "text": word} for number, word in enumerate(WORDS)))


def test_chats_are_answered_as_by_the_endpoint_and_bad_rows_say_why(
    agent_folder: Path, local: Any, tmp_path: Path
) -> None:
    chat = [{"role": "system", "content": ""}, {"role": "user", "content": "Hello"}]
    source = write_lines(
        tmp_path / "chats.jsonl",
        *({"id": question, "prompt": question} for question in QUESTIONS),
        {"id": "list", "prompt": chat},
        {"id": "long", "prompt": "word " * 400},
        {"id": "empty", "prompt": " "},
        {"id": "answered", "prompt": [*chat, {"role": "assistant", "content": "Hi"}]},
        {"id": "number", "prompt": 7},
        "{torn",
    )
    summary = run(agent_folder, "chat", source, tmp_path / "out")
    assert (summary.rows, summary.errors, summary.files, summary.model) == (10, 5, 1, "agent/1")
    found = rows(tmp_path / "out")
    for row, question in zip(found, QUESTIONS, strict=False):
        choice = local.ask(question).json()["choices"][0]
        assert (row["id"], row["answer"], row["error"]) == (question, choice["message"]["content"], None)
        assert (json.loads(row["steps"]), row["finish_reason"]) == (choice["message"]["steps"], choice["finish_reason"])
    assert found[4]["answer"] == local.post({"messages": chat}).json()["choices"][0]["message"]["content"]
    assert json.loads(found[4]["prompt"]) == chat
    assert [row["error"] for row in found[5:]] == [
        "messages: 1204 tokens do not fit the model's context of 256 with room to answer; send fewer or shorter "
        "messages",
        "prompt: an empty chat; give words",
        "prompt: ends with a turn of the assistant; give a chat that waits for an answer",
        "prompt: expected text or a list of messages, found int",
        "row 10: not valid JSON: key must be a string at line 1 column 2",
    ]
    assert all(row["answer"] is None for row in found[5:])


def test_tools_of_a_row_are_the_clients_and_calls_are_returned(agent_folder: Path, local: Any, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Weather in Paris?"}]
    body = {"messages": messages, "tools": [WEATHER]}
    source = write_lines(tmp_path / "chats.jsonl", body)
    run(agent_folder, "chat", source, tmp_path / "out")
    (row,) = rows(tmp_path / "out")
    lines = write_lines(tmp_path / "batch.jsonl", {"custom_id": "a", "url": "/v1/chat/completions", "body": body})
    run(agent_folder, "chat", lines, tmp_path / "batch", column="body.messages")
    assert rows(tmp_path / "batch")[0] == {
        **{name: value for name, value in row.items() if name not in ("messages", "tools")},
        "custom_id": "a",
        "url": "/v1/chat/completions",
        "body": json.dumps(body),
    }
    (expected,) = local.post({"messages": messages, "tools": [WEATHER]}).json()["choices"][0]["message"]["tool_calls"]
    (call,) = json.loads(row["tool_calls"])
    assert (call["function"], row["finish_reason"]) == (expected["function"], "tool_calls")


def test_a_tool_that_writes_is_returned_for_a_person_to_confirm(
    agent_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Agent.load

    def writing(folder: Path, context_len: int) -> Agent:
        agent = load(folder, context_len)
        agent.own_tools = tuple(replace(tool, writes=True) for tool in agent.own_tools)
        return agent

    monkeypatch.setattr(Agent, "load", writing)
    copied = Path(shutil.copytree(agent_folder, tmp_path / "agent"))  # a process keeps the model that it has loaded
    run(copied, "chat", write_lines(tmp_path / "chats.jsonl", {"text": "What is 6*7?"}), tmp_path / "out")
    (row,) = rows(tmp_path / "out")
    assert (row["steps"], row["finish_reason"]) == ("[]", "tool_calls")
    assert json.loads(row["tool_calls"])[0]["function"]["name"] == "calculate"


def test_labels_and_vectors_are_the_endpoints_beside_the_columns_of_the_source(
    classifier_folder: Path, local_app: Any, tmp_path: Path
) -> None:
    source = tmp_path / "words.csv"
    with source.open("w", newline="") as file:
        csv.writer(file).writerows(
            [("label", "text"), *(("old", f"{word}\n" * 2) for word in WORDS), ("old", "iron " * 50)]
        )
    for task in ("classify", "embed"):
        run(classifier_folder, task, source, tmp_path / task)
    texts = [f"{word}\n" * 2 for word in WORDS] + ["iron " * 50]
    with local_app(classifier_folder, tmp_path / "home", "classifier") as app:
        labels = app.client.post("/v1/classify", json={"input": texts}).json()["results"]
        vectors = app.client.post("/v1/embeddings", json={"input": texts}).json()["data"]
    assert [row["text"] for row in rows(tmp_path / "classify")] == texts
    for row, label in zip(rows(tmp_path / "classify"), labels, strict=True):
        assert (row["input_label"], row["label"], row["truncated"]) == ("old", label["label"], label["truncated"])
        assert row["scores"] == pytest.approx(label["scores"], abs=1e-6)
    for row, vector in zip(rows(tmp_path / "embed"), vectors, strict=True):
        assert row["label"] == "old"
        assert row["embedding"] == pytest.approx(vector["embedding"], abs=1e-6)


def test_summaries_are_the_endpoints(summarizer_folder: Path, local_app: Any, tmp_path: Path) -> None:
    sources = ["def add a b return a + b", "return the sum", "def " * 40]
    source = write_lines(tmp_path / "code.jsonl", *({"source": text} for text in sources))
    run(summarizer_folder, "summarize", source, tmp_path / "out")
    *found, too_long = rows(tmp_path / "out")
    with local_app(summarizer_folder, tmp_path / "home", "summarizer") as app:
        for row, text in zip(found, sources, strict=False):
            choice = app.ask(text).json()["choices"][0]
            assert (row["summary"], row["finish_reason"]) == (choice["message"]["content"], choice["finish_reason"])
    assert too_long["error"] == "source: 41 tokens; the model takes 32 at most"


def test_two_workers_write_the_bytes_of_one(
    classifier_folder: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MAX_ROWS, "classify", 2)  # type: ignore[index]
    run(classifier_folder, "classify", words, tmp_path / "one")
    run(classifier_folder, "classify", words, tmp_path / "two", workers=2)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    assert [line["rows"] for line in manifest(tmp_path / "two")] == [2, 2, 2, 1]
    assert [row["id"] for row in rows(tmp_path / "two")] == list(range(7))


def test_an_interrupted_run_goes_on_and_a_damaged_file_is_written_anew(
    classifier_folder: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MAX_ROWS, "classify", 2)  # type: ignore[index]
    done: list[str] = []

    def note(finished: int, total: int, line: dict[str, Any]) -> None:
        done.append(line["key"])
        if len(done) == 2:
            raise KeyboardInterrupt

    answer: Callable[..., Summary] = lambda to: run(classifier_folder, "classify", words, to, progress=note)  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        answer(tmp_path / "out")
    (tmp_path / "out/part-00000.parquet").write_bytes(b"torn")
    answer(tmp_path / "out")
    answer(tmp_path / "out")
    assert done == ["part-00000", "part-00001", "part-00000", "part-00002", "part-00003"]
    run(classifier_folder, "classify", words, tmp_path / "whole")
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    (line, *_) = manifest(tmp_path / "out")
    assert (line["model"], line["source"], line["first_row"]) == ("classifier/1", str(words), 1)
    assert line["sha256"] == digest(tmp_path / "out/part-00000.parquet")


def test_a_folder_with_anything_else_is_refused(
    classifier_folder: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(classifier_folder, "classify", words, tmp_path / "out")
    with pytest.raises(
        InputError, match=r"/out: has answers of classifier/1 to .*/words\.jsonl, which is another model"
    ):
        run(classifier_folder, "embed", words, tmp_path / "out")
    with words.open("a") as file:
        file.write('{"text": "cat"}\n')
    with pytest.raises(InputError, match=r"or has changed since; choose another folder, or remove it$"):
        run(classifier_folder, "classify", words, tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").touch()
    with pytest.raises(InputError, match=r"/other: is not empty \(.*notes\.txt\); choose another folder"):
        run(classifier_folder, "classify", words, tmp_path / "other")
    with pytest.raises(InputError, match=r"^--to: .* is in the source .*; choose a folder outside it$"):
        run(classifier_folder, "classify", tmp_path, tmp_path / "out")
    (tmp_path / "out" / MANIFEST).write_text("{}\n")
    with pytest.raises(InputError, match=r"manifest\.jsonl: damaged: KeyError"):
        run(classifier_folder, "classify", words, tmp_path / "out")


def test_a_wrong_source_or_task_is_one_line_before_a_model_is_loaded(
    classifier_folder: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.prediction.predict.load_predictor", None)
    to = tmp_path / "out"
    with pytest.raises(
        InputError, match=r"words\.jsonl: no column 'body'; found columns: id, text; name one with --col"
    ):
        run(classifier_folder, "classify", words, to, column="body")
    with pytest.raises(InputError, match=r"^--task: chat: classifier/1 is a model to classify; name another"):
        run(classifier_folder, "chat", words, to)
    other = write_lines(tmp_path / "other.jsonl", {"title": "iron", "body": "cow"})
    with pytest.raises(
        InputError, match="none of the columns text; found columns: title, body; name one with --column"
    ):
        run(classifier_folder, "classify", other, to)
    assert not to.exists()


def test_sources_and_answers_in_an_object_store(
    classifier_folder: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec import filesystem

    monkeypatch.setitem(MAX_ROWS, "classify", 4)  # type: ignore[index]
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))  # /tmp may be memory
    store = filesystem("memory")
    store.pipe_file("/in/words.jsonl", words.read_bytes())
    run(classifier_folder, "classify", words, tmp_path / "local")
    done: list[str] = []
    note: Callable[..., None] = lambda finished, total, line: done.append(line["key"])  # noqa: E731
    for _ in range(2):
        run(classifier_folder, "classify", "memory://in", "memory://out/night", progress=note)
        store.rm_file("/out/night/part-00001.parquet")
    run(classifier_folder, "classify", "memory://in", "memory://out/night", progress=note)
    assert done == ["part-00000", "part-00001", "part-00001", "part-00001"]
    for key in ("part-00000", "part-00001"):
        assert store.cat_file(f"/out/night/{key}.parquet") == (tmp_path / f"local/{key}.parquet").read_bytes()
    with pytest.raises(InputError, match=r"^memory://nowhere: no such file, and no folder with files; check the name$"):
        run(classifier_folder, "classify", "memory://nowhere", tmp_path / "none")


def test_sources_and_answers_in_s3(
    classifier_folder: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By ranges of a file, and without the listing of a bucket from before."""
    pytest.importorskip("s3fs")
    monkeypatch.setitem(MAX_ROWS, "classify", 4)  # type: ignore[index]
    run(classifier_folder, "classify", words, tmp_path / "local")
    with s3_server() as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        write_file("s3://dvc/in/words.jsonl", words)
        with pytest.raises(InputError, match=r"^s3://nobody/out/manifest\.jsonl: not writable: .*; check the address"):
            run(classifier_folder, "classify", "s3://dvc/in", "s3://nobody/out")
        run(classifier_folder, "classify", "s3://dvc/in", "s3://dvc/out")
        found = [read_bytes(f"s3://dvc/out/part-0000{number}.parquet") for number in range(2)]
    assert found == [(tmp_path / f"local/part-0000{number}.parquet").read_bytes() for number in range(2)]


def test_the_command_answers_by_the_champion(project: Any, words: Path, tmp_path: Path) -> None:
    options = ("--task", "embed", "--to", str(tmp_path / "out"), "--json")
    code, out, err = project.call("predict", str(words), *options)
    assert code == 0, err
    summary = json.loads(out)
    assert (summary["model"], summary["rows"], summary["errors"]) == ("classifier/1", 7, 0)
    assert err == "predict  1/1  part-00000  7 rows\n"
    assert len(rows(tmp_path / "out")[0]["embedding"]) == 32
    code, out, err = project.call("predict", str(words), "--to", str(tmp_path / "again"), "--model", "nobody")
    assert (code, out) == (1, "")
    assert err.startswith("nobody: no such model in the registry")
