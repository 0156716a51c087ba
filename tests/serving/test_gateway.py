"""Keys, body limit and address: what is decided before any route sees a request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from serving.http.gateway import GatewayMiddleware

ASK = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}


@pytest.fixture
def edge(local: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TestClient]:
    """The app behind an edge that was started with these keys."""

    def start(keys: str = "", base_url: str = "http://testserver") -> TestClient:
        monkeypatch.setenv("LOOPWRIGHT_API_KEYS", keys)
        api = local.client.app.api
        return TestClient(GatewayMiddleware(api, api), base_url=base_url)

    return start


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("", 401),
        ("Bearer", 401),
        ("Bearer ", 401),
        ("Bearer wrong", 401),
        ("Basic one", 401),
        ("Bearer one", 200),
        ("bearer two", 200),
        ("Bearer one,two", 401),
    ],
)
def test_every_v1_path_wants_a_key(edge: Any, header: str | None, status: int) -> None:
    headers = {} if header is None else {"Authorization": header}
    client = edge(" one, two,")
    for method, path in (("POST", "/v1/chat/completions"), ("GET", "/v1/models")):
        response = client.request(method, path, json=ASK if method == "POST" else None, headers=headers)
        assert response.status_code == status
    if status == 401:
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["WWW-Authenticate"] == "Bearer"
        assert client.get("/v1/nope", headers=headers).status_code == 401


def test_health_and_pages_want_no_key(edge: Any) -> None:
    client = edge("one")
    for path in ("/", "/livez", "/readyz", "/metrics", "/docs", "/openapi.json"):
        assert client.get(path).status_code == 200


@pytest.mark.parametrize(
    ("address", "status"),
    [("http://127.0.0.1", 200), ("http://[::1]", 200), ("http://10.1.2.3", 401), ("http://[::ffff:10.1.2.3]", 401)],
)
def test_without_keys_only_loopback_is_answered(edge: Any, address: str, status: int) -> None:
    response = edge("", address).post("/v1/chat/completions", json=ASK)
    assert response.status_code == status
    if status == 401:
        assert (
            "without LOOPWRIGHT_API_KEYS this endpoint answers on loopback only" in response.json()["error"]["message"]
        )
        assert edge("", address).get("/livez").status_code == 200
        keyed = edge("one", address).post("/v1/chat/completions", json=ASK, headers={"Authorization": "Bearer one"})
        assert keyed.status_code == 200


def test_body_at_the_limit_passes_and_beyond_is_413(edge: Any, local: Any) -> None:
    limit = local.serving.config.max_body_bytes
    empty = b'{"messages": [{"role": "user", "content": ""}], "max_tokens": 1}'
    fits = empty.replace(b'""', b'"' + b"x" * (limit - len(empty)) + b'"')
    headers = {"Content-Type": "application/json"}
    assert len(fits) == limit
    assert edge().post("/v1/chat/completions", content=fits, headers=headers).status_code == 400  # too long a prompt
    response = edge().post("/v1/chat/completions", content=fits + b" ", headers=headers)
    assert response.status_code == 413
    assert response.json()["error"]["message"] == f"body: larger than {limit} bytes; send less"


def test_chunked_body_beyond_the_limit_is_413(edge: Any, local: Any) -> None:
    limit = local.serving.config.max_body_bytes

    def endless() -> Iterator[bytes]:
        for _ in range(limit // 1000 + 2):
            yield b"x" * 1000

    response = edge().post("/v1/chat/completions", content=endless(), headers={"Content-Type": "application/json"})
    assert "content-length" not in response.request.headers
    assert response.status_code == 413


@pytest.mark.parametrize("length", ["-1", "abc", "1e3"])
def test_nonsense_content_length_is_refused(edge: Any, length: str) -> None:
    headers = {"Content-Type": "application/json", "Content-Length": length}
    assert edge().post("/v1/chat/completions", content=b"{}", headers=headers).status_code == 413


def test_refused_body_is_read_to_its_end_before_the_answer(local: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that closes on a sender in the middle of its body loses it the answer."""
    monkeypatch.setenv("LOOPWRIGHT_API_KEYS", "one")
    api = local.client.app.api
    parts = [b"x" * 500_000] * 6
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        body = parts.pop()
        return {"type": "http.request", "body": body, "more_body": bool(parts)}

    async def send(message: MutableMapping[str, Any]) -> None:
        assert not parts
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/feedback", "headers": [], "server": None}
    asyncio.run(GatewayMiddleware(api, api)(scope, receive, send))
    assert sent[0]["status"] == 401


def test_server_error_in_another_shape_is_reshaped(local: Any, tmp_path: Path) -> None:
    async def other(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 503, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"Service is not ready because", "more_body": False})

    response = TestClient(GatewayMiddleware(other, local.client.app.api)).get("/healthz")
    assert response.status_code == 503
    assert response.json()["error"]["message"] == "GET /healthz: not ready"


def test_own_routes_need_nothing_of_the_service_around_them(local: Any) -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError(scope["path"])

    api = local.client.app.api
    requests = api.state.serving.metrics.requests.labels("/v1/models", "200")
    before = requests._value.get()
    client = TestClient(GatewayMiddleware(broken, api))
    assert client.get("/v1/models").status_code == 200
    assert requests._value.get() == before + 1
    with pytest.raises(AssertionError, match="/healthz"):
        client.get("/healthz")


def test_no_schema_is_compiled_and_no_picture_read_for_a_request_without_a_place(
    local: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = local.serving.models.engine
    monkeypatch.setattr(engine, "room", 0)
    compiled: list[Any] = []
    rules = engine.agent.rules
    monkeypatch.setattr(engine.agent, "rules", lambda *options: compiled.append(options) or rules(*options))
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^[a-c]{9}x$"}}}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
    refused = local.ask("Hello", response_format=form)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    assert int(refused.headers["Retry-After"]) > 0
    assert compiled == []
    monkeypatch.undo()
    assert local.ask("Hello", max_tokens=2).status_code == 200
