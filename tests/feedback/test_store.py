"""The store keeps what it acknowledged, across threads, processes and a killed writer."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from sqlite3 import IntegrityError

import pytest

from components.config.params import InputError
from components.feedback.store import AnswerRecord, Store, UnknownCompletion, database_url

BODY = {"messages": [{"role": "user", "content": "37*12? \N{GREEK SMALL LETTER PI}"}], "temperature": 0.5}
ANSWER = AnswerRecord(
    content="444",
    finish_reason="stop",
    prompt_tokens=11,
    completion_tokens=7,
    seconds=0.25,
    steps=[{"type": "call", "name": "calculate", "arguments": {"expression": "37*12"}}],
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store.of(tmp_path)
    yield store
    store.close()


def ask(store: Store, completion_id: str = "chatcmpl-1") -> str:
    store.add_request(completion_id, "agent/1", BODY)
    store.add_answer(completion_id, ANSWER)
    return completion_id


def test_completion_returns_what_was_recorded(store: Store) -> None:
    ask(store)
    found = store.completion("chatcmpl-1")
    assert found["model"] == "agent/1"
    assert found["request"] == BODY
    assert found["answer"]["content"] == "444"
    assert found["answer"]["steps"] == ANSWER.steps
    assert found["feedback"] == []
    assert set(found) == {"id", "created", "model", "owner", "request", "answer", "feedback"}


def test_an_exchange_is_recorded_as_its_parts_are(store: Store) -> None:
    ask(store)
    store.add_exchange("chatcmpl-2", "agent/1", BODY, 1.5, ANSWER)
    apart, whole = (store.completion(f"chatcmpl-{number}") for number in (1, 2))
    assert whole["created"] == 1.5
    for one in (apart, whole):
        del one["id"], one["created"], one["answer"]["created"]
    assert whole == apart


def test_an_exchange_that_cannot_be_recorded_leaves_nothing_and_the_next_one_goes_on(store: Store) -> None:
    store.add_exchange("chatcmpl-1", "agent/1", BODY, 1.5, ANSWER)
    with pytest.raises(IntegrityError):
        store.add_exchange("chatcmpl-1", "agent/1", BODY, 1.5, ANSWER)
    with pytest.raises(IntegrityError):
        store.add_answer("chatcmpl-2", ANSWER)
    store.add_exchange("chatcmpl-3", "agent/1", BODY, 1.5, ANSWER)
    assert store.counts() == {"requests": 2, "answers": 2, "feedback": 0}


def test_request_without_answer_is_on_record(store: Store) -> None:
    store.add_request("chatcmpl-1", "agent/1", BODY)
    assert store.completion("chatcmpl-1")["answer"] is None


def test_second_vote_replaces_the_first_and_keeps_it(store: Store) -> None:
    ask(store)
    first = store.add_feedback("chatcmpl-1", "down", correction="444!")
    second = store.add_feedback("chatcmpl-1", "up")
    votes = store.completion("chatcmpl-1")["feedback"]
    assert [(vote["id"], vote["rating"], vote["replaced_by"]) for vote in votes] == [
        (first, "down", second),
        (second, "up", None),
    ]
    assert votes[0]["correction"] == "444!"
    assert store.counts() == {"requests": 1, "answers": 1, "feedback": 1}


def test_same_key_returns_the_same_id(store: Store) -> None:
    ask(store)
    first = store.add_feedback("chatcmpl-1", "up", idempotency_key="k")
    assert store.add_feedback("chatcmpl-1", "up", idempotency_key="k") == first
    assert len(store.completion("chatcmpl-1")["feedback"]) == 1


def test_key_of_another_completion_is_refused(store: Store) -> None:
    ask(store)
    ask(store, "chatcmpl-2")
    store.add_feedback("chatcmpl-1", "up", idempotency_key="k")
    with pytest.raises(InputError, match="Idempotency-Key: 'k' was used for chatcmpl-1; send a new key"):
        store.add_feedback("chatcmpl-2", "up", idempotency_key="k")


def test_unknown_completion_is_refused(store: Store) -> None:
    with pytest.raises(UnknownCompletion, match="completion_id: 'nope' is not a completion of this endpoint"):
        store.add_feedback("nope", "up")
    with pytest.raises(UnknownCompletion, match="nope: no such completion in sqlite:///"):
        store.completion("nope")


def test_commits_are_synced_to_disk(store: Store) -> None:
    with store._engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"


def test_threads_write_beside_each_other(store: Store) -> None:
    def write(number: int) -> None:
        for index in range(20):
            ask(store, f"chatcmpl-{number}-{index}")
            store.add_feedback(f"chatcmpl-{number}-{index}", "up")

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.counts() == {"requests": 120, "answers": 120, "feedback": 120}


def test_racing_threads_with_one_key_get_one_id(store: Store) -> None:
    ask(store)
    ids: list[str] = []
    barrier = threading.Barrier(8)

    def vote() -> None:
        barrier.wait()
        ids.append(store.add_feedback("chatcmpl-1", "up", idempotency_key="k"))

    threads = [threading.Thread(target=vote) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 8
    assert len(set(ids)) == 1


WRITER = """
import sys
from pathlib import Path
from components.feedback.store import Store

store = Store.of(Path(sys.argv[1]))
for index in range(int(sys.argv[3])):
    store.add_request(f"{sys.argv[2]}-{index}", "agent/1", {"messages": []})
    print(index, flush=True)
"""


def writer(home: Path, name: str, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(home), name, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_processes_open_and_write_beside_each_other(tmp_path: Path) -> None:
    processes = [writer(tmp_path, f"p{number}", 40) for number in range(4)]
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    store = Store.of(tmp_path)
    assert store.counts()["requests"] == 160
    store.close()


def test_killed_writer_loses_nothing_it_acknowledged(tmp_path: Path) -> None:
    process = writer(tmp_path, "p", 1_000_000)
    assert process.stdout is not None
    acknowledged = [int(process.stdout.readline()) for _ in range(30)][-1]
    os.kill(process.pid, signal.SIGKILL)
    rest = process.stdout.read().split()
    process.wait()
    process.stdout.close()
    acknowledged = max([acknowledged, *map(int, rest)])
    with sqlite3.connect(tmp_path / "feedback.db") as connection:
        rows = {row[0] for row in connection.execute("select id from requests")}
    connection.close()
    assert {f"p-{index}" for index in range(acknowledged + 1)} <= rows


def test_database_url_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOPWRIGHT_DATABASE_URL", f"sqlite:///{tmp_path / 'other.db'}")
    assert database_url(tmp_path) == f"sqlite:///{tmp_path / 'other.db'}"
    Store.of(tmp_path).close()
    assert (tmp_path / "other.db").is_file()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nonsense", "LOOPWRIGHT_DATABASE_URL: 'nonsense' cannot be used"),
        ("martian://u:secret@h/d", r"martian://u:\*\*\*@h/d"),
        ("sqlite:////nonexistent/folder/x.db", "cannot be opened: unable to open database file"),
    ],
)
def test_unusable_database_is_refused(url: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Store(url)


def test_long_voices_are_told_apart_in_few_characters(store: Store) -> None:
    for number, voice in enumerate(("user:" + "n" * 300, "user:" + "n" * 299 + "m", "user:\0", "local")):
        store.add_feedback(ask(store, f"chatcmpl-{number}"), "up", user=voice)
    voices = [store.completion(f"chatcmpl-{number}")["feedback"][0]["voice"] for number in range(4)]
    assert len(set(voices)) == 4
    assert all(len(voice) <= 80 and voice.startswith("user:") for voice in voices[:3])
    assert voices[3] == "local"


def test_a_completion_with_a_nul_in_its_name_is_unknown(store: Store) -> None:
    with pytest.raises(UnknownCompletion):
        store.add_feedback("chat\0", "up")
    with pytest.raises(UnknownCompletion):
        store.completion("chat\0")
