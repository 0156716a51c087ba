"""Endpoints that share a PostgreSQL database, with a server of the test's own: they answer as a single one does."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from benchmarks.postgres_server import PostgresServer
from components.feedback.store import Store
from serving.http import keyring
from serving.models import replica
from serving.observability import platform
from tests.servers import postgres_server


@pytest.fixture(scope="module")
def database() -> Iterator[PostgresServer]:
    with postgres_server() as server:
        yield server


@pytest.fixture
def replicas(
    database: PostgresServer, agent_folder: Path, tmp_path: Path, local_app: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[Any]]:
    """Two endpoints, each with a state folder of its own."""
    monkeypatch.setenv("LOOPWRIGHT_DATABASE_URL", database.url)
    monkeypatch.delenv("LOOPWRIGHT_API_KEYS", raising=False)
    monkeypatch.setattr(keyring, "REFRESH_SECONDS", 0.0)
    monkeypatch.setattr(replica, "BEAT_SECONDS", 0.1)
    with ExitStack() as stack:
        yield [stack.enter_context(local_app(agent_folder, tmp_path / name)) for name in ("one", "two")]


@pytest.fixture
def key(replicas: list[Any]) -> Iterator[tuple[str, dict[str, str]]]:
    """A key for 60 requests a minute, revoked at the end: id and headers."""
    store: Store = replicas[0].serving.store
    key_id, secret = store.create_key("shop", ["predict", "feedback"], 60)
    yield key_id, {"Authorization": f"Bearer {secret}"}
    store.revoke_key(key_id)


def await_status(app: Any, status: int) -> None:
    deadline = time.monotonic() + 20
    while app.client.get("/readyz").status_code != status:
        assert time.monotonic() < deadline, f"/readyz is not {status}"
        time.sleep(0.02)


def test_replicas_share_the_limit_of_a_key(replicas: list[Any], key: tuple[str, dict[str, str]]) -> None:
    _, headers = key

    def ask(number: int) -> int:
        return int(replicas[number % 2].client.get("/v1/models", headers=headers).status_code)

    began = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(ask, range(160)))
    refilled = time.monotonic() - began  # one a second
    assert set(statuses) == {200, 429}
    assert 60 <= statuses.count(200) <= 61 + refilled
    refused = replicas[0].client.get("/v1/models", headers=headers)
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert refused.headers["Retry-After"] == "1"


def test_a_refused_request_is_not_allowed_uncounted_a_moment_later(replicas: list[Any]) -> None:
    """Of a bucket that is empty, no more is taken than what refills it: 200 a second."""
    stores = [app.serving.store for app in replicas]
    assert stores[0].take_request("quick", 12_000) == 0
    with stores[0]._write() as connection:
        connection.exec_driver_sql("UPDATE rate_limits SET full_at = full_at + 59.995 WHERE key = 'quick'")
    began = time.monotonic()

    def take(number: int) -> int:
        return int(stores[number % 2].take_request("quick", 12_000) == 0)

    with ThreadPoolExecutor(16) as pool:
        allowed = sum(pool.map(take, range(600)))
    assert allowed <= 2 + 200 * (time.monotonic() - began)


def test_an_idempotency_key_gives_one_vote_whichever_replica_gets_it(replicas: list[Any]) -> None:
    completion = replicas[0].ask("Hello").json()["id"]
    vote = {"completion_id": completion, "rating": "up"}

    def send(number: int) -> str:
        headers = {"Idempotency-Key": "the-same"}
        response = replicas[number % 2].client.post("/v1/feedback", json=vote, headers=headers)
        assert response.status_code == 202
        return str(response.json()["id"])

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(send, range(16)))) == 1
    assert len(replicas[1].serving.store.completion(completion)["feedback"]) == 1


def test_a_replica_is_ready_while_it_can_record(replicas: list[Any], database: PostgresServer) -> None:
    await_status(replicas[0], 200)
    database.stop()
    try:
        await_status(replicas[0], 503)
        assert replicas[0].client.get("/readyz").json()["error"]["message"].endswith("the database cannot be written")
        assert replicas[0].client.get("/livez").status_code == 200
    finally:
        database.start()
    await_status(replicas[0], 200)


def test_a_database_that_hangs_holds_no_scrape(
    replicas: list[Any], database: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prometheus would take the endpoint for down."""
    monkeypatch.setattr(replica, "STALE_SECONDS", 0.5)
    monkeypatch.setattr(platform, "REFRESH_SECONDS", -1.0)
    with ThreadPoolExecutor(1) as pool:
        database.suspend()
        try:
            await_status(replicas[0], 503)
            response = pool.submit(replicas[0].client.get, "/metrics").result(timeout=10)
        finally:
            database.resume()
    assert "loopwright_store_available 0.0" in response.text
    await_status(replicas[0], 200)


def test_a_database_that_hangs_holds_no_request(
    replicas: list[Any], database: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits for it fails as when it is away, and so does what comes later; all goes on when it answers again."""
    monkeypatch.setattr(replica, "HUNG_SECONDS", 0.5)
    app, vote = replicas[0], {"completion_id": replicas[0].ask("Hello").json()["id"], "rating": "up"}
    requests = [lambda: app.ask("Hello"), lambda: app.client.post("/v1/feedback", json=vote)] * 20
    with ThreadPoolExecutor(len(requests)) as pool:
        database.suspend()
        try:
            asked = [pool.submit(request) for request in requests]
            refused = [each.result(timeout=60) for each in asked]
            await_status(app, 503)
            refused += [request() for request in requests[:2]]
        finally:
            database.resume()
    assert {(each.status_code, each.json()["error"]["code"]) for each in refused} == {(503, "store_unavailable")}
    await_status(app, 200)
    assert [request().status_code for request in requests[:2]] == [200, 202]


def test_answers_and_votes_wait_for_a_database_that_restarts(replicas: list[Any], database: PostgresServer) -> None:
    completion = replicas[0].ask("Hello").json()["id"]
    ended, statuses = threading.Event(), []

    def keep_asking(app: Any) -> None:
        while not ended.is_set():
            statuses.append(app.ask("Hello").status_code)
            vote = {"completion_id": completion, "rating": "up"}
            statuses.append(app.client.post("/v1/feedback", json=vote).status_code)

    threads = [threading.Thread(target=keep_asking, args=(app,)) for app in replicas * 2]
    for thread in threads:
        thread.start()
    for mode in ("fast", "immediate"):  # an orderly stop, and a crash
        database.stop(mode)
        database.start()
    ended.set()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 202}


def test_a_conversation_is_recognized_by_every_replica(replicas: list[Any]) -> None:
    asked = [{"role": "user", "content": "What is 6*7?"}]
    message = replicas[0].post({"messages": asked}).json()["choices"][0]["message"]
    thread = [*asked, {"role": "assistant", "content": message["content"]}, {"role": "user", "content": "Hello"}]
    from serving.http.chat_handler import answering_model
    from serving.http.schemas import ChatRequest

    store = replicas[1].serving.store
    assert answering_model(ChatRequest.model_validate({"messages": thread}), store, "") == "agent/1"
    assert answering_model(ChatRequest.model_validate({"messages": thread}), store, "another owner") is None
    other = [*asked, {"role": "assistant", "content": "That is 43."}, thread[-1]]
    assert answering_model(ChatRequest.model_validate({"messages": other}), store, "") is None


def test_a_stopping_replica_still_answers_and_closes_its_connections(replicas: list[Any]) -> None:
    replicas[0].serving.stopping = True
    assert replicas[0].client.get("/readyz").status_code == 503
    answer = replicas[0].ask("Hello")
    assert (answer.status_code, answer.headers["Connection"]) == (200, "close")
    replicas[0].serving.draining = True
    assert replicas[0].ask("Hello").status_code == 503


def test_counters_add_up_and_gauges_of_the_database_agree(replicas: list[Any]) -> None:
    completion = replicas[0].ask("Hello").json()["id"]
    replicas[1].ask("Hello")
    replicas[1].client.post("/v1/feedback", json={"completion_id": completion, "rating": "up"})
    figures = []
    for app in replicas:
        lines = [line.rsplit(" ", 1) for line in app.client.get("/metrics").text.splitlines() if line[:1] != "#"]
        figures.append({name: float(value) for name, value in lines})
    answered = 'loopwright_answers_total{finish_reason="stop"}'
    assert sum(each[answered] for each in figures) == 2
    waiting = "loopwright_feedback_waiting"
    assert figures[0][waiting] == figures[1][waiting] == replicas[0].serving.store.fresh()
