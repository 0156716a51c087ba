"""ASGI middleware in front of every route: API keys, rate limit, loopback and CORS checks, body limit, draining, error
format and request metrics.

An ASGI middleware around the app under uvicorn, and around all of BentoML's service under `bentoml serve`: paths that
match no route never reach an app that is mounted there (BentoML 1.4), and our own routes need none of its layers.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from contextlib import closing
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from components.config.params import InputError
from components.feedback.keys import ApiKey, key_digest
from components.feedback.keys import Scope as KeyScope
from components.feedback.store import Store, StoreUnavailable, has_store
from serving.http.errors import error_response, store_unavailable
from serving.models.state import Serving

REFRESH_SECONDS = 5.0
"""Time after which a key that was created or revoked meanwhile takes effect."""
HASHED = "sha256:"
"""Prefix of a digest that LOOPWRIGHT_API_KEYS holds instead of a key."""
DIGEST_CHARACTERS = 64
DISCARDED_BYTES = 64 * 1024 * 1024
"""Bytes read of a rejected body, so that its sender gets to read the response."""
USER_DIGITS = 16
"""Digits of a key's digest that identify whose feedback an item is; the key itself is never stored."""
CHAT = "/v1/chat/completions"
OVERVIEW = "/v1/registry"
OTHER = "other"
"""Metrics label of a path that matches no route."""
REASONS = {400: "bad request", 404: "no such path; see /docs", 405: "method not allowed", 503: "not ready"}

logger = logging.getLogger("loopwright.keys")


class BodyTooLarge(Exception):
    """The body exceeds the limit."""


class BodiesTooLarge(Exception):
    """The bodies of all requests together exceed the limit."""


class GatewayMiddleware:
    """Wraps `app`, which is `api` or mounts it; `api.state.serving` holds the server's state."""

    def __init__(self, app: ASGIApp, api: FastAPI) -> None:
        self.app, self.api = app, api
        paths = ["/openapi.json", "/docs", *(route.path for route in api.routes if isinstance(route, APIRoute))]
        self._exact = {path for path in paths if "{" not in path}
        self._templates = {path.partition("{")[0]: path for path in paths if "{" in path}
        self._keys = Keyring(os.environ.get("LOOPWRIGHT_API_KEYS", ""))
        self._rate_limit = TokenBucket()
        self._held = _HeldBytes()
        self._cors: dict[tuple[str, ...], CORSMiddleware] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        serving: Serving = self.api.state.serving
        # Pages of other sites are refused unless they are allowed: then the browser needs the CORS headers.
        origins = tuple(serving.config.allowed_origins)
        if origins and origins not in self._cors:
            self._cors[origins] = CORSMiddleware(
                self._respond,
                allow_origins=origins,
                allow_methods=["GET", "POST"],
                allow_headers=["Authorization", "Content-Type", "Idempotency-Key"],
                expose_headers=["Retry-After"],
            )
        await self._cors.get(origins, self._respond)(scope, receive, send)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        serving: Serving = self.api.state.serving
        response, route = _ResponseFormatter(scope, receive, send), self._route(scope["path"])
        started = time.perf_counter()
        try:
            await self._forward(serving, route, scope, receive, response)
        finally:
            serving.metrics.requests.labels(route, str(response.status)).inc()
            serving.metrics.seconds.labels(route).observe(time.perf_counter() - started)

    async def _forward(self, serving: Serving, route: str, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = await self._refusal(serving, scope)
        body = _Body(receive, self._held, serving.config.max_held_bytes)
        seconds = serving.config.body_seconds
        try:
            try:
                async with asyncio.timeout(seconds):
                    receive, refusal = await self._read(body, scope, _max_body_bytes(serving, route), refusal)
            except TimeoutError:
                message = f"body: not here within {seconds:g} s (serve.body_seconds); send it at once"
                refusal = error_response(408, message, "timeout", headers={"Connection": "close"})
            if refusal is None:
                # BentoML would route to the mounted app too, through layers that take a millisecond.
                await (self.app if route == OTHER else self.api)(scope, receive, send)
            else:
                await refusal(scope, receive, send)
        finally:
            body.release()

    async def _read(
        self, body: _Body, scope: Scope, limit: int, refusal: JSONResponse | None
    ) -> tuple[Receive, JSONResponse | None]:
        """Read the body, and discard it where the request is refused; returns what replays it, and the refusal."""
        receive: Receive = body
        if refusal is None and scope["method"] in ("POST", "PUT", "PATCH", "DELETE"):
            try:
                receive = await body.buffered(scope, limit)
            except BodyTooLarge:
                refusal = error_response(413, f"body: larger than {limit} bytes; send less")
            except BodiesTooLarge:
                message = "the bodies of all requests are too large together; try again in 1 s"
                refusal = error_response(503, message, "overloaded", headers={"Retry-After": "1"})
        if refusal is not None:
            await body.discard()
        return receive, refusal

    async def _refusal(self, serving: Serving, scope: Scope) -> JSONResponse | None:
        if scope["path"] != "/v1" and not scope["path"].startswith("/v1/"):
            return None
        if not self._keys.is_fresh:
            try:
                await run_in_threadpool(self._keys.refresh, serving.store)
            except StoreUnavailable as error:
                return store_unavailable(error)
        refusal = (
            self._key_refusal(serving, scope) if self._keys else _keyless_refusal(scope, serving.config.allowed_origins)
        )
        if refusal is None and serving.draining:
            message = "the server is stopping; try another or later"
            return error_response(503, message, "draining", headers={"Retry-After": "1"})
        return refusal

    def _key_refusal(self, serving: Serving, scope: Scope) -> JSONResponse | None:
        key = self._keys.find(_header(scope, b"authorization"))
        if key is None:
            message = "Authorization: missing or unknown key; send 'Authorization: Bearer KEY'"
            return error_response(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        scope["api_key"], scope["api_key_user"] = key, f"key:{key.digest[:USER_DIGITS]}"
        limit = key.requests_per_minute or serving.config.requests_per_minute
        if seconds := self._rate_limit.wait(key, limit):
            message = f"more than {limit} requests a minute with this key; try again in {seconds} s"
            return error_response(429, message, "rate_limit_exceeded", headers={"Retry-After": str(seconds)})
        method, path = scope["method"], scope["path"]
        required: KeyScope = "predict"
        if path.rstrip("/") == "/v1/feedback":
            required = "feedback" if method == "POST" else "admin"
        elif path == OVERVIEW or path.startswith(f"{OVERVIEW}/"):
            required = "admin"  # it tells of the records of all owners
        if key.opens(required):
            return None
        message = f"this key has the scopes {', '.join(sorted(key.scopes))}; {method} {path} requires {required}"
        return error_response(403, message, "insufficient_scope")

    def _route(self, path: str) -> str:
        """The metrics label of a path: a known route or "other", so that a scanner cannot create labels."""
        if path in self._exact:
            return path
        return next((template for start, template in self._templates.items() if path.startswith(start)), OTHER)


def _keyless_refusal(scope: Scope, origins: list[str]) -> JSONResponse | None:
    """Without keys, only this machine may send requests: no other host, no page of another site.

    A page can make a browser send requests to a loopback address, and resolve a host name of its own to it.
    """
    loopback = _is_loopback((scope.get("server") or ("", None))[0])
    if loopback is False:
        message = "without LOOPWRIGHT_API_KEYS this endpoint answers on loopback only; set it where the server runs"
        return error_response(401, message, "no_api_keys")
    host, origin = (_header(scope, name).decode("latin-1") for name in (b"host", b"origin"))
    hostname = urlsplit(f"//{host}").hostname or ""
    if loopback and hostname != "localhost" and not _is_loopback(hostname):
        message = f"Host: {host!r} is not this machine; without LOOPWRIGHT_API_KEYS send requests to http://127.0.0.1"
        return error_response(403, message, "foreign_host")
    if origin and origin not in origins and urlsplit(origin).netloc != host:
        message = f"Origin: {origin!r} is another site; add it to serve.allowed_origins, or set LOOPWRIGHT_API_KEYS"
        return error_response(403, message, "foreign_origin")
    return None


def _max_body_bytes(serving: Serving, route: str) -> int:
    """A chat may hold pictures where a model sees them."""
    if route == CHAT and serving.sees_pictures:
        return serving.config.max_picture_body_bytes
    return serving.config.max_body_bytes


def _header(scope: Scope, name: bytes) -> bytes:
    value: bytes = next((value for key, value in scope["headers"] if key == name), b"")
    return value


class _ResponseFormatter:
    """Sends a response on; an error in another format is replaced by one in OpenAI's."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._replacement: JSONResponse | None = None
        self.status = 500
        """The response's status; 500 when the app fails before it responds."""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            media_type = next((value for name, value in message["headers"] if name.lower() == b"content-type"), b"")
            if self.status >= 400 and not media_type.startswith(b"application/json"):
                reason = REASONS.get(self.status, "the request failed")
                text = f"{self._scope['method']} {self._scope['path']}: {reason}"
                self._replacement = error_response(self.status, text)
                return
        if self._replacement is None:
            await self._send(message)
        elif not message.get("more_body"):
            await self._replacement(self._scope, self._receive, self._send)


class _HeldBytes:
    """Bytes of the bodies that are held now."""

    count = 0


class _Body:
    """A `receive` that records whether the body has ended; counts what it holds until it is released."""

    def __init__(self, receive: Receive, held: _HeldBytes, max_held: int) -> None:
        self._receive, self._held, self._max_held = receive, held, max_held
        self._size = 0
        self.ended = False

    async def __call__(self) -> Message:
        message = await self._receive()
        self.ended = message["type"] == "http.disconnect" or not message.get("more_body", False)
        return message

    async def buffered(self, scope: Scope, limit: int) -> Receive:
        """Read the body, at most `limit` bytes, and return a `receive` that replays it.

        Raises: BodyTooLarge, BodiesTooLarge.
        """
        declared = _header(scope, b"content-length") or b"0"
        if not declared.isdigit() or int(declared) > limit:
            raise BodyTooLarge
        content = bytearray()
        while not self.ended:
            piece = (await self()).get("body", b"")
            self._size += len(piece)
            self._held.count += len(piece)
            if self._held.count > self._max_held:
                raise BodiesTooLarge
            content += piece
            if len(content) > limit:
                raise BodyTooLarge
        buffered: list[Message] = [{"type": "http.request", "body": bytes(content), "more_body": False}]

        async def replay() -> Message:
            return buffered.pop() if buffered else await self()

        return replay

    def release(self) -> None:
        """Count it no more."""
        self._held.count -= self._size
        self._size = 0

    async def discard(self) -> None:
        """Read the rest of a rejected body: a connection closed while its sender writes would lose the response."""
        size = 0
        while not self.ended and size < DISCARDED_BYTES:
            size += len((await self()).get("body", b""))


@lru_cache(maxsize=16)
def _is_loopback(host: str) -> bool | None:
    """Whether an address is a loopback address; None for a host name, a socket file or a test client."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def environment_keys(variable: str) -> list[ApiKey]:
    """The keys of LOOPWRIGHT_API_KEYS, comma-separated, each in plain text or as `sha256:DIGEST`; all have scope admin.

    Raises: InputError for an invalid digest.
    """
    digests = []
    for entry in filter(None, (entry.strip() for entry in variable.split(","))):
        digest = entry.removeprefix(HASHED).lower() if entry.startswith(HASHED) else key_digest(entry)
        if len(digest) != DIGEST_CHARACTERS or set(digest) - set("0123456789abcdef"):
            raise InputError(
                f"LOOPWRIGHT_API_KEYS: {HASHED}... must be followed by {DIGEST_CHARACTERS} hexadecimal digits"
            )
        digests.append(digest)
    names = {digest: f"environment-{digest[:12]}" for digest in digests}
    return [ApiKey(name, digest, frozenset({"admin"}), owner=name) for digest, name in names.items()]


def has_keys(variable: str, home: Path) -> bool:
    """Whether any key exists; the state folder's store is opened only where LOOPWRIGHT_API_KEYS has none."""
    if environment_keys(variable):
        return True
    if not has_store(home):
        return False
    with closing(Store.of(home)) as store:
        return bool(store.open_keys())


class Keyring:
    """All active keys, looked up by digest: what its timing leaks reveals nothing of a key."""

    def __init__(self, variable: str) -> None:
        self._environment = environment_keys(variable)
        self._by_digest = {key.digest: key for key in self._environment}
        self._refreshed: float | None = None
        self._refreshing = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._by_digest)

    @property
    def is_fresh(self) -> bool:
        return self._refreshed is not None and time.monotonic() - self._refreshed < REFRESH_SECONDS

    def refresh(self, store: Store) -> None:
        """Read the store's keys, unless another thread just did.

        Raises: StoreUnavailable the first time: the valid keys are unknown then.
        """
        with self._refreshing:
            if self.is_fresh:
                return
            try:
                stored = store.open_keys()
            except StoreUnavailable as error:
                if self._refreshed is None:
                    raise
                logger.warning("keys not refreshed: %s", error)
                return
            self._by_digest = {key.digest: key for key in (*stored, *self._environment)}
            self._refreshed = time.monotonic()

    def find(self, authorization: bytes) -> ApiKey | None:
        scheme, _, token = authorization.partition(b" ")
        key = self._by_digest.get(key_digest(token.strip())) if scheme.lower() == b"bearer" else None
        return None if key is None or (key.expires is not None and key.expires <= time.time()) else key


class TokenBucket:
    """Rate limit per key: a bucket that holds a minute's requests and refills continuously."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}
        """By key: requests left, and the time of that count."""

    def wait(self, key: ApiKey, per_minute: int) -> int:
        """0 where the request is allowed, and counts it; else whole seconds until the next is allowed."""
        now = self._clock()
        left, then = self._buckets.get(key.id, (float(per_minute), now))
        left = min(per_minute, left + (now - then) * per_minute / 60)
        allowed = left >= 1
        self._buckets[key.id] = (left - 1 if allowed else left, now)
        return 0 if allowed else max(1, math.ceil((1 - left) * 60 / per_minute))
