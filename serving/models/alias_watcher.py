"""Alias watcher: loads the versions that a source's aliases point at, and swaps them when an alias moves.

A new model is loaded, warmed up and smoke-tested beside the old one, then one reference changes. A request keeps the
model it began with. The old model stays loaded until the new one passes its smoke test in service, else it is restored;
then it is retired and closes with its last request.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from components.config.errors import InputError, Unavailable
from components.models.devices import threads_for, use_threads
from serving.engine.backend import (
    Backend,
    BackendNotReady,
    BackendRetired,
    BackendUnavailable,
    Completion,
    Event,
    Failure,
    GenerationRequest,
)
from serving.engine.classifier_worker import ClassifierWorker
from serving.models.versions import Source, Version

CLOSE_SECONDS = 2.0
"""Longest wait for a load in progress when the server stops; its thread is a daemon."""
FULL_CHECK_SECONDS = 30.0
"""Interval at which the source is resolved again even if its version token has not changed."""
QUESTION = "Hello"
"""Smoke question of a version that has none of its own."""
SMOKE_SECONDS = 60.0
"""Longest wait for a smoke test's answer and the slot it needs."""
Role = Literal["champion", "challenger", "former"]

logger = logging.getLogger("loopwright.follow")


M = TypeVar("M", bound=ClassifierWorker | Backend)
"""A loaded model."""


class ModelRejected(InputError):
    """A version that cannot be loaded, or fails its smoke test."""


@dataclass(frozen=True)
class Fault:
    """Why a version fails its smoke test."""

    reason: str
    temporary: bool = False
    """The server that runs it cannot answer now, which says nothing of the version."""


@dataclass(frozen=True)
class ServingModels(Generic[M]):
    """The models that answer; replaced as a whole, so that each request sees one consistent pair."""

    champion: M | None = None
    """None until the first load is complete."""
    challenger: M | None = None


class AliasWatcher(Generic[M]):
    """Keeps `serving_models` at the versions that `source` names for `spec`, polling every `seconds` (None: once)."""

    def __init__(
        self,
        spec: str,
        source: Source,
        load: Callable[[Path, str], M],
        seconds: float | None,
        share: float = 0.0,
    ) -> None:
        self.spec = spec
        """`NAME@ALIAS` or `NAME/VERSION`."""
        self.name = spec.partition("@")[0].partition("/")[0]
        self._source, self._load, self._seconds, self._share = source, load, seconds, share
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch_source, name="follow", daemon=True)
        self._rejected: set[str] = set()
        """Versions that are not loaded again."""
        self._retry_challenger = False
        """The challenger failed for a reason that may pass."""
        self._unreported: dict[str, tuple[Version, str]] = {}
        """Failed versions that the registry does not know of yet, with the reason."""
        self._retiring: list[M] = []
        self._etag: object = None
        """The source's version token at the last update; None where that has to be repeated."""
        self._warned = ""
        """The last warning, which is not repeated at each attempt."""
        self._next_check = 0.0
        """By `time.monotonic()`: time of the next update whatever the version token."""
        self.serving_models: ServingModels[M] = ServingModels()
        self.first = threading.Event()
        """Set after the first load, successful or not."""
        self.error: Exception | None = None
        """Error of the first load."""
        self.served: set[str] = set()
        """Every `NAME/VERSION` that has answered since this process started."""

    @property
    def engine(self) -> M | None:
        """The champion; None until the first load is complete."""
        return self.serving_models.champion

    @property
    def engines(self) -> list[M]:
        """All models that may still be answering."""
        models = self.serving_models
        return [engine for engine in (models.champion, models.challenger, *self._retiring) if engine is not None]

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)
        engines, self.serving_models = self.engines, ServingModels()
        for engine in engines:
            engine.close()

    def answers_to(self, model: str | None) -> bool:
        """Whether `model` is this watcher's: its name, its spec, or a version that it has served.

        A version remains valid after a swap, so that a client which pinned an id of `/v1/models` is answered by its
        successor (named in the answer) instead of refused.
        """
        challenged = self.serving_models.challenger is not None and model == f"{self.name}@challenger"
        return challenged or model in (None, self.name, self.spec) or model in self.served

    def choose(self, model: str | None, user: str) -> M | None:
        """The model that answers a user's request for `model`; None where `answers_to` is false, or none is loaded.

        The challenger gets its share of the users whose requests name no version: the same users for as long as the
        challenger stays the same.
        """
        models = self.serving_models
        if models.challenger is not None:
            if model in (models.challenger.name, f"{self.name}@challenger"):
                return models.challenger
            if model in (None, self.name) and _bucket(models.challenger.name, user) < self._share:
                return models.challenger
        return models.champion if self.answers_to(model) else None

    def role(self, model: str) -> Role:
        models = self.serving_models
        if models.challenger is not None and model == models.challenger.name:
            return "challenger"
        return "champion" if models.champion is not None and model == models.champion.name else "former"

    def _watch_source(self) -> None:
        while not self._stop.is_set():
            etag = self._source.etag()
            if etag is None or etag != self._etag or time.monotonic() >= self._next_check:
                self._next_check = time.monotonic() + FULL_CHECK_SECONDS
                self._etag = etag if self._try_update() else None
            self._drop_retired()
            self.first.set()
            if self._seconds is None or self._stop.wait(self._seconds):
                return

    def _try_update(self) -> bool:
        """Update; false where the same state of the source has to be tried again."""
        done = True
        try:
            self.update()
        except Exception as error:
            # The registry may be unavailable for a while; loaded models go on answering.
            done = isinstance(error, InputError) and not isinstance(error, BackendNotReady | Unavailable)
            if not isinstance(error, InputError):
                logger.exception("looking for a new model failed")
            if self.engine is None:
                self.error = error
            elif isinstance(error, InputError) and str(error) != self._warned:
                self._warned = str(error)
                logger.warning("%s stays: %s", self.engine.name, error)
        return done and not self._unreported and not self._retry_challenger

    @property
    def rejected(self) -> int:
        """Versions that failed to load or to answer since the start."""
        return len(self._rejected)

    def _drop_retired(self) -> None:
        """Drop retired models that have completed their last request."""
        self._retiring = [engine for engine in self._retiring if engine.running or engine.waiting]

    def update(self) -> None:
        """Load and switch to the versions that the source names now, where they differ.

        Raises: InputError when the champion cannot be loaded, ModelRejected when it fails its smoke test,
        BackendNotReady when another server has to change first; the current models then go on answering.
        """
        self._drop_retired()
        champion, challenger = self._source.resolve(self.spec)
        challenger = challenger if self._share and challenger != champion else None
        try:
            self._swap_champion(champion, challenger)
        finally:
            if self.engine is not None:
                self.first.set()  # the champion answers while its challenger loads
                self._report_failures()
                self._swap_challenger(challenger)
                self._report_failures()

    def _swap_champion(self, name: str, challenger: str | None) -> None:
        """Make `name` the champion, and restore the previous one when it fails in service."""
        before = self.serving_models
        if name in self._rejected or (before.champion is not None and before.champion.name == name):
            return
        version = self._version(name)
        loaded = before.challenger if before.challenger is not None and before.challenger.name == name else None
        engine = loaded or self._load_version(version)
        fault = smoke_fault(engine, version.tags)
        if before.champion is None:
            if fault:
                logger.error("%s is served as the only model although its smoke test failed: %s", name, fault.reason)
            self._swap(ServingModels(engine))
            return
        if not fault:
            # The old champion stays loaded where it becomes the challenger.
            other = before.champion if before.champion.name == challenger else None
            self._swap(ServingModels(engine, other or (None if loaded else before.challenger)), keep=before.champion)
            fault = smoke_fault(engine, version.tags)
        if fault:
            self._swap(replace(before, challenger=None if loaded else before.challenger))
            self._retire(engine)
            raise self._reject(version, fault)
        self._retire(before.champion)

    def _swap_challenger(self, name: str | None) -> None:
        """Serve `name` beside the champion; its errors do not affect the champion."""
        models = self.serving_models
        old = models.challenger
        self._retry_challenger = False
        if old is not None and old.name == name:
            return
        engine = None
        try:
            if name is not None and name not in self._rejected:
                version = self._version(name)
                engine = self._load_version(version)
                if fault := smoke_fault(engine, version.tags):
                    self._retire(engine)
                    engine = None
                    raise self._reject(version, fault)
        except InputError as error:
            logger.warning("no challenger: %s", error)
            self._retry_challenger = isinstance(error, BackendNotReady | Unavailable)
        except Exception:
            logger.exception("no challenger: looking for %s failed", name)
            self._retry_challenger = True
        if engine is not old:
            self._swap(replace(models, challenger=engine))

    def _version(self, name: str) -> Version:
        try:
            version = self._source.version(name)
            _ = version.folder  # which may be a download: one that failed says nothing of the version
        except Unavailable:
            raise
        except InputError:
            self._rejected.add(name)
            raise
        return version

    def _load_version(self, version: Version) -> M:
        """Raises: InputError."""
        try:
            return self._load(version.folder, str(version))
        except (BackendNotReady, Unavailable):
            raise
        except Exception as error:
            # An unreadable folder stays unreadable.
            self._rejected.add(str(version))
            if isinstance(error, InputError):
                raise
            logger.exception("%s cannot be loaded", version)
            raise ModelRejected(f"{version}: cannot be loaded: {error}") from error

    def _reject(self, version: Version, fault: Fault) -> InputError:
        if fault.temporary:
            return BackendNotReady(f"{version}: {fault.reason}")
        self._rejected.add(str(version))
        self._unreported[str(version)] = (version, fault.reason)
        return ModelRejected(f"{version}: failed its smoke test: {fault.reason}")

    def _report_failures(self) -> None:
        """Mark failed versions in the registry; retried at the next update when it is unavailable."""
        for name, (version, fault) in list(self._unreported.items()):
            try:
                self._source.mark_failed(version, fault)
            except Exception:
                logger.exception("the registry could not mark %s as failed", name)
            else:
                del self._unreported[name]

    def _swap(self, models: ServingModels[M], keep: M | None = None) -> None:
        """Replace the serving models, and retire those that no longer answer, except `keep`."""
        before, self.serving_models = self.serving_models, models
        current = (models.champion, models.challenger)
        names = [engine.name for engine in current if engine is not None]
        self.served.update(names)
        self.error = None
        logger.info("%s: %s", " and ".join(names), "answers" if len(names) == 1 else "answer")
        for engine in (before.champion, before.challenger):
            if engine is not None and engine is not keep and engine not in current:
                self._retire(engine)

    def _retire(self, engine: M) -> None:
        """Retire a model unless it is serving."""
        models = self.serving_models
        if engine not in (models.champion, models.challenger):
            self._retiring.append(engine)
            engine.retire()


def _bucket(challenger: str, user: str) -> float:
    """A user's position in [0, 1), shuffled anew for each challenger."""
    digest = hashlib.sha256(f"{challenger}\0{user}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def describe(watcher: AliasWatcher[Any]) -> list[dict[str, Any]]:
    """The models of `GET /v1/models`."""
    models = watcher.serving_models
    return [
        {
            "id": engine.name,
            "object": "model",
            "created": engine.loaded,
            "owned_by": "loopwright",
            "name": engine.name.partition("/")[0],
            "version": engine.name.partition("/")[2],
            "role": role,
            "task": engine.task,
            "context_length": engine.context_len,
            "modalities": ["text", "image", "video"] if getattr(engine, "sees_pictures", False) else ["text"],
        }
        for role, engine in (("champion", models.champion), ("challenger", models.challenger))
        if engine is not None
    ]


def smoke_fault(loaded: ClassifierWorker | Backend, tags: Mapping[str, str]) -> Fault | None:
    """Why the answer to a version's `smoke_question` is not its `smoke_answer`; None when it is."""
    question, expected = tags.get("smoke_question") or QUESTION, tags.get("smoke_answer")
    try:
        if isinstance(loaded, ClassifierWorker):
            use_threads(threads_for(loaded.texts.model.num_parameters))
            answer: str | None = loaded.texts.classify([question])[0].label
        else:
            answer = _chat_answer(loaded, question)
    except BackendRetired:  # the server is stopping
        raise
    except Exception as error:
        temporary = isinstance(error, BackendNotReady) or (isinstance(error, BackendUnavailable) and error.temporary)
        if not temporary:
            logger.exception("%s failed its smoke test", loaded.name)
        return Fault(f"{question!r}: {type(error).__name__}: {error}", temporary)
    if answer is None:
        return Fault(f"{question!r}: no answer in {SMOKE_SECONDS:.0f} s")
    if expected is None:
        return None if answer.strip() else Fault(f"{question!r}: an empty answer")
    if answer.strip() != expected.strip():
        return Fault(f"{question!r}: answered {answer[:200]!r} instead of {expected[:200]!r}")
    return None


def _chat_answer(backend: Backend, question: str) -> str | None:
    """The answer; None when it takes too long."""
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    deadline = time.monotonic() + SMOKE_SECONDS
    request = GenerationRequest([{"role": "user", "content": question}])
    # First in the queue: a long queue is not the model's fault.
    task = backend.submit(request, events.put, first=True)
    while True:
        try:
            event = events.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            task.cancel()
            return None
        if isinstance(event, Failure):
            raise event.error
        if isinstance(event, Completion):
            return event.content
