"""Alias watcher: loads the versions that a source's aliases point at, and swaps them when an alias moves.

A new model is loaded, warmed up and smoke-tested beside the old one, then one reference changes. A request keeps the
model it began with. The old model stays loaded until the new one passes its smoke test in service, else it is restored.
After a promotion it goes on with the conversations that it began, and takes new ones until every replica has the new
model; then it is retired and closes with its last request.
"""

from __future__ import annotations

import hashlib
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, Literal, TypeVar

from components.config.errors import InputError, Unavailable
from serving.engine.backend import Backend, BackendNotReady
from serving.engine.classifier_worker import ClassifierWorker
from serving.models.replica import Replica, refused
from serving.models.smoke_test import Fault, smoke_fault
from serving.models.versions import Source, Version

CLOSE_SECONDS = 2.0
"""Longest wait for a load in progress when the server stops; its thread is a daemon."""
FULL_CHECK_SECONDS = 30.0
"""Interval at which the source is resolved again even if its version token has not changed."""
LONGEST_PAUSE_SECONDS = 60.0
"""Longest interval of polls while the source does not answer."""
AGREEMENT_SECONDS = 600.0
"""Longest wait for the other replicas to load a new champion; those that take longer are left behind."""
Role = Literal["champion", "challenger", "former"]

logger = logging.getLogger("loopwright.follow")


M = TypeVar("M", bound=ClassifierWorker | Backend)
"""A loaded model."""


class ModelRejected(InputError):
    """A version that cannot be loaded, or fails its smoke test."""


@dataclass(frozen=True)
class ServingModels(Generic[M]):
    """The models that answer; replaced as a whole, so that each request sees one consistent pair."""

    champion: M | None = None
    """None until the first load is complete."""
    challenger: M | None = None
    former: M | None = None
    """The champion before a promotion, while it still answers its conversations."""
    agreed: bool = True
    """Whether all replicas have the champion; else new conversations begin with the former one."""

    def __iter__(self) -> Iterator[M]:
        return (model for model in (self.champion, self.challenger, self.former) if model is not None)


class AliasWatcher(Generic[M]):
    """Keeps `serving_models` at the versions that `source` names for `spec`, polling every `seconds` (None: once)."""

    def __init__(
        self,
        spec: str,
        source: Source,
        load: Callable[[Path, str], M],
        seconds: float | None,
        share: float = 0.0,
        handover_seconds: float = 0.0,
        replica: Replica | None = None,
    ) -> None:
        self.spec = spec
        """`NAME@ALIAS` or `NAME/VERSION`."""
        self.name = spec.partition("@")[0].partition("/")[0]
        self._source, self._load, self._seconds, self._share = source, load, seconds, share
        self._handover_seconds, self._replica = handover_seconds, replica
        self._succeeded = 0.0
        """By `time.monotonic()`: when the former champion was succeeded here, later everywhere."""
        self._failures = 0
        """Polls in a row that the source did not answer."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch_source, name="follow", daemon=True)
        self._rejected: set[str] = set()
        """Versions that are not loaded again."""
        self._retry_challenger = False
        """The challenger failed for a reason that may pass."""
        self._unreported: dict[str, tuple[Version, Fault]] = {}
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
        """Every `NAME/VERSION` that may have answered, here or in a replica that started earlier."""

    @property
    def engine(self) -> M | None:
        """The champion; None until the first load is complete."""
        return self.serving_models.champion

    @property
    def engines(self) -> list[M]:
        """All models that may still be answering."""
        return [*self.serving_models, *self._retiring]

    @property
    def announced(self) -> set[str]:
        """What the other replicas are told: the spec, and each version that is loaded or refused here."""
        return {self.spec, *(engine.name for engine in self.serving_models), *map(refused, tuple(self._rejected))}

    @property
    def has_alternatives(self) -> bool:
        """Whether another model than the champion may answer a request that names no version."""
        models = self.serving_models
        return models.challenger is not None or models.former is not None

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

    def choose(self, model: str | None, user: str, answered_by: str | None = None) -> M | None:
        """The model that answers a user's request for `model`; None where `answers_to` is false, or none is loaded.

        A request that names no version goes to the model that its conversation was `answered_by`, while that is
        loaded. The challenger gets its share of the users of other such requests: the same users for as long as the
        challenger stays the same.
        """
        models = self.serving_models
        version = answered_by if model in (None, self.name, self.spec) else model
        for engine in models:
            if engine.name == version and not (model == self.spec and engine is models.challenger):
                return engine
        if models.challenger is not None:
            if model in (models.challenger.name, f"{self.name}@challenger"):
                return models.challenger
            if model in (None, self.name) and _bucket(models.challenger.name, user) < self._share:
                return models.challenger
        first = models.champion if models.agreed else models.former or models.champion
        return first if self.answers_to(model) else None

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
            self._hand_over()
            self.first.set()
            if self._seconds is None or self._stop.wait(poll_pause(self._seconds, self._failures)):
                return

    def _try_update(self) -> bool:
        """Update; false where the same state of the source has to be tried again."""
        done = True
        try:
            self.update()
        except Exception as error:
            # The registry may be unavailable for a while; loaded models go on answering.
            answered = isinstance(error, InputError) and not isinstance(error, Unavailable)
            done = answered and not isinstance(error, BackendNotReady)
            self._failures = 0 if answered else self._failures + 1
            if not isinstance(error, InputError):
                logger.exception("looking for a new model failed")
            if self.engine is None:
                self.error = error
            elif isinstance(error, InputError) and str(error) != self._warned:
                self._warned = str(error)
                logger.warning("%s stays: %s", self.engine.name, error)
        else:
            self._failures = 0
        return done and not self._unreported and not self._retry_challenger

    @property
    def rejected(self) -> int:
        """Versions that failed to load or to answer since the start."""
        return len(self._rejected)

    def _drop_retired(self) -> None:
        """Drop retired models that have completed their last request."""
        self._retiring = [engine for engine in self._retiring if engine.running or engine.waiting]

    def _hand_over(self) -> None:
        """Begin new conversations with a new champion once all replicas have it; retire the former one later."""
        models, now = self.serving_models, time.monotonic()
        if models.former is None or models.champion is None:
            return
        if not models.agreed:
            is_everywhere = self._replica is None or self._replica.is_everywhere(self.spec, models.champion.name)
            if is_everywhere or now - self._succeeded > AGREEMENT_SECONDS:
                self._succeeded, self.serving_models = now, replace(models, agreed=True)
        elif now - self._succeeded >= self._handover_seconds:
            self._swap(replace(models, former=None))

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
        loaded = next((model for model in (before.challenger, before.former) if model and model.name == name), None)
        engine = loaded or self._load_version(version)
        challenging = None if engine is before.challenger else before.challenger
        fault = smoke_fault(engine, version.tags)
        if before.champion is None:
            if fault:
                logger.error("%s is served as the only model although its smoke test failed: %s", name, fault.reason)
            former = self._former_elsewhere(name, challenger)
            self._succeeded = time.monotonic()
            self._swap(ServingModels(engine, former=former, agreed=former is None))
            return
        if not fault:
            # The old champion stays loaded where it becomes the challenger.
            other = before.champion if before.champion.name == challenger else None
            # After a rollback nothing goes on with a model that was found bad.
            former = before.champion if other is None and self._is_promotion(before.champion.name, name) else None
            self._succeeded = time.monotonic()
            models = ServingModels(engine, other or challenging, former, agreed=former is None)
            self._swap(models, keep=before.champion)
            fault = smoke_fault(engine, version.tags)
        if fault:
            self._swap(replace(before, challenger=challenging, former=None, agreed=True))
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

    def _former_elsewhere(self, champion: str, challenger: str | None) -> M | None:
        """The former champion, where the other replicas are just handing over from it."""
        loaded = self._replica.loaded_elsewhere(self.spec) - {challenger} if self._replica else set()
        for name in sorted(name for name in loaded if self._is_promotion(name, champion)):
            try:
                return self._load_version(self._version(name))
            except Exception:
                logger.exception("no former champion: %s cannot be loaded", name)
        return None

    def _is_promotion(self, before: str, after: str) -> bool:
        numbers = [version.partition("/")[2] for version in (before, after)]
        if not self._handover_seconds or not all(number.isdigit() for number in numbers):
            return False
        return int(numbers[1]) > int(numbers[0])

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
        self._unreported[str(version)] = (version, fault)
        return ModelRejected(f"{version}: failed its smoke test: {fault.reason}")

    def _report_failures(self) -> None:
        """Mark failed versions in the registry; retried at the next update when it is unavailable."""
        for name, (version, fault) in list(self._unreported.items()):
            try:
                self._source.mark_failed(version, fault.reason, fault.device)
            except Exception:
                logger.exception("the registry could not mark %s as failed", name)
            else:
                del self._unreported[name]

    def _swap(self, models: ServingModels[M], keep: M | None = None) -> None:
        """Replace the serving models, and retire those that no longer answer, except `keep`."""
        before, self.serving_models = self.serving_models, models
        names = [engine.name for engine in models]
        self.served.update(names)
        with suppress(Exception):  # a client that pinned an id gets it from the replicas that know it
            self.served |= self._source.names(self.name)
        self.error = None
        logger.info("%s: %s", " and ".join(names), "answers" if len(names) == 1 else "answer")
        for engine in before:
            if engine is not keep:
                self._retire(engine)

    def _retire(self, engine: M) -> None:
        """Retire a model unless it is serving."""
        if engine not in tuple(self.serving_models):
            self._retiring.append(engine)
            engine.retire()


def poll_pause(seconds: float, failures: int) -> float:
    """Seconds to the next poll: more after each failure in a row, and never the same for all replicas."""
    longest = max(seconds, LONGEST_PAUSE_SECONDS)
    return min(longest, seconds * 2.0 ** min(failures, 16)) * random.uniform(0.75, 1.25)


def _bucket(challenger: str, user: str) -> float:
    """A user's position in [0, 1), shuffled anew for each challenger."""
    digest = hashlib.sha256(f"{challenger}\0{user}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
