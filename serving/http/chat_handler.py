"""The route of chat completions: one request between the event loop and the backend's threads, recorded as it runs.

`schemas` validates the body, a backend answers, the answer is recorded before it is acknowledged and then sent in
OpenAI's format. Records are written in the backend's thread, before the event that tells the client: an acknowledged
answer is on disk even when the client disconnects or the event loop is busy.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, StreamingResponse

from components.agent.agent import Agent, ContextTooLong
from components.agent.tool_policy import OPEN, ToolPolicy, ToolSession
from components.feedback.replicas import conversation_digest
from components.feedback.store import AnswerRecord, Store
from components.inference.schemas import SchemaError
from components.tracking.otlp import OtlpTraces
from components.tracking.traces import Traces
from serving.engine.backend import (
    AgentStep,
    Backend,
    BackendRetired,
    Completion,
    DeadlineExceeded,
    Event,
    Failure,
    GenerationRequest,
    GenerationTask,
    QueueFull,
    Start,
    TextDelta,
    ToolCallDelta,
)
from serving.http.errors import ERRORS, ApiError, failed_stream_body
from serving.http.media import NO_MEDIA, RequestMedia, refuse_media
from serving.http.routes import DirectRoute, Running, record_owner, requesting_user, servers_in, tool_policy
from serving.http.schemas import ChatRequest
from serving.models.state import Serving
from serving.observability.metrics import Metrics, RequestMetrics

UNSUPPORTED = ("tools", "tool_choice", "response_format", "temperature", "top_p", "stop")
"""Parameters that a summarizer refuses."""

router = APIRouter(route_class=DirectRoute, responses=ERRORS)


class ClientGone(Exception):
    """The client closed its connection before the answer was complete."""


class StreamFailed(Exception):
    """The answer failed after the stream began; the server's log has the traceback."""


class ChatHandler:
    def __init__(
        self,
        engine: Backend,
        body: ChatRequest,
        store: Store,
        metrics: Metrics,
        role: str,
        traces: Traces | OtlpTraces | None = None,
        media: RequestMedia = NO_MEDIA,
        owner: str = "",
        confirmed: Sequence[dict[str, Any]] = (),
    ) -> None:
        """`confirmed` are the steps of calls that a person confirmed, which ran before this answer."""
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.engine, self.body, self._role, self._owner = engine, body, role, owner
        self._store, self._metrics, self._traces, self._media = store, metrics, traces, media
        self._confirmed = list(confirmed)
        self._request_metrics = RequestMetrics(self.id, engine.name, engine.tool_names, metrics)
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._task: GenerationTask | None = None
        self._started = 0.0
        """Unix time; 0: not started, and nothing is recorded."""

    def submit(self, generation: GenerationRequest) -> None:
        """Submit a request within its `admission`.

        Raises: BackendRetired.
        """
        self._task = self.engine.submit(generation, self._notify, admitted=True)

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def started(self) -> None:
        """Wait until a streamed request has a slot and is recorded; others are recorded with their answer.

        Raises: ApiError when the prompt does not fit.
        """
        try:
            event = await self._events.get()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if isinstance(event, Failure):
            raise _failure(event.error)

    async def completion(self, request: Request) -> dict[str, Any]:
        """The complete answer in OpenAI's format.

        Raises: as `finished`.
        """
        finished = await self.finished(request)
        steps = [*self._confirmed, *finished.steps]
        message = {"role": "assistant", "content": finished.content, "refusal": None, "steps": steps}
        if finished.tool_calls:
            message |= {"tool_calls": finished.tool_calls, "content": finished.content or None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finished.finish_reason}
        return {**self._head("chat.completion"), "choices": [choice], "usage": self._usage(finished)}

    async def chunks(self) -> AsyncIterator[bytes]:
        """OpenAI's stream: role, text and steps as they are generated, finish reason, `[DONE]`."""
        with_usage = bool(self.body.stream_options and self.body.stream_options.include_usage)
        head = self._head("chat.completion.chunk") | ({"usage": None} if with_usage else {})
        try:
            async for delta, finished in self.deltas():
                reason = finished.finish_reason if finished else None
                yield sse(head | {"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}]})
                if finished and with_usage:
                    yield sse(head | {"choices": [], "usage": self._usage(finished)})
        except StreamFailed as failed:
            yield sse(failed_stream_body(failed.__cause__))
            return
        yield b"data: [DONE]\n\n"

    async def finished(self, request: Request) -> Completion:
        """Wait for the complete answer.

        Raises: ClientGone, after its slot is freed; ApiError when the prompt does not fit.
        """

        async def watch_connection() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            self._events.put_nowait(Failure(ClientGone()))

        watching = asyncio.ensure_future(watch_connection())
        try:
            _ = self._recorded_body  # computed while the model generates, not when its answer is to be recorded
            while True:
                event = await self._events.get()
                if isinstance(event, Completion):
                    return event
                if isinstance(event, Failure):
                    raise _failure(event.error)
        finally:
            self.cancel()
            watching.cancel()

    async def deltas(self) -> AsyncIterator[tuple[dict[str, Any], Completion | None]]:
        """OpenAI's deltas in order; the last comes with the completion."""
        steps = 0
        try:
            yield {"role": "assistant", "content": ""}, None
            for step in self._confirmed:
                yield {"steps": [{"index": steps, **step}]}, None
                steps += 1
            while True:
                event = await self._events.get()
                if isinstance(event, TextDelta):
                    yield {"content": event.text}, None
                elif isinstance(event, AgentStep):
                    # OpenAI's client merges list items by their index.
                    yield {"steps": [{"index": steps, **event.step}]}, None
                    steps += 1
                elif isinstance(event, ToolCallDelta):
                    yield {"tool_calls": [event.delta]}, None
                elif isinstance(event, Completion):
                    yield {}, event
                    return
                elif isinstance(event, Failure):
                    raise StreamFailed from event.error
        finally:
            self.cancel()  # the client disconnected; else a no-op

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.engine.name}

    def _usage(self, finished: Completion) -> dict[str, int]:
        total = finished.prompt_tokens + finished.completion_tokens
        return {
            "prompt_tokens": finished.prompt_tokens,
            "completion_tokens": finished.completion_tokens,
            "total_tokens": total,
        }

    def _notify(self, event: Event) -> None:
        """Called by the backend's thread: record an event, then send it to the event loop."""
        self._request_metrics.observe(event)
        if isinstance(event, Start):
            if self.body.stream:  # the client gets the id before the end, and may send feedback on it
                self._store.add_request(self.id, self.engine.name, self._recorded_body, self._media.files, self._owner)
            self._started = time.time()
        elif isinstance(event, Completion) and self._started:
            self._record(event)
        if not self.body.stream and not isinstance(event, Completion | Failure):
            return  # the completion holds all other events
        # The loop is closed when the server stopped without waiting for this request.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    @cached_property
    def _recorded_body(self) -> dict[str, Any]:
        body = self.body.model_dump(exclude_unset=True, by_alias=True)
        return self._media.recorded(body) if self._media.files else body

    def _record(self, finished: Completion) -> None:
        answer_message = {"role": "assistant", "content": finished.content, "tool_calls": finished.tool_calls}
        answer = AnswerRecord(
            content=finished.content,
            finish_reason=finished.finish_reason,
            prompt_tokens=finished.prompt_tokens,
            completion_tokens=finished.completion_tokens,
            seconds=self._request_metrics.seconds,
            steps=[*self._confirmed, *finished.steps],
            tool_calls=finished.tool_calls,
            conversation=conversation_digest([*(message.plain() for message in self.body.messages), answer_message]),
        )
        if self.body.stream:
            self._store.add_answer(self.id, answer)
        else:
            body, files = self._recorded_body, self._media.files
            self._store.add_exchange(self.id, self.engine.name, body, self._started, answer, files, self._owner)
        self._metrics.tokens.labels("prompt").inc(finished.prompt_tokens)
        self._metrics.tokens.labels("completion").inc(finished.completion_tokens)
        self._metrics.answers.labels(finished.finish_reason).inc()
        self._metrics.role_answers.labels(self._role).inc()
        if self._traces is not None:
            self._request_metrics.trace(self._traces, self._recorded_body, finished.content)


@router.post("/v1/chat/completions", response_model=None, responses={200: {"content": {"text/event-stream": {}}}})
async def chat_completions(body: ChatRequest, serving: Running, request: Request) -> Response:
    """Answer a conversation; with `stream`, as server-sent events."""
    if body.characters > (limit := serving.config.max_prompt_characters):
        message = f"messages: {body.characters} characters; send at most {limit} (serve.max_prompt_characters)"
        raise ApiError(400, message, "context_length_exceeded", "messages")
    policy = tool_policy(request, serving.config.allow_writes)
    handler = await begin(body, serving, requesting_user(request, body.user), record_owner(request), policy)
    if body.stream:
        return StreamingResponse(
            handler.chunks(),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
    try:
        return JSONResponse(await handler.completion(request))
    except ClientGone:
        return Response(status_code=499)


async def begin(
    body: ChatRequest, serving: Serving, user: str, owner: str = "", policy: ToolPolicy = OPEN
) -> ChatHandler:
    """Submit a request; a streamed one waits for its slot, so that an error still has its HTTP status."""
    media: RequestMedia | None = None if body.has_media else NO_MEDIA
    confirmed: Confirmed | None = None
    answered_by: str | None = None
    if any(watcher.has_alternatives for watcher in (serving.models, serving.summarizers)):
        answered_by = await run_in_threadpool(answering_model, body, serving.store, owner)
    while True:
        watcher = serving.chat_watcher(body.model)
        backend = serving.choose(watcher, body.model, user, answered_by)
        if body.has_media and not backend.sees_pictures:
            refuse_media(body.messages)
        try:
            with backend.admission():
                if media is None:
                    media = await serving.media.read(body.messages)
                agent = backend.agent
                if agent is None:
                    generation = _source_request(body, backend.name)
                else:
                    confirmed = confirmed or await _run_confirmed(body, agent, policy)  # once, whatever is swapped
                    generation = await _chat_request(body, agent, media, confirmed)
                role, steps = watcher.role(backend.name), confirmed.steps if confirmed else ()
                store, metrics, traces = serving.store, serving.metrics, serving.traces
                handler = ChatHandler(backend, body, store, metrics, role, traces, media, owner, steps)
                handler.submit(generation)
        except BackendRetired:
            continue  # swapped meanwhile; its successor is in place
        except QueueFull as full:
            raise ApiError(429, str(full), "queue_full", headers={"Retry-After": str(full.retry_after)}) from None
        if body.stream:
            await handler.started()
        return handler


def answering_model(body: ChatRequest, store: Store, owner: str) -> str | None:
    """The model that gave the last answer of a request's conversation, whichever replica it came from."""
    messages = [message.plain() for message in body.messages]
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    return store.answering_model(conversation_digest(messages[: answers[-1] + 1]), owner) if answers else None


@dataclass(frozen=True)
class Confirmed:
    """What a person's confirmation has led to."""

    policy: ToolPolicy
    """Of the turns that follow."""
    messages: Sequence[dict[str, Any]] = ()
    """The results, for the model."""
    steps: Sequence[dict[str, Any]] = ()


async def _run_confirmed(body: ChatRequest, agent: Agent, policy: ToolPolicy) -> Confirmed:
    """Run the calls of the last message that a person confirmed."""
    policy = replace(policy, servers_read=servers_in([message.plain() for message in body.messages], agent.tools))
    if body.confirmed_tool_calls is None:
        return Confirmed(policy)
    session = ToolSession(lambda: agent.tools, policy)
    calls = [call.model_dump() for call in body.messages[-1].tool_calls or ()]
    messages, steps = await run_in_threadpool(session.run_confirmed, calls, body.confirmed_tool_calls)
    return Confirmed(replace(policy, servers_read=frozenset(session.servers_read)), messages, steps)


async def _chat_request(
    body: ChatRequest, agent: Agent, media: RequestMedia, confirmed: Confirmed
) -> GenerationRequest:
    may_call = body.tool_choice != "none"
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools] if body.tools and may_call else None
    try:
        rules = agent.known_rules(tools, body.options, confirmed.policy)
        if rules is None:  # compiling grammars would block the event loop
            rules = await run_in_threadpool(agent.rules, tools, body.options, confirmed.policy)
    except SchemaError as error:
        raise ApiError(400, str(error), "invalid_schema", str(error).partition(":")[0]) from None
    messages = [message.plain() for message in body.messages]
    return GenerationRequest(
        messages=[*(media.messages(messages) if media.files else messages), *confirmed.messages],
        tools=tools,
        may_call=may_call,
        policy=confirmed.policy,
        one_call=body.parallel_tool_calls is False,
        rules=rules,
        options=body.options,
        max_tokens=body.token_limit,
        temperature=body.temperature or 0.0,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=body.seed,
        stops=body.stops,
    )


def _source_request(body: ChatRequest, name: str) -> GenerationRequest:
    """The generation request of a summarizer, whose source is the one message.

    Raises: ApiError for what it does not support.
    """
    unsupported = next((field for field in UNSUPPORTED if getattr(body, field, None)), None)
    if unsupported is not None:
        message = f"{unsupported}: not supported by {name}; leave it out"
        raise ApiError(400, message, "unsupported_parameter", unsupported)
    if len(body.messages) != 1 or body.messages[0].role != "user":
        message = f"messages: {len(body.messages)}: {name} reads one text; send it as one message of role user"
        raise ApiError(400, message, "invalid_value", "messages")
    return GenerationRequest([body.messages[0].plain()], max_tokens=body.token_limit)


def sse(value: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def _failure(error: Exception) -> Exception:
    if isinstance(error, ContextTooLong):
        return ApiError(400, str(error), "context_length_exceeded", "messages")
    if isinstance(error, DeadlineExceeded):
        return ApiError(503, str(error), "timeout", headers={"Retry-After": "1"})
    return error
