"""Which model answers: loads the version an alias points at, and swaps when the alias moves.

The new model is loaded and warmed beside the old one, then one reference changes. A request
keeps the engine it began with; a retired engine ends when its last request does.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from components.config import InputError
from serving.engine import Engine

CLOSE_SECONDS = 2.0
"""A load in progress is not waited for longer; it dies with the process."""

logger = logging.getLogger("loopwright.follow")


class Version(Protocol):
    """A model version, from the registry or out of a Bento; its text is `NAME/VERSION`."""

    @property
    def folder(self) -> Path: ...


@dataclass(frozen=True)
class Bundled:
    """The model version that came with the Bento."""

    folder: Path
    facts: Mapping[str, Any]
    """What the registry knew of it when the Bento was built: name, version, run_id, tags, metrics."""

    def __str__(self) -> str:
        return f"{self.facts['name']}/{self.facts['version']}"


class Follower:
    """Keeps `engine` at what `resolve` finds for `spec`, looking again every `seconds` (None: loads once)."""

    def __init__(
        self,
        spec: str,
        resolve: Callable[[str], Version],
        load: Callable[[Path, str], Engine],
        seconds: float | None,
    ) -> None:
        self.spec = spec
        """`NAME@ALIAS` or `NAME/VERSION`."""
        self._resolve, self._load, self._seconds = resolve, load, seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follow", daemon=True)
        self._refused = ""
        """The version that could not be loaded, so as not to try it at every look."""
        self.engine: Engine | None = None
        """The model that answers now; None while the first one loads."""
        self.first = threading.Event()
        """Set when the first load is over, well or not."""
        self.error: Exception | None = None
        """Why there is no engine, when the first load failed."""
        self.served: set[str] = set()
        """Every `NAME/VERSION` that answered since this process started."""

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)
        if self.engine is not None:
            self.engine.close()

    def answers_to(self, model: str | None) -> bool:
        """Whether a request for `model` is for us: the name, the alias we follow, or a version that we served.

        A version stays known after a swap, so that a client which pinned what `/v1/models` listed
        is answered by its successor (named in the answer) instead of being dropped.
        """
        name = self.spec.partition("@")[0].partition("/")[0]
        return model in (None, name, self.spec) or model in self.served

    def _follow(self) -> None:
        while not self._stop.is_set():
            try:
                self.look()
            except InputError as error:
                self._failed(error)
            except Exception as error:
                # The registry may be away for a while; what is loaded goes on answering.
                logger.exception("looking for a new model failed")
                self._failed(error)
            self.first.set()
            if self._seconds is None or self._stop.wait(self._seconds):
                return

    def _failed(self, error: Exception) -> None:
        if self.engine is None:
            self.error = error
        elif isinstance(error, InputError):
            logger.warning("%s stays: %s", self.engine.name, error)

    def look(self) -> None:
        """Load and switch to the version that is named now, if it is another one."""
        version = self._resolve(self.spec)
        name = str(version)
        old = self.engine
        if name == self._refused or (old is not None and old.name == name):
            return
        try:
            engine = self._load(version.folder, name)
        except InputError:
            self._refused = name
            raise
        self.served.add(name)
        self.engine, self.error, self._refused = engine, None, ""
        logger.info("%s answers%s", name, f", {old.name} retires" if old else "")
        if old is not None:
            old.retire()


def describe(follower: Follower) -> list[dict[str, Any]]:
    """The models of `GET /v1/models`."""
    engine = follower.engine
    if engine is None:
        return []
    name, _, version = engine.name.partition("/")
    return [
        {
            "id": engine.name,
            "object": "model",
            "created": engine.loaded,
            "owned_by": "loopwright",
            "name": name,
            "version": version,
            "context_length": engine.agent.context_len,
        }
    ]
