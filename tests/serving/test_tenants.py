"""Two keys before one endpoint: neither reads, votes on or learns of what belongs to the other; `admin` sees all."""

from __future__ import annotations

import hashlib
import io
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from components.feedback.store import AnswerRecord, Store

ANSWER = AnswerRecord("yes", "stop", 1, 1, 0.5)


class Tenant:
    """A client that sends one key."""

    def __init__(self, app: Any, name: str, *scopes: str, owner: str | None = None) -> None:
        _, key = app.serving.store.create_key(name, scopes, owner=owner)
        self._client, self._headers = app.client, {"Authorization": f"Bearer {key}"}

    def get(self, path: str) -> Any:
        return self._client.get(path, headers=self._headers)

    def post(self, path: str, body: Any, **headers: str) -> Any:
        return self._client.post(path, json=body, headers={**self._headers, **headers})

    def answer(self, content: Any = "Hello") -> str:
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 2}
        return str(self.post("/v1/chat/completions", body).json()["id"])

    def vote(self, completion_id: str, **headers: str) -> Any:
        return self.post("/v1/feedback", {"completion_id": completion_id, "rating": "up"}, **headers)


def test_a_key_neither_reads_nor_rates_the_answers_of_another(app: Any) -> None:
    ada, bob = (Tenant(app, name, "predict", "feedback") for name in ("ada", "bob"))
    admin = Tenant(app, "operator", "admin")
    mine = ada.answer()
    unknown = bob.get("/v1/lineage/chatcmpl-unknown").json()["error"]["message"]
    foreign = bob.get(f"/v1/lineage/{mine}")
    assert foreign.status_code == 404
    assert foreign.json()["error"]["message"].replace(mine, "chatcmpl-unknown") == unknown
    refused, missing = bob.vote(mine), bob.vote("chatcmpl-unknown")
    assert (refused.status_code, missing.status_code) == (404, 404)
    assert refused.json()["error"]["message"].replace(mine, "chatcmpl-unknown") == missing.json()["error"]["message"]
    assert [who.get(f"/v1/lineage/{mine}").status_code for who in (ada, admin)] == [200, 200]
    assert ada.vote(mine).status_code == admin.vote(mine).status_code == 202


def test_keys_of_one_owner_share_their_records(app: Any) -> None:
    asks, votes = Tenant(app, "web", "predict", owner="shop"), Tenant(app, "votes", "feedback", owner="shop")
    assert votes.vote(asks.answer()).status_code == 202


def test_equal_idempotency_keys_of_two_owners_are_two_votes(app: Any) -> None:
    ada, bob = (Tenant(app, name, "predict", "feedback") for name in ("ada", "bob"))
    mine, theirs = ada.answer(), bob.answer()
    same = {"Idempotency-Key": "1"}
    first, second = ada.vote(mine, **same), bob.vote(theirs, **same)
    assert (first.status_code, second.status_code) == (202, 202)
    assert first.json() != second.json()
    assert ada.vote(mine, **same).json() == first.json()
    conflict = bob.vote(bob.answer(), **same)
    assert conflict.status_code == 400
    assert theirs in conflict.json()["error"]["message"]
    assert mine not in conflict.text


def test_a_picture_is_read_by_its_owner_alone(app: Any) -> None:
    """The route of pictures reads the record too; a request of any backend puts them there."""
    from components.feedback.pictures import PictureFile, reference

    ada, bob = (Tenant(app, name, "predict") for name in ("ada", "bob"))
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    digest = hashlib.sha256(b64encode(file.getvalue())).hexdigest()
    picture = PictureFile(digest, 1, 1, file.getvalue())
    body = {"messages": [{"role": "user", "content": [reference(digest)]}]}
    app.serving.store.add_exchange("chatcmpl-p", "agent/1", body, 1.0, ANSWER, [picture], owner="ada")
    path = f"/v1/pictures/chatcmpl-p/{digest}"
    assert [who.get(path).status_code for who in (ada, bob)] == [200, 404]


def test_records_made_without_a_key_are_seen_by_admin_alone_once_there_are_keys(app: Any) -> None:
    completion_id = app.ask("Hello", max_tokens=2).json()["id"]
    assert app.client.get(f"/v1/lineage/{completion_id}").status_code == 200
    ada, admin = Tenant(app, "ada", "predict", "feedback"), Tenant(app, "operator", "admin")
    path = f"/v1/lineage/{completion_id}"
    assert [who.get(path).status_code for who in (ada, admin)] == [404, 200]
    assert ada.vote(completion_id).status_code == 404


def test_a_repeated_idempotency_key_is_one_vote_without_keys(app: Any) -> None:
    completion_id = app.ask("Hello", max_tokens=2).json()["id"]
    vote = {"completion_id": completion_id, "rating": "up"}
    ids = {app.client.post("/v1/feedback", json=vote, headers={"Idempotency-Key": "1"}).json()["id"] for _ in range(2)}
    assert len(ids) == 1


def test_a_streamed_answer_has_its_owner_before_its_end(app: Any) -> None:
    ada = Tenant(app, "ada", "predict")
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2, "stream": True}
    first = ada.post("/v1/chat/completions", body).text.split('"id":"')[1].split('"')[0]
    assert ada.get(f"/v1/lineage/{first}").status_code == 200
    assert Tenant(app, "bob", "predict").get(f"/v1/lineage/{first}").status_code == 404


@pytest.mark.parametrize("name", ["", " ", "x" * 65, "a\0"])
def test_an_owner_is_a_name(tmp_path: Path, name: str) -> None:
    store = Store.of(tmp_path)
    with pytest.raises(ValueError, match="owner: "):
        store.create_key("a", ["predict"], owner=name)
    store.close()
