"""State shared by the routes: the served models (one alias watcher per task), the store, metrics and configuration.

Also how a route reaches it: the route classes that parse a strict JSON body and pass the state on, and draining on
signals.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, get_type_hints

import pydantic_core
from fastapi import Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.types import Receive, Scope, Send

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

NOTICE_SECONDS = 1.0
"""Between saying "not ready" and closing the door, for whoever routes requests here to notice."""
DRAIN_SECONDS = 60.0
"""Longest wait for running answers."""


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


class StrictRequest(Request):
    """Reads bodies as strict JSON: UTF-8, bounded depth, no NaN, no halves of surrogate pairs."""

    async def json(self) -> Any:
        try:
            return pydantic_core.from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(400, f"body: not valid JSON: {error}", "invalid_json") from None


class StrictRoute(APIRoute):
    """A route whose handler is given a `StrictRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return strict


class DirectRoute(APIRoute):
    """A route of one JSON body that is handed to its function without FastAPI's machinery for dependencies.

    That takes longer than all the rest of a request's way. The function takes `body`, `serving` and `request`; FastAPI
    goes on reading its signature for `/openapi.json`.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        self._model: type[BaseModel] = get_type_hints(endpoint)["body"]
        self.app = self._answer

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = StrictRequest(scope, receive, send)
        body = await self._read(request)
        response: Response = await self.endpoint(body=body, serving=scope["app"].state.serving, request=request)
        await response(scope, receive, send)

    async def _read(self, request: StrictRequest) -> BaseModel:
        """Raises: ApiError, RequestValidationError."""
        given: Any = await request.body()
        if not given:
            raise RequestValidationError([{"type": "missing", "loc": ("body",), "msg": "Field required"}])
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind.startswith("application/") and kind.endswith(("/json", "+json")):
            given = await request.json()
        try:
            return self._model.model_validate(given, from_attributes=True)
        except ValidationError as error:
            wrong = error.errors(include_url=False, include_context=False)
            raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in wrong]) from None


def drain_on_signals(serving: Serving) -> None:
    """Put draining before what the server does on SIGTERM and SIGINT; a second signal stops at once."""
    if threading.current_thread() is not threading.main_thread():
        return  # signals belong to whoever owns the process
    for number in (signal.SIGTERM, signal.SIGINT):
        _before(serving, number)


def _before(serving: Serving, number: signal.Signals) -> None:
    stop = signal.getsignal(number)
    if not callable(stop):
        return

    def drain(received: int, frame: FrameType | None) -> None:
        if serving.draining:
            stop(received, frame)
            return
        serving.draining = True
        notice = NOTICE_SECONDS if received == signal.SIGTERM else 0.0
        threading.Thread(target=wait_then_stop, args=(notice,), name="drain", daemon=True).start()

    def wait_then_stop(notice: float) -> None:
        deadline = time.monotonic() + DRAIN_SECONDS
        time.sleep(notice)
        while serving.busy and time.monotonic() < deadline:
            time.sleep(0.02)
        stop(number, None)

    signal.signal(number, drain)
