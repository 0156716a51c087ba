"""The store on a real PostgreSQL, of this machine or the one that `LOOPWRIGHT_TEST_POSTGRES` names."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import pytest
from sqlalchemy import create_engine, select
from sqlalchemy.engine import make_url

from components.config.params import InputError
from components.feedback.ledger import Outcome
from components.feedback.pictures import PictureFile
from components.feedback.store import AnswerRecord, Store, StoreUnavailable, UnknownCompletion
from components.feedback.tables import REPLICAS
from components.media.pictures import Picture
from flows.orchestration.flow_run import while_unavailable

pytestmark = pytest.mark.servers

BODY = {"messages": [{"role": "user", "content": "37*12? \N{GREEK SMALL LETTER PI} \0"}]}
ANSWER = AnswerRecord("444", "stop", 11, 7, 0.25, steps=[{"type": "call", "name": "calculate", "arguments": {}}])

OPENER = """
import sys
from components.feedback.store import Store

Store(sys.argv[1]).add_request(sys.argv[2], "agent/1", {})
"""


@pytest.fixture
def address(postgres: str) -> Iterator[str]:
    """A schema of its own, so that tests meet an empty database and leave nothing behind."""
    schema = f"test_{uuid.uuid4().hex[:12]}"
    owner = create_engine(make_url(postgres).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    with owner.connect() as connection:
        role = connection.exec_driver_sql("SELECT current_user").scalar()
        connection.exec_driver_sql(f'CREATE SCHEMA "{schema}"')
        connection.exec_driver_sql(f'ALTER ROLE "{role}" SET search_path = "{schema}"')
    yield postgres
    with owner.connect() as connection:
        connection.exec_driver_sql(f'ALTER ROLE "{role}" RESET search_path')
        connection.exec_driver_sql(f'DROP SCHEMA "{schema}" CASCADE')
    owner.dispose()


@pytest.fixture
def store(address: str) -> Iterator[Store]:
    store = Store(address, busy_seconds=5)
    yield store
    store.close()


def ask(store: Store, completion_id: str) -> str:
    store.add_request(completion_id, "agent/1", BODY)
    store.add_answer(completion_id, ANSWER)
    return completion_id


def test_completion_returns_what_was_recorded(store: Store) -> None:
    first = store.add_feedback(ask(store, "chatcmpl-1"), "down", correction="444!", idempotency_key="k", user="user:a")
    assert store.add_feedback("chatcmpl-1", "down", correction="444!", idempotency_key="k", user="user:a") == first
    second = store.add_feedback("chatcmpl-1", "up")
    found = store.completion("chatcmpl-1")
    assert found["request"] == BODY
    assert found["answer"]["steps"] == ANSWER.steps
    assert [(vote["id"], vote["replaced_by"]) for vote in found["feedback"]] == [(first, second), (second, None)]
    with pytest.raises(UnknownCompletion):
        store.add_feedback("nope", "up")
    with pytest.raises(InputError, match="Idempotency-Key"):
        store.add_feedback(ask(store, "chatcmpl-2"), "up", idempotency_key="k")


def test_what_postgresql_cannot_hold_is_no_fault_of_the_database(store: Store) -> None:
    ask(store, "chatcmpl-1")
    with pytest.raises(UnknownCompletion):
        store.add_feedback("chat\0", "up")
    with pytest.raises(UnknownCompletion):
        store.completion("chat\0")
    with pytest.raises(InputError, match="correction: contains a NUL character"):
        store.add_feedback("chatcmpl-1", "up", "a\0b")
    store.add_feedback("chatcmpl-1", "up", user="user:" + "n" * 300)
    assert store.completion("chatcmpl-1")["feedback"][0]["voice"].startswith("user:")


def test_votes_are_taken_in_once_and_withdrawn(store: Store) -> None:
    ids = [store.add_feedback(ask(store, f"chatcmpl-{number}"), "up") for number in range(3)]
    votes = store.behind_watermark(2)
    assert [vote["id"] for vote in votes] == ids[:2]
    outcomes = [
        Outcome(vote["id"], vote["sequence"], "accepted", None, vote["voice"], vote["created"], vote["id"][:32])
        for vote in votes
    ]
    store.commit_partition("items-1", "digest", outcomes)
    with pytest.raises(InputError, match="another ingestion has committed these votes"):
        store.commit_partition("items-2", "digest", outcomes)
    assert (store.waiting(), store.fresh()) == (2, 1)
    assert store.revoke(ids[0], "poisoned")
    assert store.withdrawn() == {ids[0]: "revoked"}
    store.add_improvement(store.last_accepted_sequence(), "agent/2", "promoted", "better")
    assert store.waiting() == 0
    assert store.accepted_digests([ids[1][:32]]) == {ids[1][:32]: ids[1]}
    assert [row["model"] for row in store.feedback_counts()] == ["agent/1"]
    assert store.forget(1) == 0


def test_a_picture_that_many_write_at_once_is_stored_once_and_not_forgotten_meanwhile(store: Store) -> None:
    shared = PictureFile.of(Picture(np.zeros((3, 4, 3), np.uint8)))

    def write(writer: int) -> None:
        for number in range(10):
            store.add_exchange(f"c-{writer}-{number}", "agent/1", BODY, 1.7e9, ANSWER, [shared])
            store.forget(10_000 if number % 2 else 1)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    store.add_exchange("last", "agent/1", BODY, time.time(), ANSWER, [shared])
    store.forget(1)
    assert store.counts()["requests"] == 1
    about = {"digest": shared.digest, "width": 4, "height": 3, "bytes": len(shared.content)}
    assert store.pictures_of("last") == [about]
    assert store.picture(shared.digest) == shared.content


def test_no_vote_appears_behind_one_that_was_seen(store: Store) -> None:
    """A reader that goes on from the last number it saw misses nothing, although many write at once."""
    completions = [ask(store, f"chatcmpl-{number}") for number in range(160)]
    writers = [
        threading.Thread(target=lambda mine=completions[number::8]: [store.add_feedback(one, "up") for one in mine])
        for number in range(8)
    ]
    for writer in writers:
        writer.start()
    seen: list[int] = []
    while len(seen) < len(completions):
        working = any(writer.is_alive() for writer in writers)
        found = [int(vote["sequence"]) for vote in store.votes(len(completions))]
        late = set(found) - set(seen)
        assert not late or not seen or min(late) > max(seen)
        seen = sorted(found)
        assert working or len(seen) == len(completions)
    for writer in writers:
        writer.join()


def test_processes_that_open_an_empty_database_at_once_migrate_it_once(address: str) -> None:
    opened = [subprocess.Popen([sys.executable, "-c", OPENER, address, f"chatcmpl-{number}"]) for number in range(4)]
    assert [process.wait() for process in opened] == [0] * 4
    store = Store(address)
    assert store.counts()["requests"] == 4
    store.close()


def test_a_server_that_is_gone_is_told_in_one_line(address: str) -> None:
    gone = make_url(address).set(port=1).render_as_string(hide_password=False)
    with pytest.raises(StoreUnavailable, match=r"\*\*\*.*cannot be opened: .*; check LOOPWRIGHT_DATABASE_URL"):
        Store(gone, busy_seconds=1)


def test_a_locked_table_is_told_after_the_wait_and_nothing_is_kept(store: Store, address: str) -> None:
    ask(store, "chatcmpl-1")
    other = create_engine(make_url(address).set(drivername="postgresql+psycopg"))
    hasty = Store(address, busy_seconds=0.2)
    with other.begin() as connection:
        connection.exec_driver_sql("LOCK TABLE feedback IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(StoreUnavailable, match="send it again; nothing was stored"):
            hasty.add_feedback("chatcmpl-1", "up")
    assert hasty.completion("chatcmpl-1")["feedback"] == []
    hasty.close()
    other.dispose()


class Relay:
    """A port that leads to the server while it is open."""

    def __init__(self, host: str, port: int) -> None:
        self._server, self._sockets = (host, port), list[socket.socket]()
        self.port = self.open(0)

    def open(self, port: int) -> int:
        self._listener = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()
        return int(self._listener.getsockname()[1])

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, server = listener.accept()[0], socket.create_connection(self._server)
                self._sockets += [client, server]
                for source, target in ((client, server), (server, client)):
                    threading.Thread(target=self._copy, args=(source, target), daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                target.sendall(data)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._sockets.clear()


def test_a_server_that_is_away_for_a_while_is_waited_for(address: str) -> None:
    url = make_url(address)
    relay = Relay(url.host or "127.0.0.1", url.port or 5432)
    store = Store(url.set(host="127.0.0.1", port=relay.port).render_as_string(hide_password=False), busy_seconds=2)
    ask(store, "chatcmpl-1")
    relay.close()
    told: list[str] = []

    def open_again(line: str) -> None:
        told.append(line)
        if len(told) == 2:
            relay.open(relay.port)

    assert while_unavailable(lambda: store.counts()["requests"], open_again) == 1
    assert len(told) == 2
    assert store.add_feedback("chatcmpl-1", "up")
    store.close()
    relay.close()


def test_a_clock_that_was_set_back_refuses_no_request_and_keeps_no_replica_alive(store: Store) -> None:
    assert store.take_request("shop", 60) == 0.0
    store.announce("killed", ["agent/1"])
    with store._write() as connection:
        connection.exec_driver_sql("UPDATE rate_limits SET full_at = full_at + 3600")
        connection.exec_driver_sql("UPDATE replicas SET seen = seen + 3600")
    assert [store.take_request("shop", 60) == 0.0 for _ in range(61)] == [True] * 60 + [False]
    assert store.loaded_models() == set()
    assert set(store.announce("alive", ["agent/2"])) == {"alive"}
    assert [row["id"] for row in store._rows(select(REPLICAS.c.id))] == ["alive"], "none counts when the hour is over"
