"""What every request passes before any route: keys, body limit, draining; and on the way out error shape and counts.

An ASGI middleware on the BentoML service rather than on the mounted app, because paths that
match no route never reach that app (BentoML 1.4).
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from serving.api import ROUTERS, Serving
from serving.errors import error_response

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

DRAINED_BYTES = 64 * 1024 * 1024
"""Of a body that is refused, this much is still read, so that its sender gets to read the answer."""
VOICE_DIGITS = 16
"""Of a key's digest, so many tell whose vote it is; the key itself is never stored."""
STANDARD = {400: "bad request", 404: "no such path; see /docs", 405: "method not allowed", 503: "not ready"}


class TooLarge(Exception):
    """The body passes the limit."""


class Edge:
    """Wraps the whole service; `api.state.serving` holds what it needs to know."""

    def __init__(self, app: App, api: FastAPI) -> None:
        self.app, self.api = app, api
        routes = [route for router in ROUTERS for route in router.routes]
        paths = ["/openapi.json", *(route.path for route in routes if isinstance(route, APIRoute))]
        self._exact = {path for path in paths if "{" not in path}
        self._templates = {path.partition("{")[0]: path for path in paths if "{" in path}
        self._keys = [
            key.strip().encode() for key in os.environ.get("LOOPWRIGHT_API_KEYS", "").split(",") if key.strip()
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        serving: Serving = self.api.state.serving
        shaped = _Shaped(scope, send)
        started = time.perf_counter()
        try:
            await self._pass(serving, scope, receive, shaped)
        finally:
            route = self._route(scope["path"])
            serving.metrics.requests.labels(route, str(shaped.status)).inc()
            serving.metrics.seconds.labels(route).observe(time.perf_counter() - started)

    async def _pass(self, serving: Serving, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(serving, scope)
        receive = body = _Body(receive)
        limit = serving.config.max_body_bytes
        if refusal is None and scope["method"] in ("POST", "PUT", "PATCH", "DELETE"):
            try:
                receive = await _bounded(scope, body, limit)
            except TooLarge:
                refusal = error_response(413, f"body: larger than {limit} bytes; send less")
        if refusal is None:
            await self.app(scope, receive, send)
            return
        await body.discard()
        await refusal(scope, receive, send)

    def _refusal(self, serving: Serving, scope: Scope) -> JSONResponse | None:
        if scope["path"] != "/v1" and not scope["path"].startswith("/v1/"):
            return None
        if not self._keys and not _on_loopback(scope):
            message = "without LOOPWRIGHT_API_KEYS this endpoint answers on loopback only; set it where the server runs"
            return error_response(401, message, "no_api_keys")
        key = self._key(scope)
        if self._keys and key is None:
            message = "Authorization: missing or unknown key; send 'Authorization: Bearer KEY'"
            return error_response(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if key is not None:
            scope["voice"] = f"key:{hashlib.sha256(key).hexdigest()[:VOICE_DIGITS]}"
        if serving.draining:
            return error_response(503, "the server is stopping; try another or later", "draining", headers=RETRY)
        return None

    def _key(self, scope: Scope) -> bytes | None:
        """The known key that was presented."""
        header = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, given = header.partition(b" ")
        # Every key is compared, each in constant time: timing tells nothing about any of them.
        same = [hmac.compare_digest(given.strip(), key) for key in self._keys]
        return self._keys[same.index(True)] if scheme.lower() == b"bearer" and any(same) else None

    def _route(self, path: str) -> str:
        """The label of a path: one of the known routes, so that a scanner cannot grow the metrics."""
        if path in self._exact:
            return path
        return next((template for start, template in self._templates.items() if path.startswith(start)), "other")


RETRY = {"Retry-After": "1"}


class _Shaped:
    """Sends a response on, in OpenAI's shape where it is an error in another one."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope, self._send = scope, send
        self._replaced: JSONResponse | None = None
        self.status = 500
        """What was answered; 500 when the app broke off before answering."""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            kind = next((value for name, value in message["headers"] if name.lower() == b"content-type"), b"")
            if self.status >= 400 and not kind.startswith(b"application/json"):
                said = STANDARD.get(self.status, "the request failed")
                text = f"{self._scope['method']} {self._scope['path']}: {said}"
                self._replaced = error_response(self.status, text)
                return
        if self._replaced is None:
            await self._send(message)
        elif not message.get("more_body"):
            await self._replaced(self._scope, _nothing, self._send)


class _Body:
    """The `receive` of a request that knows whether its body has come to its end."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.ended = False

    async def __call__(self) -> Message:
        message = await self._receive()
        self.ended = message["type"] == "http.disconnect" or not message.get("more_body", False)
        return message

    async def discard(self) -> None:
        """Read what is left of a refused body: closing on a sender that still writes would lose it the answer."""
        read = 0
        while not self.ended and read < DRAINED_BYTES:
            read += len((await self()).get("body", b""))


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


async def _bounded(scope: Scope, body: _Body, limit: int) -> Receive:
    """Read the body, at most `limit` bytes of it, and return a `receive` that gives it again.

    Raises: TooLarge.
    """
    declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    if not declared.isdigit() or int(declared) > limit:
        raise TooLarge
    parts: list[bytes] = []
    while not body.ended:
        parts.append((await body()).get("body", b""))
        if sum(map(len, parts)) > limit:
            raise TooLarge
    whole: list[Message] = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]

    async def again() -> Message:
        return whole.pop() if whole else await body()

    return again


def _on_loopback(scope: Scope) -> bool:
    """Whether the connection came in on a loopback address (or on none: a socket file, a test)."""
    host = (scope.get("server") or ("", None))[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return True
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
