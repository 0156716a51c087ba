"""This endpoint among the replicas that share its database: its sign of life, and what the others have loaded."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress

from components.feedback.store import Store, StoreUnavailable

BEAT_SECONDS = 1.0
"""Interval of the signs of life, and of the check that the database can be written."""
STALE_SECONDS = 5.0
"""Time without a successful write after which the database counts as away, also where the write has not failed yet."""
HUNG_SECONDS = 15.0
"""Time without an answer after which what waits for the database fails, as after an outage of that length."""

logger = logging.getLogger("loopwright.replicas")


def refused(version: str) -> str:
    """How a replica announces a version that it refused for itself."""
    return f"refused {version}"


class Replica:
    """Announces the models of this process every second; that the write succeeds says that answers can be recorded."""

    def __init__(self, store: Store, models: Callable[[], Iterable[str]]) -> None:
        """`models`: the specs that this process follows, the versions that it has loaded, and `refused` ones."""
        self.id = f"{socket.gethostname()[:24]}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._store, self._models = store, models
        self._others: list[frozenset[str]] = []
        self._recorded, self._failed = float("-inf"), False
        self._asked: float | None = None
        """By `time.monotonic()`: when the write began that has not ended."""
        self._stop, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._announce_repeatedly, name="replica", daemon=True)

    def start(self) -> None:
        if self._store.is_shared:
            threading.Thread(target=self._watch_store, name="replica-watch", daemon=True).start()
        self._announce()
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(BEAT_SECONDS)
        self._asked = time.monotonic()
        with suppress(StoreUnavailable):
            self._store.leave(self.id)
        self._ended.set()

    @property
    def can_record(self) -> bool:
        """Whether the database could be written just now."""
        return not self._failed and time.monotonic() - self._recorded < STALE_SECONDS

    def is_everywhere(self, spec: str, version: str) -> bool:
        """Whether every running replica that follows a spec has loaded this version, or refused it for itself."""
        decided = {version, refused(version)}
        return all(decided & models for models in self._others if spec in models)

    def loaded_elsewhere(self, spec: str) -> set[str]:
        """The versions that other running replicas which follow a spec have loaded."""
        name = spec.partition("@")[0]
        loaded = set().union(*(models for models in self._others if spec in models))
        return {version for version in loaded if version.startswith(f"{name}/")}

    def _announce_repeatedly(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            self._announce()

    def _watch_store(self) -> None:
        """A server that hangs answers neither this replica nor those who wait for it: they would wait for ever."""
        while not self._ended.wait(BEAT_SECONDS):
            asked = self._asked
            if asked is not None and time.monotonic() - asked > HUNG_SECONDS:
                self._store.give_up()

    def _announce(self) -> None:
        self._asked = time.monotonic()
        try:
            replicas = self._store.announce(self.id, sorted(self._models()))
        except StoreUnavailable as error:
            if not self._failed:
                logger.error("not ready: %s", error)
            self._failed = True
            return
        except Exception:  # an error of ours: said once, and not ready until the next success
            if not self._failed:
                logger.exception("not ready: the database cannot be written")
            self._failed = True
            return
        finally:
            self._asked = None
        if self._failed:
            logger.info("the database can be written again")
        self._others = [models for name, models in replicas.items() if name != self.id]
        self._recorded, self._failed = time.monotonic(), False
