"""Who may ask what, and how often: keys on record, scopes, pace, other hosts and other sites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from components.config.params import InputError
from components.feedback.keys import ApiKey, key_digest
from serving.http.gateway import GatewayMiddleware
from serving.http.keyring import TokenBucket, environment_keys

ASK = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_scopes_of_keys_on_record(app: Any) -> None:
    store = app.serving.store
    opened = {scope: store.create_key(scope, [scope], owner="us")[1] for scope in ("predict", "feedback", "admin")}
    answer = app.client.post("/v1/chat/completions", json=ASK, headers=bearer(opened["predict"]))
    assert answer.status_code == 200
    vote = {"completion_id": answer.json()["id"], "rating": "up"}
    statuses = {
        scope: (
            app.client.post("/v1/chat/completions", json=ASK, headers=bearer(key)).status_code,
            app.client.post("/v1/feedback", json=vote, headers=bearer(key)).status_code,
            app.client.get("/v1/feedback", headers=bearer(key)).status_code,
            app.client.get("/v1/models", headers=bearer(key)).status_code,
        )
        for scope, key in opened.items()
    }
    assert statuses == {
        "predict": (200, 403, 403, 200),
        "feedback": (403, 202, 403, 403),
        "admin": (200, 202, 200, 200),
    }
    refused = app.client.get("/v1/feedback", headers=bearer(opened["predict"])).json()["error"]
    assert refused["code"] == "insufficient_scope"
    assert refused["message"] == "this key has the scopes predict; GET /v1/feedback requires admin"
    listed = app.client.get("/v1/feedback", headers=bearer(opened["admin"])).json()["data"]
    assert [row["completion_id"] for row in listed] == [vote["completion_id"]] * 2


def test_a_key_opens_from_its_making_to_its_revocation(app: Any) -> None:
    assert app.client.get("/v1/models").status_code == 200  # this machine, no keys yet
    key_id, key = app.serving.store.create_key("laptop", ["predict"])
    assert app.client.get("/v1/models").status_code == 401
    assert app.client.get("/v1/models", headers=bearer(key)).status_code == 200
    app.serving.store.create_key("other", ["predict"])
    app.serving.store.revoke_key(key_id)
    assert app.client.get("/v1/models", headers=bearer(key)).status_code == 401


def test_a_hashed_key_of_the_environment_opens_everything(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOPWRIGHT_API_KEYS", f"sha256:{key_digest('open sesame').upper()}".replace("SHA", "sha"))
    client = TestClient(GatewayMiddleware(app.client.app.api, app.client.app.api))
    assert client.get("/v1/feedback", headers=bearer("open sesame")).status_code == 200
    assert client.get("/v1/feedback", headers=bearer(f"sha256:{key_digest('open sesame')}")).status_code == 401


def test_a_digest_that_is_none_is_named() -> None:
    with pytest.raises(
        InputError, match=r"LOOPWRIGHT_API_KEYS: sha256:\.\.\. must be followed by 64 hexadecimal digits"
    ):
        environment_keys("sha256:abc")


def test_more_than_the_pace_of_a_key_is_429(app: Any) -> None:
    _, slow = app.serving.store.create_key("slow", ["predict"], 2)
    _, other = app.serving.store.create_key("other", ["predict"])
    statuses = [app.client.get("/v1/models", headers=bearer(slow)).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]
    refused = app.client.get("/v1/models", headers=bearer(slow))
    assert 1 <= int(refused.headers["Retry-After"]) <= 30
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert app.client.get("/v1/models", headers=bearer(other)).status_code == 200


def test_a_bucket_fills_evenly_and_holds_a_minute() -> None:
    now = [0.0]
    pace, key = TokenBucket(lambda: now[0]), ApiKey("k", "", frozenset())
    assert [pace.wait(key, 6) for _ in range(7)] == [0] * 6 + [10]
    now[0] = 9.5
    assert pace.wait(key, 6) == 1
    now[0] = 10.0
    assert [pace.wait(key, 6), pace.wait(key, 6)] == [0, 10]
    now[0] = 1000.0
    assert [pace.wait(key, 6) for _ in range(7)] == [0] * 6 + [10]


@pytest.fixture
def at(app: Any) -> Callable[[str], TestClient]:
    """The app as asked under an address."""
    return lambda address: TestClient(GatewayMiddleware(app.client.app.api, app.client.app.api), base_url=address)


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1:3000", 200), ("localhost:3000", 200), ("[::1]:3000", 200), ("evil.example", 403), ("10.1.2.3", 403)],
)
def test_a_foreign_name_for_this_machine_is_refused(at: Any, host: str, status: int) -> None:
    """A site whose name is made to mean 127.0.0.1 would read what the endpoint answers."""
    assert at("http://127.0.0.1:3000").get("/v1/models", headers={"Host": host}).status_code == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [("http://127.0.0.1:3000", 200), ("https://evil.example", 403), ("http://127.0.0.1:9999", 403), ("null", 403)],
)
def test_another_site_may_not_ask_without_keys(at: Any, origin: str, status: int) -> None:
    answer = at("http://127.0.0.1:3000").get("/v1/models", headers={"Origin": origin})
    assert answer.status_code == status
    assert "access-control-allow-origin" not in answer.headers


def test_named_origins_may_ask_from_a_browser(app: Any, at: Any) -> None:
    preflight = {
        "Origin": "https://ours.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    client = at("http://127.0.0.1:3000")
    closed = client.options("/v1/chat/completions", headers=preflight)
    assert "access-control-allow-origin" not in closed.headers
    app.serving.config = app.serving.config.model_copy(update={"allowed_origins": ["https://ours.example"]})
    opened = client.options("/v1/chat/completions", headers=preflight)
    assert (opened.status_code, opened.headers["access-control-allow-origin"]) == (200, "https://ours.example")
    answer = client.post("/v1/chat/completions", json=ASK, headers={"Origin": "https://ours.example"})
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://ours.example")
    other = client.post("/v1/chat/completions", json=ASK, headers={"Origin": "https://evil.example"})
    assert other.status_code == 403
    assert "access-control-allow-origin" not in other.headers


def test_a_prompt_beyond_its_bound_is_refused_before_it_is_read(app: Any) -> None:
    app.serving.config = app.serving.config.model_copy(update={"max_prompt_characters": 1000})
    refused = app.ask("x" * 1000)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert "send at most 1000 (serve.max_prompt_characters)" in refused.json()["error"]["message"]
