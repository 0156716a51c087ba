"""Who may ask: the keys of the environment and those on record, what each opens, and how often it may."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable

from components.config.params import InputError
from components.feedback.keys import ApiKey, Scope, key_digest
from components.feedback.store import Store, StoreUnavailable

REFRESH_SECONDS = 5.0
"""A key that was made or revoked meanwhile is known after so long."""
HASHED = "sha256:"
"""Before a digest that LOOPWRIGHT_API_KEYS gives instead of a key."""
_DIGEST_CHARACTERS = 64

logger = logging.getLogger("loopwright.keys")


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


def wanted_scope(method: str, path: str) -> Scope:
    """What a key must open for a request."""
    if path.rstrip("/") == "/v1/feedback":
        return "feedback" if method == "POST" else "admin"
    return "predict"
