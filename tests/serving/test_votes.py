"""Feedback over HTTP: who speaks, how much may be said, and what happens while nothing can be put on record."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from components.feedback.store import Store
from serving.http.gateway import GatewayMiddleware


def vote(client: TestClient, completion_id: str, **options: Any) -> Any:
    return client.post("/v1/feedback", json={"completion_id": completion_id, "rating": "up", **options})


def voices(local: Any, completion_id: str) -> list[str]:
    return [item["voice"] for item in local.serving.store.completion(completion_id)["feedback"]]


def test_voice_is_the_user_of_the_request_or_whoever_sits_here(local: Any) -> None:
    for options, voice in (({"user": "ada"}, "user:ada"), ({}, "local")):
        completion_id = local.ask("Hello", **options).json()["id"]
        assert vote(local.client, completion_id).status_code == 202
        assert voices(local, completion_id) == [voice]


def test_voice_is_the_fingerprint_of_the_key(local: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    completion_id = local.ask("Hello", user="ada").json()["id"]
    monkeypatch.setenv("LOOPWRIGHT_API_KEYS", "one,two")
    api = local.client.app.api
    for key in ("one", "two"):
        keyed = TestClient(GatewayMiddleware(api, api), headers={"Authorization": f"Bearer {key}"})
        assert vote(keyed, completion_id).status_code == 202
    assert voices(local, completion_id) == [f"key:{hashlib.sha256(key).hexdigest()[:16]}" for key in (b"one", b"two")]


def test_second_vote_replaces_and_history_stays(local: Any) -> None:
    completion_id = local.ask("Hello").json()["id"]
    first, second = (vote(local.client, completion_id, comment=comment).json()["id"] for comment in "ab")
    history = local.client.get(f"/v1/lineage/{completion_id}").json()["feedback"]
    assert [(item["id"], item["replaced_by"]) for item in history] == [(first, second), (second, None)]


@pytest.mark.parametrize("field", ["correction", "comment"])
def test_too_much_said_is_413_and_names_the_limit(local: Any, field: str) -> None:
    limit = local.serving.config.max_correction_characters
    completion_id = local.ask("Hello").json()["id"]
    assert vote(local.client, completion_id, **{field: "x" * limit}).status_code == 202
    response = vote(local.client, completion_id, **{field: "x" * (limit + 1)})
    assert response.status_code == 413
    error = response.json()["error"]
    said = f"{field}: {limit + 1} characters; send at most {limit} (serve.max_correction_characters)"
    assert (error["message"], error["code"], error["param"]) == (said, "request_too_large", field)
    assert len(voices(local, completion_id)) == 1


@pytest.fixture
def app(agent_folder: Path, tmp_path: Path, local_app: Any) -> Iterator[Any]:
    with local_app(agent_folder, tmp_path) as app:
        app.serving.store.close()
        app.serving.store = Store(f"sqlite:///{tmp_path / 'feedback.db'}", busy_seconds=0.05)
        yield app


def assert_unrecorded(response: Any) -> None:
    assert response.status_code == 503
    assert int(response.headers["Retry-After"]) > 0
    assert response.json()["error"]["code"] == "store_unavailable"
    assert "the database is locked or gone; try again soon" in response.json()["error"]["message"]


def test_locked_database_is_503_and_nothing_is_half_written(app: Any, tmp_path: Path) -> None:
    completion_id = app.ask("Hello").json()["id"]
    before = app.serving.store.counts()
    with closing(sqlite3.connect(tmp_path / "feedback.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert_unrecorded(app.ask("Hello"))
        assert_unrecorded(app.ask("Hello", stream=True))
        assert_unrecorded(vote(app.client, completion_id))
        other.execute("ROLLBACK")
    assert app.serving.store.counts() == before
    assert vote(app.client, completion_id).status_code == 202
    assert app.ask("Hello").status_code == 200


def test_database_that_is_gone_is_503_until_it_is_back(app: Any, tmp_path: Path) -> None:
    completion_id = app.ask("Hello").json()["id"]
    app.serving.store.close()
    for name in ("feedback.db", "feedback.db-wal", "feedback.db-shm"):
        if (tmp_path / name).exists():
            os.rename(tmp_path / name, tmp_path / f"away-{name}")
    (tmp_path / "feedback.db").mkdir()
    assert_unrecorded(app.ask("Hello"))
    assert_unrecorded(vote(app.client, completion_id))
    (tmp_path / "feedback.db").rmdir()
    for kept in tmp_path.glob("away-*"):
        os.rename(kept, tmp_path / kept.name.removeprefix("away-"))
    assert vote(app.client, completion_id).status_code == 202
    assert app.ask("Hello").status_code == 200
