"""The API keys that open the endpoint, and how often each may be used."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from fastapi.concurrency import run_in_threadpool

from components.config.params import InputError
from components.feedback.keys import ApiKey, key_digest
from components.feedback.store import Store, StoreUnavailable, has_store

REFRESH_SECONDS = 5.0
"""Time after which a key that was created or revoked meanwhile takes effect."""
HASHED = "sha256:"
"""Prefix of a digest that LOOPWRIGHT_API_KEYS holds instead of a key."""
DIGEST_CHARACTERS = 64

logger = logging.getLogger("loopwright.keys")


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


class RateLimit:
    """Requests per minute of each key: counted in a database that replicas share, else in this process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._bucket = clock, TokenBucket(clock)
        self._refused: dict[str, float] = {}
        """By key: time before which no replica allows it a request, so that a refusal costs the database nothing."""

    async def wait(self, store: Store, key: ApiKey, per_minute: int) -> int:
        """0 where the request is allowed, and counts it; else whole seconds until the next is allowed.

        Raises: StoreUnavailable.
        """
        if not store.is_shared:
            return self._bucket.wait(key, per_minute)
        seconds = self._refused.get(key.id, 0.0) - self._clock()
        if seconds <= 0:
            seconds = await run_in_threadpool(store.take_request, key.id, per_minute)
            self._refused[key.id] = self._clock() + seconds
        return math.ceil(seconds)


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
