"""The FastAPI app, and its routes for models, feedback, lineage with its pictures, health and metrics.

The other routes: `chat_handler` (chat completions), `classify` (labels and embeddings), `page_files` and
`registry_page` (the pages).
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Header, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi_offline import FastAPIOffline

from components.feedback.lineage import lineage
from components.feedback.store import UnknownCompletion
from serving.http import chat_handler, classify, page_files, registry_page
from serving.http.errors import ERRORS, ApiError, handle_errors
from serving.http.routes import Running, StrictRoute, record_owner, record_viewer
from serving.http.schemas import FeedbackRequest
from serving.models.state import describe
from serving.observability.metrics import CONTENT_TYPE

MAX_KEY_CHARACTERS = 255
MAX_LISTED = 1000
PNG = "image/png"


router = APIRouter(route_class=StrictRoute, responses=ERRORS)


def new_api() -> FastAPI:
    """The app, whose server sets `state.serving` before the first request. `/docs` works offline."""
    api = FastAPIOffline(title="Loopwright", version="1", redoc_url=None, static_url="/docs/assets")
    for each in (chat_handler.router, router, classify.router, page_files.router, registry_page.router):
        api.router.routes.extend(each.routes)  # copied: an included router is matched again at each request
    handle_errors(api)
    return api


@router.get("/v1/models")
async def models(serving: Running) -> dict[str, Any]:
    """The models being served."""
    return {"object": "list", "data": [row for watcher in serving.watchers for row in describe(watcher)]}


@router.get("/v1/models/{model:path}")
async def model(model: str, serving: Running) -> dict[str, Any]:
    """One model being served."""
    for watcher in serving.watchers:
        if (chosen := watcher.choose(model, "")) is not None:
            return next(row for row in describe(watcher) if row["id"] == chosen.name)
    raise serving.unknown(model)


@router.post("/v1/feedback", status_code=202)
async def feedback(
    body: FeedbackRequest,
    serving: Running,
    request: Request,
    idempotency_key: Annotated[str | None, Header()] = None,
) -> dict[str, str]:
    """Store a vote on an answer; it is on disk when the 202 is sent."""
    if len(idempotency_key or "") > MAX_KEY_CHARACTERS:
        message = f"Idempotency-Key: longer than {MAX_KEY_CHARACTERS} characters; send a shorter one"
        raise ApiError(400, message, "invalid_value", "Idempotency-Key")
    limit = serving.config.max_correction_characters
    for name, text in (("correction", body.correction), ("comment", body.comment)):
        if text is not None and len(text) > limit:
            message = f"{name}: {len(text)} characters; send at most {limit} (serve.max_correction_characters)"
            raise ApiError(413, message, "request_too_large", name)
    completion: dict[str, Any] = {"model": "", "request": {}}
    with suppress(UnknownCompletion):  # add_feedback raises it again
        completion = await run_in_threadpool(serving.store.completion, body.completion_id, record_viewer(request))
    user = completion["request"].get("user")
    feedback_id = await run_in_threadpool(
        serving.store.add_feedback,
        body.completion_id,
        body.rating,
        body.correction,
        body.comment,
        idempotency_key or None,
        # The API key, else the `user` that the request named, else this machine.
        str(request.scope.get("api_key_user") or (f"user:{user}" if user else "local")),
        record_owner(request),
        record_viewer(request),
    )
    serving.metrics.vote(body.rating, serving.chat_watcher(completion["model"]).role(completion["model"]))
    return {"id": feedback_id}


@router.get("/v1/feedback")
async def votes(
    serving: Running,
    limit: Annotated[int, Query(ge=1, le=MAX_LISTED, description="Number of votes, newest first.")] = 20,
) -> dict[str, Any]:
    """The newest votes and their status; with API keys, requires the scope `admin`."""
    return {"object": "list", "data": await run_in_threadpool(serving.store.votes, limit)}


@router.get("/v1/lineage/{completion_id}")
async def completion_lineage(completion_id: str, serving: Running, request: Request) -> dict[str, Any]:
    """The lineage of one answer of the key's owner, as `loopwright trace` prints it."""
    viewer = record_viewer(request)
    return await run_in_threadpool(lineage, serving.store, completion_id, serving.version_metadata, viewer)


@router.get("/v1/pictures/{completion_id}/{digest}", response_class=Response, responses={200: {"content": {PNG: {}}}})
async def picture(
    completion_id: str,
    digest: Annotated[str, Path(pattern="^[0-9a-f]{64}$", description="A digest of the lineage's `pictures`.")],
    serving: Running,
    request: Request,
) -> Response:
    """A picture of a recorded request of the key's owner, as a PNG file without metadata."""
    content = await run_in_threadpool(serving.store.picture, digest, completion_id, record_viewer(request))
    headers = {"Cache-Control": "private, no-store", "X-Content-Type-Options": "nosniff"}
    return Response(content, media_type=PNG, headers=headers)


@router.get("/livez", response_class=Response)
async def livez() -> Response:
    """200 while the process runs."""
    return Response("ok\n", media_type="text/plain")


@router.get("/readyz", response_class=Response)
async def readyz(serving: Running) -> Response:
    """200 while requests are answered and recorded; 503 while loading, without a database, or stopping."""
    if reason := serving.unready:
        raise ApiError(503, f"not ready: {reason}", "not_ready")
    return Response("ok\n", media_type="text/plain")


@router.get("/metrics", response_class=Response)
async def metrics(serving: Running) -> Response:
    """Metrics for Prometheus."""
    engines = serving.models.engines
    serving.metrics.queue(sum(engine.waiting for engine in engines), sum(engine.running for engine in engines))
    for models in (watcher.serving_models for watcher in serving.watchers):
        if models.champion is not None:
            serving.metrics.model(models.champion.name, models.challenger.name if models.challenger else None)
    # Not on the threads of `run_in_threadpool`, which requests hold while the database is away.
    return Response(await asyncio.to_thread(serving.metrics.text), media_type=CONTENT_TYPE)
