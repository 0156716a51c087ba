"""ASGI middleware in front of every route: API keys, rate limit, loopback and CORS checks, body limit, draining, error
format and request metrics.

An ASGI middleware around the app under uvicorn, and around all of BentoML's service under `bentoml serve`: paths that
match no route never reach an app that is mounted there (BentoML 1.4), and our own routes need none of its layers.
"""

from __future__ import annotations

import ipaddress
import logging
import math
import os
import threading
import time
from collections.abc import Awaitable, Callable, MutableMapping
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.middleware.cors import CORSMiddleware

from components.config.params import InputError
from components.feedback.keys import ApiKey, key_digest
from components.feedback.keys import Scope as KeyScope
from components.feedback.store import Store, StoreUnavailable
from serving.http.app import ROUTERS
from serving.http.errors import error_response, store_unavailable
from serving.models.state import Serving

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

REFRESH_SECONDS = 5.0
"""A key that was made or revoked meanwhile is known after so long."""
HASHED = "sha256:"
"""Before a digest that LOOPWRIGHT_API_KEYS gives instead of a key."""
_DIGEST_CHARACTERS = 64

DRAINED_BYTES = 64 * 1024 * 1024
"""Of a body that is refused, this much is still read, so that its sender gets to read the answer."""
VOICE_DIGITS = 16
"""Of a key's digest, so many tell whose vote it is; the key itself is never stored."""
OTHER = "other"
"""The route of a path that is none of ours."""
STANDARD = {400: "bad request", 404: "no such path; see /docs", 405: "method not allowed", 503: "not ready"}

logger = logging.getLogger("loopwright.keys")


class TooLarge(Exception):
    """The body passes the limit."""


class GatewayMiddleware:
    """Wraps `app`, which is `api` or has it mounted; `api.state.serving` holds what it needs to know."""

    def __init__(self, app: App, api: FastAPI) -> None:
        self.app, self.api = app, api
        routes = [route for router in ROUTERS for route in router.routes]
        paths = ["/openapi.json", "/docs", *(route.path for route in routes if isinstance(route, APIRoute))]
        self._exact = {path for path in paths if "{" not in path}
        self._templates = {path.partition("{")[0]: path for path in paths if "{" in path}
        self._keys = Keyring(os.environ.get("LOOPWRIGHT_API_KEYS", ""))
        self._pace = TokenBucket()
        self._open_to: dict[tuple[str, ...], CORSMiddleware] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        serving: Serving = self.api.state.serving
        # Closed to the pages of other sites unless they are named: then a browser is told so.
        origins = tuple(serving.config.allowed_origins)
        if origins and origins not in self._open_to:
            self._open_to[origins] = _open_to(self._answer, origins)
        await self._open_to.get(origins, self._answer)(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        serving: Serving = self.api.state.serving
        shaped, route = _Shaped(scope, send), self._route(scope["path"])
        started = time.perf_counter()
        try:
            await self._pass(serving, route, scope, receive, shaped)
        finally:
            serving.metrics.requests.labels(route, str(shaped.status)).inc()
            serving.metrics.seconds.labels(route).observe(time.perf_counter() - started)

    async def _pass(self, serving: Serving, route: str, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = await self._refusal(serving, scope)
        receive = body = _Body(receive)
        limit = serving.config.max_body_bytes
        if refusal is None and scope["method"] in ("POST", "PUT", "PATCH", "DELETE"):
            try:
                receive = await _bounded(scope, body, limit)
            except TooLarge:
                refusal = error_response(413, f"body: larger than {limit} bytes; send less")
        if refusal is None:
            # BentoML would hand our own routes to that app too, through layers that take a millisecond.
            await (self.app if route == OTHER else self.api)(scope, receive, send)
            return
        await body.discard()
        await refusal(scope, receive, send)

    async def _refusal(self, serving: Serving, scope: Scope) -> JSONResponse | None:
        if scope["path"] != "/v1" and not scope["path"].startswith("/v1/"):
            return None
        if not self._keys.is_fresh:
            try:
                await run_in_threadpool(self._keys.refresh, serving.store)
            except StoreUnavailable as error:
                return store_unavailable(error)
        refusal = self._key_refusal(serving, scope) if self._keys else _stranger(scope, serving.config.allowed_origins)
        if refusal is None and serving.draining:
            return error_response(503, "the server is stopping; try another or later", "draining", headers=RETRY)
        return refusal

    def _key_refusal(self, serving: Serving, scope: Scope) -> JSONResponse | None:
        key = self._keys.find(_header(scope, b"authorization"))
        if key is None:
            message = "Authorization: missing or unknown key; send 'Authorization: Bearer KEY'"
            return error_response(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        scope["voice"] = f"key:{key.digest[:VOICE_DIGITS]}"
        limit = key.requests_per_minute or serving.config.requests_per_minute
        if seconds := self._pace.wait(key, limit):
            message = f"more than {limit} requests a minute with this key; try again in {seconds} s"
            return error_response(429, message, "rate_limit_exceeded", headers={"Retry-After": str(seconds)})
        return _closed(key, scope)

    def _route(self, path: str) -> str:
        """The label of a path: one of the known routes, so that a scanner cannot grow the metrics."""
        if path in self._exact:
            return path
        return next((template for start, template in self._templates.items() if path.startswith(start)), OTHER)


RETRY = {"Retry-After": "1"}


def _closed(key: ApiKey, scope: Scope) -> JSONResponse | None:
    """A key opens what its scopes say."""
    wanted = wanted_scope(scope["method"], scope["path"])
    if key.opens(wanted):
        return None
    message = f"this key opens {', '.join(sorted(key.scopes))}; {scope['method']} {scope['path']} wants {wanted}"
    return error_response(403, message, "insufficient_scope")


def _stranger(scope: Scope, origins: list[str]) -> JSONResponse | None:
    """Without keys whoever sits at this machine may ask, and nobody else: no other host, no page of another site.

    A page can make a browser send requests to a loopback address, and make a name of its own mean one.
    """
    here = _on_loopback((scope.get("server") or ("", None))[0])
    if here is False:
        message = "without LOOPWRIGHT_API_KEYS this endpoint answers on loopback only; set it where the server runs"
        return error_response(401, message, "no_api_keys")
    host, origin = (_header(scope, name).decode("latin-1") for name in (b"host", b"origin"))
    named = urlsplit(f"//{host}").hostname or ""
    if here and named != "localhost" and not _on_loopback(named):
        message = f"Host: {host!r} is no name of this machine; without LOOPWRIGHT_API_KEYS ask http://127.0.0.1"
        return error_response(403, message, "foreign_host")
    if origin and origin not in origins and urlsplit(origin).netloc != host:
        message = f"Origin: {origin!r} is another site; name it in serve.allowed_origins, or set LOOPWRIGHT_API_KEYS"
        return error_response(403, message, "foreign_origin")
    return None


def _open_to(app: App, origins: tuple[str, ...]) -> CORSMiddleware:
    headers = ["Authorization", "Content-Type", "Idempotency-Key"]
    return CORSMiddleware(
        app, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=headers, expose_headers=["Retry-After"]
    )


def _header(scope: Scope, name: bytes) -> bytes:
    value: bytes = next((value for key, value in scope["headers"] if key == name), b"")
    return value


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
    size = 0
    while not body.ended:
        parts.append((await body()).get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise TooLarge
    whole: list[Message] = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]

    async def again() -> Message:
        return whole.pop() if whole else await body()

    return again


@lru_cache(maxsize=16)
def _on_loopback(host: str) -> bool | None:
    """Whether an address is a loopback one; None for what is no address: a name, a socket file, a test."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def environment_keys(given: str) -> list[ApiKey]:
    """The keys of LOOPWRIGHT_API_KEYS, by commas apart, each written out or as `sha256:DIGEST`; they open everything.

    Raises: InputError for a digest that is none.
    """
    digests = []
    for entry in filter(None, (entry.strip() for entry in given.split(","))):
        digest = entry.removeprefix(HASHED).lower() if entry.startswith(HASHED) else key_digest(entry)
        if len(digest) != _DIGEST_CHARACTERS or set(digest) - set("0123456789abcdef"):
            raise InputError(
                f"LOOPWRIGHT_API_KEYS: {HASHED}... must be followed by {_DIGEST_CHARACTERS} hexadecimal digits"
            )
        digests.append(digest)
    return [ApiKey(f"environment-{digest[:12]}", digest, frozenset({"admin"})) for digest in digests]


def has_keys(given: str, store: Callable[[], Store | None]) -> bool:
    """Whether there is any key at all; the store is only opened where the environment has none."""
    if environment_keys(given):
        return True
    opened = store()
    if opened is None:
        return False
    try:
        return bool(opened.open_keys())
    finally:
        opened.close()


class Keyring:
    """Every key that opens now. Keys are compared by digest, whose leaks in time tell nothing about a key."""

    def __init__(self, given: str) -> None:
        self._given = environment_keys(given)
        self._known = {key.digest: key for key in self._given}
        self._read_at: float | None = None
        self._reading = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._known)

    @property
    def is_fresh(self) -> bool:
        return self._read_at is not None and time.monotonic() - self._read_at < REFRESH_SECONDS

    def refresh(self, store: Store) -> None:
        """Read what is on record, unless another thread just did.

        Raises: StoreUnavailable the first time: who may come in is then unknown.
        """
        with self._reading:
            if self.is_fresh:
                return
            try:
                recorded = store.open_keys()
            except StoreUnavailable as error:
                if self._read_at is None:
                    raise
                logger.warning("keys stay as they were: %s", error)
                return
            self._known = {key.digest: key for key in (*recorded, *self._given)}
            self._read_at = time.monotonic()

    def find(self, authorization: bytes) -> ApiKey | None:
        """The key of an Authorization header."""
        scheme, _, given = authorization.partition(b" ")
        return self._known.get(key_digest(given.strip())) if scheme.lower() == b"bearer" else None


class TokenBucket:
    """How often each key may ask: a bucket that holds a minute's requests and fills evenly."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left: dict[str, tuple[float, float]] = {}
        """By key: requests left, and when that was."""

    def wait(self, key: ApiKey, per_minute: int) -> int:
        """0 where the request may go on, and is counted; else whole seconds until one may."""
        now = self._clock()
        left, then = self._left.get(key.id, (float(per_minute), now))
        left = min(per_minute, left + (now - then) * per_minute / 60)
        allowed = left >= 1
        self._left[key.id] = (left - 1 if allowed else left, now)
        return 0 if allowed else max(1, math.ceil((1 - left) * 60 / per_minute))


def wanted_scope(method: str, path: str) -> KeyScope:
    """What a key must open for a request."""
    if path.rstrip("/") == "/v1/feedback":
        return "feedback" if method == "POST" else "admin"
    return "predict"
