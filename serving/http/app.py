"""The FastAPI app, and its routes for models, feedback, lineage, health and metrics.

The other routes: `chat_handler` (chat completions), `classify` (labels and embeddings), `page_files` (the chat page).
"""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi_offline import FastAPIOffline

from components.feedback.lineage import lineage
from components.feedback.store import UnknownCompletion
from serving.http import chat_handler, classify
from serving.http import page_files as page
from serving.http.errors import ERRORS, ApiError, shape_errors
from serving.http.schemas import FeedbackRequest
from serving.models.alias_watcher import describe
from serving.models.state import Running, StrictRoute
from serving.observability.metrics import CONTENT_TYPE

MAX_KEY_CHARACTERS = 255
MAX_LISTED = 1000


router = APIRouter(route_class=StrictRoute, responses=ERRORS)
ROUTERS = (chat_handler.router, router, classify.router, page.router)
"""Every public route is in one of these."""


def new_api() -> FastAPI:
    """The app; whoever runs it sets `state.serving` before the first request. `/docs` needs no network."""
    api = FastAPIOffline(title="Loopwright", version="1", redoc_url=None, static_url="/docs/assets")
    for one in ROUTERS:
        api.router.routes.extend(one.routes)  # as they are: an included router is asked of at each request
    shape_errors(api)
    return api


@router.get("/v1/models")
async def models(serving: Running) -> dict[str, Any]:
    """The models being served."""
    return {"object": "list", "data": [row for one in serving.watchers for row in describe(one)]}


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
    """Take in a vote on an answer; it is on disk when the 202 is sent."""
    if len(idempotency_key or "") > MAX_KEY_CHARACTERS:
        message = f"Idempotency-Key: longer than {MAX_KEY_CHARACTERS} characters; send a shorter one"
        raise ApiError(400, message, "invalid_value", "Idempotency-Key")
    _bound("correction", body.correction, serving.config.max_correction_characters)
    _bound("comment", body.comment, serving.config.max_correction_characters)
    asked: dict[str, Any] = {"model": "", "request": {}}
    with suppress(UnknownCompletion):  # the vote itself says so
        asked = await run_in_threadpool(serving.store.completion, body.completion_id)
    feedback_id = await run_in_threadpool(
        serving.store.add_feedback,
        body.completion_id,
        body.rating,
        body.correction,
        body.comment,
        idempotency_key or None,
        _voice(request, asked["request"].get("user")),
    )
    serving.metrics.vote(body.rating, serving.chat_watcher(asked["model"]).role(asked["model"]))
    return {"id": feedback_id}


def _bound(where: str, text: str | None, limit: int) -> None:
    if text is not None and len(text) > limit:
        message = f"{where}: {len(text)} characters; send at most {limit} (serve.max_correction_characters)"
        raise ApiError(413, message, "request_too_large", where)


@router.get("/v1/feedback")
async def votes(
    serving: Running,
    limit: Annotated[int, Query(ge=1, le=MAX_LISTED, description="How many, the newest first.")] = 20,
) -> dict[str, Any]:
    """The newest votes and what became of each; with keys, for those that open `admin`."""
    return {"object": "list", "data": await run_in_threadpool(serving.store.votes, limit)}


def _voice(request: Request, user: str | None) -> str:
    """Who speaks: the API key, else the `user` that the request named, else whoever sits at this machine."""
    return str(request.scope.get("voice") or (f"user:{user}" if user else "local"))


@router.get("/v1/lineage/{completion_id}")
async def completion_lineage(completion_id: str, serving: Running) -> dict[str, Any]:
    """Everything behind one answer, as `loopwright trace` prints it."""
    return await run_in_threadpool(lineage, serving.store, completion_id, serving.facts_of)


@router.get("/livez", response_class=Response)
async def livez() -> Response:
    """200 while the process runs."""
    return Response("ok\n", media_type="text/plain")


@router.get("/readyz", response_class=Response)
async def readyz(serving: Running) -> Response:
    """200 while questions are answered; 503 while loading or stopping."""
    if not serving.ready:
        raise ApiError(503, "not ready: the model is loading or the server is stopping", "not_ready")
    return Response("ok\n", media_type="text/plain")


@router.get("/metrics", response_class=Response)
async def metrics(serving: Running) -> Response:
    """Counters for Prometheus."""
    engines = serving.models.engines
    serving.metrics.queue(sum(one.waiting for one in engines), sum(one.running for one in engines))
    for models in (watcher.serving_models for watcher in serving.watchers):
        if models.champion is not None:
            serving.metrics.model(models.champion.name, models.challenger.name if models.challenger else None)
    return Response(serving.metrics.text(), media_type=CONTENT_TYPE)
