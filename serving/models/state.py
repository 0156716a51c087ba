"""State shared by the routes: the served models (one alias watcher per task), the store, metrics and configuration.

Also its draining when a signal stops the server.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from components.agent.mcp_servers import McpServers
from components.agent.tools import Tool
from components.config.errors import InputError, Unavailable
from components.config.loop_settings import ServeConfig
from components.config.paths import AGENT
from components.feedback.lineage import VersionMetadata, registry_metadata
from components.feedback.store import Store, shared_registry
from components.runtime.files import check_restored
from components.runtime.model_tasks import TASKS, Task, task_of
from components.runtime.process import file_lock
from components.runtime.service_registry import SERVED
from components.tracking.otlp import OtlpTraces
from components.tracking.registry import Registry
from components.tracking.traces import Traces
from serving.engine.backend import Backend
from serving.engine.classifier_worker import ClassifierWorker
from serving.engine.local import LocalEngine
from serving.engine.model_tools import ModelTools
from serving.engine.remote import RemoteServer
from serving.engine.summarizer_worker import SummarizerWorker
from serving.http.errors import ApiError
from serving.http.media import MediaReader
from serving.models.alias_watcher import AliasWatcher, M
from serving.models.replica import Replica
from serving.models.smoke_test import device_of
from serving.models.versions import Bundled, NoModel, Registered, Source
from serving.observability.metrics import Metrics
from serving.observability.platform import PlatformCollector


@dataclass
class Serving:
    """State shared by the routes while the server runs."""

    models: AliasWatcher[Backend]
    """Chat models."""
    classifiers: AliasWatcher[ClassifierWorker]
    summarizers: AliasWatcher[Backend]
    """Answer a chat of one message, where the request names them."""
    store: Store
    replica: Replica
    config: ServeConfig
    metrics: Metrics
    version_metadata: VersionMetadata
    mcp: McpServers
    media: MediaReader
    home: Path
    challenger_share: float = 0.0
    """Share of the requests that go to challengers, where there are any."""
    traces: Traces | OtlpTraces | None = None
    """None: answers are not traced."""
    pinned: ExitStack = field(default_factory=ExitStack)
    """Locks of versions that are served without an alias."""
    stopping: bool = False
    """A signal to stop has come: no longer ready, and still answering while balancers notice."""
    draining: bool = False
    """The server is stopping: running requests are finished, new ones refused."""

    @property
    def watchers(self) -> tuple[AliasWatcher[Any], ...]:
        return (self.models, self.classifiers, self.summarizers)

    @property
    def ready(self) -> bool:
        """Whether requests are answered and recorded."""
        return self.unready == ""

    @property
    def unready(self) -> str:
        """Why requests are not answered or not recorded; empty where they are."""
        if self.stopping or self.draining:
            return "the server is stopping"
        if not self.served or not all(watcher.first.is_set() for watcher in self.watchers):
            return "the model is loading"
        return "" if self.replica.can_record else "the database cannot be written"

    @property
    def served(self) -> list[str]:
        """`NAME/VERSION` of each champion that answers."""
        return [watcher.engine.name for watcher in self.watchers if watcher.engine is not None]

    @property
    def sees_pictures(self) -> bool:
        """Whether a chat model that is served does."""
        return any(engine.sees_pictures for engine in self.models.engines)

    @property
    def rejected(self) -> dict[str, int]:
        """Number of versions that failed to load or to answer, by task."""
        return {
            task: each.rejected for task, each in zip(("chat", "classify", "summarize"), self.watchers, strict=True)
        }

    @property
    def busy(self) -> bool:
        engines = [engine for watcher in self.watchers for engine in watcher.engines]
        return any(engine.running or engine.waiting for engine in engines)

    def wait(self) -> None:
        """Block until the first models are loaded.

        Raises: InputError, or the error of a load, when no model could be loaded.
        """
        for watcher in self.watchers:
            watcher.first.wait()
        if not self.served:
            raise next(watcher.error for watcher in self.watchers if watcher.error is not None and watcher.spec)

    def choose(self, watcher: AliasWatcher[M], model: str | None, user: str, answered_by: str | None = None) -> M:
        """The model that answers a user's request for `model`, in a conversation that was `answered_by` another.

        Raises: ApiError when there is none.
        """
        chosen = watcher.choose(model, user, answered_by)
        if chosen is not None:
            return chosen
        if watcher.engine is not None:
            raise self.unknown(model)
        if isinstance(watcher.error, InputError):
            raise ApiError(404, f"model: {watcher.error}", "model_not_found", "model")
        raise ApiError(503, "the model is still loading; try again soon", "loading", headers={"Retry-After": "2"})

    def chat_watcher(self, model: str | None) -> AliasWatcher[Backend]:
        """The watcher of a chat request: the summarizer's where it is named, or where no chat model is served."""
        named = model is not None and self.summarizers.answers_to(model)
        return self.summarizers if self.summarizers.spec and (named or not self.models.spec) else self.models

    def unknown(self, model: str | None) -> ApiError:
        served = ", ".join(row["id"] for watcher in self.watchers for row in describe(watcher)) or "none yet"
        return ApiError(404, f"model: {model!r} is not served here; served: {served}", "model_not_found", "model")

    @classmethod
    def open(
        cls,
        home: Path,
        config: ServeConfig,
        model: str,
        bundled: Bundled | None = None,
        share: float = 0.0,
        project_tools: Callable[[], list[Tool]] = list,
    ) -> Serving:
        """Open the store and start loading: the `bundled` model, else what `model` names in the registry.

        `model` is `NAME@ALIAS` or `NAME/VERSION`, or a comma-separated list, one per task. `share` of the requests go
        to challengers, where there are any. A base, which no agent was made of, may call the `project_tools`.

        Raises: InputError where state or database cannot be used, of two models of one task, of MCP without the extra.
        """
        check_restored(home)
        home.mkdir(parents=True, exist_ok=True)  # whose disk the metrics describe, also where the database is elsewhere
        mcp = McpServers(config.mcp_servers, config.mcp_call_seconds)
        registered = ModelTools(Registry(home), config.model_tools, config.follow_seconds)
        sources = [registered.tools] if config.model_tools else []
        sources += [mcp.tools] if config.mcp_servers else []
        source: Source = bundled or Registered(shared_registry(home))
        specs = _by_task([str(bundled)] if bundled else model.split(","), source)
        metrics = Metrics()
        store, announcing = Store.of(home), list[AliasWatcher[Any]]()
        replica = Replica(store, lambda: {name for watcher in announcing for name in watcher.announced})

        def watch(task: Task, load: Callable[[Path, str], Any]) -> AliasWatcher[Any]:
            spec = specs.get(task)
            if spec is None:
                return AliasWatcher("", NoModel(task, list(specs.values())), load, None)
            seconds = config.follow_seconds if "@" in spec and bundled is None else None
            watcher = AliasWatcher[Any](spec, source, load, seconds, share, config.handover_seconds, replica)
            announcing.append(watcher)
            return watcher

        serving = cls(
            models=watch("chat", _chat_loader(home, config, metrics, sources, project_tools)),
            classifiers=watch("classify", partial(ClassifierWorker.load, metrics=metrics)),
            summarizers=watch("summarize", partial(SummarizerWorker.load, config=config)),
            store=store,
            replica=replica,
            config=config,
            metrics=metrics,
            version_metadata={str(bundled): bundled.metadata}.get if bundled else registry_metadata(home),
            mcp=mcp,
            media=MediaReader(config),
            home=home,
            challenger_share=share,
            traces=_traces(home, config),
        )
        serving.replica.start()
        for watcher in serving.watchers:
            watcher.start()
        if bundled is None:
            serving._pin(home, specs.values())
        ready, rejected = (lambda: serving.ready), (lambda: serving.rejected)
        metrics.observe_platform(PlatformCollector(home, store, replica, config.max_waiting, ready, rejected))
        return serving

    def _pin(self, home: Path, specs: Iterable[str]) -> None:
        """Protect the versions that no alias protects from `prune`, until this is closed."""
        for spec in specs:
            if "/" in spec:
                lock = f"{spec.replace('/', '@')}-{os.getpid()}.{time.monotonic_ns()}"
                self.pinned.callback((home / SERVED / f"{lock}.lock").unlink, missing_ok=True)
                self.pinned.enter_context(file_lock(home / SERVED, lock))

    def close(self) -> None:
        for watcher in self.watchers:
            watcher.close()
        self.mcp.close()
        self.media.close()
        if self.traces is not None:
            self.traces.close()
        self.replica.close()
        self.store.close()
        self.pinned.close()


def _chat_loader(
    home: Path,
    config: ServeConfig,
    metrics: Metrics,
    sources: Sequence[Callable[[], list[Tool]]],
    project_tools: Callable[[], list[Tool]],
) -> Callable[[Path, str], Backend]:
    """What loads a chat model of a name from its folder, with the tools that the `sources` have at each request."""

    def load(folder: Path, name: str) -> Backend:
        own = [] if (folder / AGENT).is_file() else project_tools()

        def tools() -> list[Tool]:
            return [*own, *(tool for source in sources for tool in source())]

        if config.backend == "openai":
            return RemoteServer.load(folder, name, config, tools, home)
        return LocalEngine.load(folder, name, config, tools, metrics.chat_batch.observe)

    return load


def _traces(home: Path, config: ServeConfig) -> Traces | OtlpTraces | None:
    if config.traces == "otlp":
        return OtlpTraces(config.trace_share)
    return Traces(home, config.trace_share) if config.traces == "mlflow" else None


def _by_task(specs: list[str], source: Source) -> dict[Task, str]:
    by_task: dict[Task, str] = {}
    for spec in specs:
        task = _task(spec, source)
        if task in by_task:
            raise InputError(f"--model: {by_task[task]} and {spec} both {task}; serve one of them")
        by_task[task] = spec
    return by_task


def _task(spec: str, source: Source) -> Task:
    """The task of a spec's model; a missing model is reported by its watcher."""
    name = spec.partition("@")[0].partition("/")[0]
    if name in TASKS:
        return TASKS[name]
    try:
        return task_of(source.version(source.resolve(spec)[0]).folder)
    except Unavailable:
        raise
    except InputError:
        return "chat"


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
            "device": device_of(engine),
            "modalities": ["text", "image", "video"] if getattr(engine, "sees_pictures", False) else ["text"],
        }
        for role, engine in (("champion", models.champion), ("challenger", models.challenger))
        if engine is not None
    ]


def drain_on_signals(serving: Serving) -> None:
    """Drain before the server's own handling of SIGTERM and SIGINT; a second signal stops at once."""
    if threading.current_thread() is not threading.main_thread():
        return  # only the main thread may set signal handlers
    for number in (signal.SIGTERM, signal.SIGINT):
        _drain_before(serving, number)


def _drain_before(serving: Serving, number: signal.Signals) -> None:
    stop = signal.getsignal(number)
    if not callable(stop):
        return

    def drain(received: int, frame: FrameType | None) -> None:
        if serving.stopping:
            stop(received, frame)
            return
        serving.stopping = True
        notice = serving.config.notice_seconds if received == signal.SIGTERM else 0.0
        threading.Thread(target=wait_then_stop, args=(notice,), name="drain", daemon=True).start()

    def wait_then_stop(notice: float) -> None:
        time.sleep(notice)
        serving.draining = True
        deadline = time.monotonic() + serving.config.drain_seconds
        while serving.busy and time.monotonic() < deadline:
            time.sleep(0.02)
        stop(number, None)

    signal.signal(number, drain)
