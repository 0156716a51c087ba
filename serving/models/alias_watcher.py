"""Which model answers: loads the versions that the aliases point at, and swaps when an alias moves.

The new model is loaded, warmed and tried beside the old one, then one reference changes. A request
keeps the engine it began with; the old engine stays until the new one has also passed its smoke
test in service, else it takes over again, and then ends when its last request does.
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

from components.config.params import InputError
from components.models.devices import threads_for, use_threads
from serving.engine.backend import Backend, Completion, Event, Failure, GenerationRequest, LoadedModel
from serving.engine.classifier_worker import ClassifierWorker
from serving.models.versions import Source, Version

CLOSE_SECONDS = 2.0
"""A load in progress is not waited for longer; it dies with the process."""
SURE_SECONDS = 30.0
"""After so long the source is looked at, although nothing of it seems to have changed."""
QUESTION = "Hello"
"""Asked of a version that was registered without a question of its own."""
SMOKE_SECONDS = 60.0
"""For the answer, and for a slot that someone else's answer must first leave."""
Role = Literal["champion", "challenger", "former"]

logger = logging.getLogger("loopwright.follow")


M = TypeVar("M", bound=ClassifierWorker | Backend)
"""What answers: an engine that chats, a reader that classifies."""


class ModelRejected(InputError):
    """A version that cannot be loaded, or fails its smoke test."""


@dataclass(frozen=True)
class ServingModels(Generic[M]):
    """Who answers now; replaced as a whole, so that each request sees one state."""

    champion: M | None = None
    """None while the first one loads."""
    challenger: M | None = None


class AliasWatcher(Generic[M]):
    """Keeps the lineup at what `source` names for `spec`, looking again every `seconds` (None: loads once)."""

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
        self._refused: set[str] = set()
        """Versions that are not tried again."""
        self._unchallenged = False
        """Whether the challenger could not be had, for a reason that may pass."""
        self._unreported: dict[str, tuple[Version, str]] = {}
        """Versions that failed, of which the registry could not be told yet, and why they did."""
        self._retiring: list[M] = []
        self._seen: object = None
        """The source's stamp before the last look; None where that left something to do."""
        self._due = 0.0
        """By `time.monotonic()`, when to look again whatever the stamp is."""
        self.serving_models: ServingModels[M] = ServingModels()
        self.first = threading.Event()
        """Set when the first load is over, well or not."""
        self.error: Exception | None = None
        """Why there is no engine, when the first load failed."""
        self.served: set[str] = set()
        """Every `NAME/VERSION` that answered since this process started."""

    @property
    def engine(self) -> M | None:
        """The champion; None while the first one loads."""
        return self.serving_models.champion

    @property
    def engines(self) -> list[M]:
        """All that may still be answering."""
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
        """Whether a request for `model` is for us: the name, the alias we follow, or a version that we served.

        A version stays known after a swap, so that a client which pinned what `/v1/models` listed
        is answered by its successor (named in the answer) instead of being dropped.
        """
        challenged = self.serving_models.challenger is not None and model == f"{self.name}@challenger"
        return challenged or model in (None, self.name, self.spec) or model in self.served

    def choose(self, model: str | None, who: str) -> M | None:
        """The engine that answers `who` on a request for `model`; None where `answers_to` is false, or all load.

        The challenger gets its share of those who leave the choice to us, and always the same people
        while it is the same challenger.
        """
        models = self.serving_models
        if models.challenger is not None:
            if model in (models.challenger.name, f"{self.name}@challenger"):
                return models.challenger
            if model in (None, self.name) and _portion(models.challenger.name, who) < self._share:
                return models.challenger
        return models.champion if self.answers_to(model) else None

    def role(self, model: str) -> Role:
        """What `NAME/VERSION` is now."""
        models = self.serving_models
        if models.challenger is not None and model == models.challenger.name:
            return "challenger"
        return "champion" if models.champion is not None and model == models.champion.name else "former"

    def _watch_source(self) -> None:
        while not self._stop.is_set():
            stamp = self._source.stamp()
            if stamp is None or stamp != self._seen or time.monotonic() >= self._due:
                self._due = time.monotonic() + SURE_SECONDS
                self._seen = stamp if self._looked() else None
            self._let_go()
            self.first.set()
            if self._seconds is None or self._stop.wait(self._seconds):
                return

    def _looked(self) -> bool:
        """Look; false where another look at the same source could find more."""
        try:
            self.look()
        except InputError as error:
            self._failed(error)
        except Exception as error:
            # The registry may be away for a while; what is loaded goes on answering.
            logger.exception("looking for a new model failed")
            self._failed(error)
            return False
        return not self._unreported and not self._unchallenged

    def _let_go(self) -> None:
        """Forget who retired and has answered its last request."""
        self._retiring = [engine for engine in self._retiring if engine.running or engine.waiting]

    def _failed(self, error: Exception) -> None:
        if self.engine is None:
            self.error = error
        elif isinstance(error, InputError):
            logger.warning("%s stays: %s", self.engine.name, error)

    def look(self) -> None:
        """Load and switch to the versions that are named now, where they are others.

        Raises: InputError when the champion cannot be had, Unfit when it is no good; what answered goes on.
        """
        self._let_go()
        champion, challenger = self._source.named(self.spec)
        challenger = challenger if self._share and challenger != champion else None
        try:
            self._swap_champion(champion, challenger)
        finally:
            if self.engine is not None:
                self.first.set()  # whoever waits for a champion need not wait for its challenger
                self._report_failures()
                self._swap_challenger(challenger)
                self._report_failures()

    def _swap_champion(self, name: str, challenger: str | None) -> None:
        """Make `name` the champion, and go back at once when it fails where people ask it."""
        before = self.serving_models
        if name in self._refused or (before.champion is not None and before.champion.name == name):
            return
        version = self._version(name)
        beside = before.challenger is not None and before.challenger.name == name
        engine = before.challenger if before.challenger is not None and beside else self._loaded(version)
        fault = smoke_fault(engine, version.tags)
        if before.champion is None:
            if fault:
                logger.error("%s answers for want of another, though it failed its smoke test: %s", name, fault)
            self._swap(ServingModels(engine))
            return
        if not fault:
            # The old champion stays loaded where it is the next challenger.
            other = before.champion if before.champion.name == challenger else None
            self._swap(ServingModels(engine, other or (None if beside else before.challenger)), keep=before.champion)
            fault = smoke_fault(engine, version.tags)
        if fault:
            self._swap(replace(before, challenger=None if beside else before.challenger))
            self._end(engine)
            raise self._reject(version, fault)
        self._end(before.champion)

    def _swap_challenger(self, name: str | None) -> None:
        """Let `name` answer beside the champion; whatever goes wrong with it is no business of the champion's."""
        models = self.serving_models
        old = models.challenger
        self._unchallenged = False
        if old is not None and old.name == name:
            return
        engine = None
        try:
            if name is not None and name not in self._refused:
                version = self._version(name)
                engine = self._loaded(version)
                if fault := smoke_fault(engine, version.tags):
                    self._end(engine)
                    engine = None
                    raise self._reject(version, fault)
        except InputError as error:
            logger.warning("no challenger: %s", error)
        except Exception:
            logger.exception("no challenger: looking for %s failed", name)
            self._unchallenged = True
        if engine is not old:
            self._swap(replace(models, challenger=engine))

    def _version(self, name: str) -> Version:
        try:
            return self._source.version(name)
        except InputError:
            self._refused.add(name)
            raise

    def _loaded(self, version: Version) -> M:
        """Raises: InputError."""
        try:
            return self._load(version.folder, str(version))
        except Exception as error:
            # A folder that cannot be read would be no better at the next look.
            self._refused.add(str(version))
            if isinstance(error, InputError):
                raise
            logger.exception("%s cannot be loaded", version)
            raise ModelRejected(f"{version}: cannot be loaded: {error}") from error

    def _reject(self, version: Version, fault: str) -> ModelRejected:
        self._refused.add(str(version))
        self._unreported[str(version)] = (version, fault)
        return ModelRejected(f"{version}: failed its smoke test: {fault}")

    def _report_failures(self) -> None:
        """Tell the registry of what failed; again at the next look when it is away."""
        for name, (version, fault) in list(self._unreported.items()):
            try:
                self._source.mark_failed(version, fault)
            except Exception:
                logger.exception("the registry could not be told that %s failed", name)
            else:
                del self._unreported[name]

    def _swap(self, models: ServingModels[M], keep: M | None = None) -> None:
        """Change who answers; who no longer does is retired, but for `keep`."""
        before, self.serving_models = self.serving_models, models
        now = (models.champion, models.challenger)
        self.served.update(engine.name for engine in now if engine is not None)
        self.error = None
        names = [engine.name for engine in now if engine is not None]
        logger.info("%s: %s", " and ".join(names), "answers" if len(names) == 1 else "answer")
        for engine in (before.champion, before.challenger):
            if engine is not None and engine is not keep and engine not in now:
                self._end(engine)

    def _end(self, engine: M) -> None:
        """Retire an engine that no longer answers."""
        models = self.serving_models
        if engine not in (models.champion, models.challenger):
            self._retiring.append(engine)
            engine.retire()


def _portion(challenger: str, who: str) -> float:
    """Where in [0, 1) someone falls; another challenger shuffles everyone anew."""
    digest = hashlib.sha256(f"{challenger}\0{who}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def describe(watcher: AliasWatcher[Any]) -> list[dict[str, Any]]:
    """The models of `GET /v1/models`."""
    models = watcher.serving_models
    return [
        _described(engine, role)
        for role, engine in (("champion", models.champion), ("challenger", models.challenger))
        if engine is not None
    ]


def _described(engine: LoadedModel, role: str) -> dict[str, Any]:
    name, _, version = engine.name.partition("/")
    return {
        "id": engine.name,
        "object": "model",
        "created": engine.loaded,
        "owned_by": "loopwright",
        "name": name,
        "version": version,
        "role": role,
        "task": engine.task,
        "context_length": engine.context_len,
    }


def smoke_fault(loaded: ClassifierWorker | Backend, tags: Mapping[str, str]) -> str:
    """What is wrong with the answer to a version's `smoke_question`, or "" when it is its `smoke_answer`."""
    question, expected = tags.get("smoke_question") or QUESTION, tags.get("smoke_answer")
    if isinstance(loaded, ClassifierWorker):
        return _label_fault(loaded, question, expected)
    return _chat_fault(loaded, question, expected)


def _label_fault(reader: ClassifierWorker, question: str, expected: str | None) -> str:
    try:
        use_threads(threads_for(reader.texts.model.num_parameters))
        said = reader.texts.classify([question])[0].label
    except Exception as error:
        logger.exception("%s cannot classify", reader.name)
        return f"{question!r}: {type(error).__name__}: {error}"
    return _fault(question, said, expected)


def _chat_fault(engine: Backend, question: str, expected: str | None) -> str:
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    deadline = time.monotonic() + SMOKE_SECONDS
    ask = GenerationRequest([{"role": "user", "content": question}])
    # Before all that wait: a queue of people's questions is no fault of the model's.
    task = engine.submit(ask, events.put, first=True)
    while True:
        try:
            event = events.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            task.cancel()
            return f"{question!r}: no answer in {SMOKE_SECONDS:.0f} s"
        if isinstance(event, Failure):
            return f"{question!r}: {type(event.error).__name__}: {event.error}"
        if isinstance(event, Completion):
            return _fault(question, event.content, expected)


def _fault(question: str, said: str, expected: str | None) -> str:
    if expected is None:
        return "" if said.strip() else f"{question!r}: an empty answer"
    if said.strip() != expected.strip():
        return f"{question!r}: answered {said[:200]!r} instead of {expected[:200]!r}"
    return ""
