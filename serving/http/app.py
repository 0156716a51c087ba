"""The public routes: OpenAI's chat completions and models, feedback, lineage, health and metrics.

A request's way: `wire` checks it, the engine answers it, `exchange` records it before it is
acknowledged, and the functions at the end give it OpenAI's shape.
"""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles

from components.feedback.lineage import lineage
from components.feedback.store import UnknownCompletion
from components.inference.schemas import SchemaError
from serving.engine.local import Ask, Engine, Finished, Full, Retired
from serving.engine.summarizer_worker import Writer, source_of
from serving.http import classify
from serving.http import page_files as page
from serving.http.chat_handler import Broken, ClientGone, Exchange, sse
from serving.http.errors import ERRORS, ApiError, broken_body, shape_errors
from serving.http.routes import DirectRoute, StrictRoute
from serving.http.schemas import ChatRequest, FeedbackRequest
from serving.models.alias_watcher import describe
from serving.models.state import Running, Serving, who
from serving.observability.metrics import CONTENT_TYPE

MAX_KEY_CHARACTERS = 255
MAX_LISTED = 1000


router = APIRouter(route_class=StrictRoute, responses=ERRORS)
chat = APIRouter(route_class=DirectRoute, responses=ERRORS)
ROUTERS = (chat, router, classify.router, page.router)
"""Every public route is in one of these."""


def new_api() -> FastAPI:
    """The app; whoever runs it sets `state.serving` before the first request."""
    api = FastAPI(title="Loopwright", version="1", docs_url=None, redoc_url=None, swagger_ui_oauth2_redirect_url=None)
    for one in ROUTERS:
        api.router.routes.extend(one.routes)  # as they are: an included router is asked of at each request
    api.mount("/docs/assets", StaticFiles(directory=_swagger_folder()))
    shape_errors(api)
    return api


def _swagger_folder() -> Path:
    """BentoML brings Swagger UI along, so that `/docs` needs no network."""
    package = importlib.util.find_spec("bentoml")
    assert package is not None
    assert package.origin is not None
    return Path(package.origin).parent / "_internal" / "server" / "static_content"


@chat.post("/v1/chat/completions", response_model=None, responses={200: {"content": {"text/event-stream": {}}}})
async def chat_completions(body: ChatRequest, serving: Running, request: Request) -> Response:
    """Answer a conversation; with `stream`, as server-sent events."""
    if body.characters > (limit := serving.config.max_prompt_characters):
        message = f"messages: {body.characters} characters; send at most {limit} (serve.max_prompt_characters)"
        raise ApiError(400, message, "context_length_exceeded", "messages")
    exchange = await _begin(body, serving, who(request, body.user))
    if body.stream:
        return StreamingResponse(
            _chunks(exchange, body),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
    try:
        finished = await exchange.finished(request)
    except ClientGone:
        return Response(status_code=499)
    return JSONResponse(_completion(exchange, finished))


@router.get("/v1/models")
async def models(serving: Running) -> dict[str, Any]:
    """The models being served."""
    return {"object": "list", "data": [row for one in serving.followers for row in describe(one)]}


@router.get("/v1/models/{model:path}")
async def model(model: str, serving: Running) -> dict[str, Any]:
    """One model being served."""
    for follower in serving.followers:
        if (chosen := follower.choose(model, "")) is not None:
            return next(row for row in describe(follower) if row["id"] == chosen.name)
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
    serving.metrics.vote(body.rating, serving.chatting(asked["model"]).role(asked["model"]))
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
    for lineup in (follower.lineup for follower in serving.followers):
        if lineup.champion is not None:
            serving.metrics.model(lineup.champion.name, lineup.challenger.name if lineup.challenger else None)
    return Response(serving.metrics.text(), media_type=CONTENT_TYPE)


@router.get("/docs", response_class=HTMLResponse, include_in_schema=False)
async def docs() -> HTMLResponse:
    """Swagger UI on `/openapi.json`."""
    return get_swagger_ui_html(
        openapi_url="/openapi.json",
        title="Loopwright",
        swagger_js_url="/docs/assets/swagger-ui-bundle.js",
        swagger_css_url="/docs/assets/swagger-ui.css",
        swagger_favicon_url="/docs/assets/favicon-light-32x32.png",
    )


async def _begin(body: ChatRequest, serving: Serving, asker: str) -> Exchange:
    """Submit a request; one that streams waits until it has a slot: whatever is wrong with it still has a status."""
    while True:
        follower = serving.chatting(body.model)
        engine: Engine | Writer = serving.choose(follower, body.model, asker)
        ask = source_of(body, engine.name) if isinstance(engine, Writer) else await _ask(body, engine)
        role = follower.role(engine.name)
        exchange = Exchange(engine, body, serving.store, serving.metrics, role, serving.traces)
        try:
            exchange.submit(ask)
        except Retired:
            continue  # swapped between the two lines above; the successor is in place
        except Full as full:
            raise ApiError(429, str(full), "queue_full", headers={"Retry-After": str(full.retry_after)}) from None
        if body.stream:
            await exchange.started()
        return exchange


async def _ask(body: ChatRequest, engine: Engine) -> Ask:
    may_call = body.tool_choice != "none"
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools] if body.tools and may_call else None
    try:
        rules = engine.agent.known_rules(tools, body.wish)
        if rules is None:  # compiling grammars would keep the other requests waiting here
            rules = await run_in_threadpool(engine.agent.rules, tools, body.wish)
    except SchemaError as error:
        raise ApiError(400, str(error), "invalid_schema", str(error).partition(":")[0]) from None
    return Ask(
        messages=[message.plain() for message in body.messages],
        tools=tools,
        may_call=may_call,
        one_call=body.parallel_tool_calls is False,
        rules=rules,
        wish=body.wish,
        max_tokens=body.token_limit,
        temperature=body.temperature or 0.0,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=body.seed,
        stops=body.stops,
    )


def _completion(exchange: Exchange, finished: Finished) -> dict[str, Any]:
    message = {"role": "assistant", "content": finished.content, "refusal": None, "steps": finished.steps}
    if finished.tool_calls:
        message |= {"tool_calls": finished.tool_calls, "content": finished.content or None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finished.finish_reason}
    return {**exchange.head("chat.completion"), "choices": [choice], "usage": exchange.usage(finished)}


async def _chunks(exchange: Exchange, body: ChatRequest) -> AsyncIterator[bytes]:
    """OpenAI's stream: the role, the words and steps as they come, the reason of the end, `[DONE]`."""
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    head = exchange.head("chat.completion.chunk") | ({"usage": None} if with_usage else {})
    try:
        async for delta, finished in exchange.deltas():
            reason = finished.finish_reason if finished else None
            yield sse(head | {"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]})
            if finished and with_usage:
                yield sse(head | {"choices": [], "usage": exchange.usage(finished)})
    except Broken as broken:
        yield sse(broken_body(broken.__cause__))
        return
    yield b"data: [DONE]\n\n"
