"""What the routes share while the server runs: the models that answer, one follower for each task, and the record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, Request

from components.agent.mcp_servers import McpServers
from components.agent.tools import Tool
from components.config.loop_settings import ServeConfig
from components.config.params import InputError
from components.feedback.lineage import FactsOf, registry_facts
from components.feedback.store import Store
from components.runtime.model_tasks import Task, task_of
from components.tracking.registry import Registry
from components.tracking.traces import Traces
from serving.engine.backend import Backend
from serving.engine.classifier_worker import ClassifierWorker
from serving.engine.local import LocalEngine
from serving.engine.model_tools import ModelTools
from serving.engine.remote import RemoteServer
from serving.engine.summarizer_worker import SummarizerWorker
from serving.http.errors import ApiError
from serving.models.alias_watcher import AliasWatcher, M, describe
from serving.models.versions import TASKS, Bundled, NoModel, Registered, Source
from serving.observability.metrics import Metrics


@dataclass
class Serving:
    """What the routes share while the server runs."""

    models: AliasWatcher[Backend]
    """Who answers chats."""
    classifiers: AliasWatcher[ClassifierWorker]
    """Who classifies texts and says where they lie."""
    summarizers: AliasWatcher[Backend]
    """Who summarizes: a chat of one message, for whoever names it."""
    store: Store
    config: ServeConfig
    metrics: Metrics
    facts_of: FactsOf
    mcp: McpServers
    """Whose tools the agent may call."""
    traces: Traces | None = None
    """None: steps are not traced."""
    draining: bool = False
    """True once the server was asked to stop: what runs is finished, nothing new is taken."""

    @property
    def watchers(self) -> tuple[AliasWatcher[Any], ...]:
        return (self.models, self.classifiers, self.summarizers)

    @property
    def ready(self) -> bool:
        """Whether all that can be loaded is."""
        return self.served != [] and all(one.first.is_set() for one in self.watchers) and not self.draining

    @property
    def served(self) -> list[str]:
        """`NAME/VERSION` of each champion that answers."""
        return [one.engine.name for one in self.watchers if one.engine is not None]

    @property
    def busy(self) -> bool:
        engines = [engine for one in self.watchers for engine in one.engines]
        return any(engine.running or engine.waiting for engine in engines)

    def wait(self) -> None:
        """Until the first models are loaded.

        Raises: InputError, or whatever else went wrong, when none could be.
        """
        for one in self.watchers:
            one.first.wait()
        if not self.served:
            raise next(one.error for one in self.watchers if one.error is not None and one.spec)

    def choose(self, watcher: AliasWatcher[M], model: str | None, who: str) -> M:
        """The model that answers `who` on a request for `model`.

        Raises: ApiError saying what is missing.
        """
        chosen = watcher.choose(model, who)
        if chosen is not None:
            return chosen
        if watcher.engine is not None:
            raise self.unknown(model)
        if isinstance(watcher.error, InputError):
            raise ApiError(404, f"model: {watcher.error}", "model_not_found", "model")
        raise ApiError(503, "the model is still loading; try again soon", "loading", headers={"Retry-After": "2"})

    def chat_watcher(self, model: str | None) -> AliasWatcher[Backend]:
        """Whose model a chat is for: the summarizer's where it is named, or where nobody else chats."""
        named = model is not None and self.summarizers.answers_to(model)
        return self.summarizers if self.summarizers.spec and (named or not self.models.spec) else self.models

    def unknown(self, model: str | None) -> ApiError:
        served = ", ".join(row["id"] for one in self.watchers for row in describe(one)) or "none yet"
        return ApiError(404, f"model: {model!r} is not served here; served: {served}", "model_not_found", "model")

    @classmethod
    def open(
        cls, home: Path, config: ServeConfig, model: str, bundled: Bundled | None = None, share: float = 0.0
    ) -> Serving:
        """Open the store and start loading: the `bundled` model, else what `model` names in the registry.

        `model` is one `NAME@ALIAS` or `NAME/VERSION`, or several between commas, one for each task. `share` of the
        requests go to the challengers, where there are any.

        Raises: InputError when the database cannot be opened, two models do the same, or MCP servers are named and
        the extra is missing.
        """
        mcp = McpServers(config.mcp_servers, config.mcp_call_seconds)
        own = ModelTools(Registry(home), config.model_tools, config.follow_seconds)
        source: Source = bundled or Registered(Registry(home))
        specs = _by_task([str(bundled)] if bundled else model.split(","), source)

        def follow(task: Task, load: Callable[[Path, str], Any]) -> AliasWatcher[Any]:
            spec = specs.get(task)
            if spec is None:
                return AliasWatcher("", NoModel(task, list(specs.values())), load, None)
            seconds = config.follow_seconds if "@" in spec and bundled is None else None
            return AliasWatcher(spec, source, load, seconds, share)

        metrics = Metrics()

        def external_tools() -> list[Tool]:
            return [*own.tools(), *mcp.tools()]

        load: Callable[[Path, str], Backend] = (
            partial(RemoteServer.load, config=config, external_tools=external_tools)
            if config.backend == "openai"
            else partial(
                LocalEngine.load, config=config, external_tools=external_tools, on_step=metrics.chat_batch.observe
            )
        )
        serving = cls(
            models=follow("chat", load),
            classifiers=follow("classify", partial(ClassifierWorker.load, metrics=metrics)),
            summarizers=follow("summarize", partial(SummarizerWorker.load, config=config)),
            store=Store.of(home),
            config=config,
            metrics=metrics,
            facts_of={str(bundled): bundled.facts}.get if bundled else registry_facts(home),
            mcp=mcp,
            traces=Traces(home, config.trace_share) if config.traces == "mlflow" else None,
        )
        for one in serving.watchers:
            one.start()
        return serving

    def close(self) -> None:
        for one in self.watchers:
            one.close()
        self.mcp.close()
        if self.traces is not None:
            self.traces.close()
        self.store.close()


def _by_task(specs: list[str], source: Source) -> dict[Task, str]:
    found: dict[Task, str] = {}
    for spec in specs:
        task = _task(spec, source)
        if task in found:
            raise InputError(f"--model: {found[task]} and {spec} both {task}; serve one of them")
        found[task] = spec
    return found


def _task(spec: str, source: Source) -> Task:
    """What the model of a spec does; one that cannot be had is reported by its follower."""
    name = spec.partition("@")[0].partition("/")[0]
    if name in TASKS:
        return TASKS[name]
    try:
        return task_of(source.version(source.named(spec)[0]).folder)
    except InputError:
        return "chat"


async def _serving(request: Request) -> Serving:
    serving: Serving = request.app.state.serving
    return serving


Running = Annotated[Serving, Depends(_serving)]


def who(request: Request, user: str | None) -> str:
    """Whom a challenger is kept for: the `user` of the request, else its API key, else the client's address."""
    return user or str(request.scope.get("voice") or (request.client.host if request.client else ""))
