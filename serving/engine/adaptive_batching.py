"""BentoML's adaptive batching without its HTTP: requests that come at once are read in one forward pass.

A batchable method of the service waits in BentoML's dispatcher for others like it. BentoML calls it from a route of its
own, in its own shapes; our routes reach the dispatcher directly, which spares each request a second way through the
server. Without BentoML around (tests, `loopwright classify`) each request is a batch.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import bentoml
from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool

from components.inference.classifier import Embedded, Labelled
from serving.engine.classifier_worker import Reader
from serving.http.errors import ApiError, error_response
from serving.observability.metrics import Metrics

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BATCH_SIZE = 64
"""Texts in one batch; a longer request is split."""
MAX_LATENCY_MS = 30_000
"""A request that would have to wait longer is refused: the machine is overloaded."""
CLOSED = {"classify": "/batches/classify", "embed": "/batches/embed"}
"""The batchable methods of the service, and the routes that BentoML gives them; nobody may call those."""


@dataclass(frozen=True)
class Asked:
    """One text of a request, and the model that the request began with."""

    reader: Reader
    text: str


class Batches(Protocol):
    """Reads the texts of a request, with those of other requests where there are any."""

    async def classify(self, asked: Sequence[Asked]) -> list[Labelled]: ...

    async def embed(self, asked: Sequence[Asked]) -> list[Embedded]: ...


def label_all(asked: Sequence[Asked], metrics: Metrics) -> list[Labelled]:
    """One forward pass for all texts of one model, in order; nearly always all are of one."""
    return _by_model(asked, metrics.classify_batch, lambda reader, texts: reader.texts.classify(texts))


def embed_all(asked: Sequence[Asked], metrics: Metrics) -> list[Embedded]:
    """As `label_all`."""
    return _by_model(asked, metrics.embed_batch, lambda reader, texts: reader.texts.embed(texts))


def _by_model(asked: Sequence[Asked], observe: Any, read: Callable[[Reader, list[str]], list[Any]]) -> list[Any]:
    """Requests on both sides of a swap may meet in one batch; each keeps its model."""
    found: dict[int, Any] = {}
    for reader in dict.fromkeys(one.reader for one in asked):
        rows = [row for row, one in enumerate(asked) if one.reader is reader]
        observe.observe(len(rows))
        found.update(zip(rows, read(reader, [asked[row].text for row in rows]), strict=True))
    return [found[row] for row in range(len(asked))]


@dataclass(frozen=True)
class Unbatched:
    """Each request by itself."""

    metrics: Metrics

    async def classify(self, asked: Sequence[Asked]) -> list[Labelled]:
        return await run_in_threadpool(label_all, asked, self.metrics)

    async def embed(self, asked: Sequence[Asked]) -> list[Embedded]:
        return await run_in_threadpool(embed_all, asked, self.metrics)


@dataclass(frozen=True)
class Dispatched:
    """Through the dispatchers of a BentoML app."""

    infer: Callable[[str, tuple[Any, ...], dict[str, Any]], Awaitable[list[Any]]]
    """`batch_infer` of the app's factory: what BentoML's own route of a batchable method awaits."""

    async def classify(self, asked: Sequence[Asked]) -> list[Labelled]:
        return await self._dispatch("classify", asked)

    async def embed(self, asked: Sequence[Asked]) -> list[Embedded]:
        return await self._dispatch("embed", asked)

    async def _dispatch(self, method: str, asked: Sequence[Asked]) -> list[Any]:
        try:
            return await self.infer(method, (list(asked),), {})
        except bentoml.exceptions.ServiceUnavailable:
            message = "more texts wait than can be read in time; try again soon"
            raise ApiError(429, message, "queue_full", headers={"Retry-After": "1"}) from None


class Batching:
    """ASGI middleware of the service: hands BentoML's dispatchers to our routes, and keeps their own routes shut."""

    def __init__(self, app: App, api: FastAPI) -> None:
        self.app, self.api = app, api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            # BentoML (1.4) builds the app by a factory that holds the dispatchers, and gives it the factory's lifespan.
            factory = scope["app"].router.lifespan_context.__self__
            self.api.state.batches = Dispatched(factory.batch_infer)
        elif scope.get("path") in CLOSED.values():
            await error_response(404, f"{scope['path']}: no such path; see /docs")(scope, receive, send)
            return
        await self.app(scope, receive, send)
