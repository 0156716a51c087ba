"""An engine whose model is behind another server: any that speaks OpenAI's chat API (vLLM, llama.cpp, this one).

The agent's loop stays here: its tools are declared to the server, the calls that come back are run, and what came of
them is asked on. So are records, feedback and lineage, under the name of the registered version that it stands for.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any

import httpx

from components.agent.agent import GAVE_UP, MAX_RESULT_CHARACTERS, Agent, ContextTooLong
from components.agent.tools import call
from components.config import InputError
from components.loop_settings import ServeConfig
from serving.engine import Called, Engine, Failed, Finished, Late, Started, Stepped, Text, Ticket

KEY_VARIABLE = "LOOPWRIGHT_BACKEND_KEY"
LOOK_SECONDS = 0.05
"""Between looks whether the client is still there."""

logger = logging.getLogger("loopwright.remote")


class BackendDown(Late):
    """The server behind this one cannot answer now."""


class Remote(Engine):
    """Answers with the model of another server."""

    def __init__(self, agent: Agent, name: str, config: ServeConfig) -> None:
        if not config.backend_url or not config.backend_model:
            raise InputError("params.yaml: serve.backend: openai needs serve.backend_url and serve.backend_model")
        self._open(agent, name, config, 0)
        self.model_name = config.backend_model
        self.url = f"{config.backend_url.rstrip('/')}/chat/completions"
        key = os.environ.get(KEY_VARIABLE)
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}

    def _start(self, ticket: Ticket) -> None:
        self._count_in(ticket)
        self.pool.submit(RemoteReply(self, ticket).run)


class RemoteReply:
    """One request from its first message to its last event, on a thread of its own."""

    def __init__(self, engine: Remote, ticket: Ticket) -> None:
        self.engine, self.ask, self.ticket = engine, ticket.ask, ticket
        self.said: list[str] = []
        self.steps: list[dict[str, Any]] = []
        self.messages = [dict(message) for message in self.ask.messages]
        self.tools = self.ask.tools or [tool.declaration() for tool in engine.agent.tools]
        self.usage: Mapping[str, int] = {}
        self.written = 0
        self.started = False

    def run(self) -> None:
        try:
            self.ticket.notify(asyncio.run(self._answer_or_leave()))
        except Exception as error:
            if not isinstance(error, ContextTooLong | Late):
                logger.error("a request failed", exc_info=error)
            with suppress(Exception):
                self.ticket.notify(Failed(error))
        finally:
            self.engine.let_go()
            self.engine.done(self.ticket)

    async def _answer_or_leave(self) -> Finished:
        """The answer, or what there is of it when the client leaves or time is up."""
        answer = asyncio.ensure_future(self._answer())
        while not answer.done() and not self.ticket.cancelled.is_set() and not self.ticket.late:
            await asyncio.wait([answer], timeout=LOOK_SECONDS)
        if answer.done():
            return answer.result()
        answer.cancel()
        with suppress(asyncio.CancelledError):
            await answer
        if not self.started and not self.ticket.cancelled.is_set():
            raise Late("the backend did not answer within serve.request_seconds; try again later")
        return self._finish("cancelled" if self.ticket.cancelled.is_set() else "length")

    async def _answer(self) -> Finished:
        async with httpx.AsyncClient(timeout=None, headers=self.engine.headers) as client:
            for turns_left in reversed(range(self.engine.agent.max_steps)):
                text, calls, reason = await self._turn(client, last=not turns_left and not self.ask.tools)
                if not calls or self.ask.tools:
                    return self._finish(reason, calls[:1] if self.ask.one_call else calls)
                self.messages.append({"role": "assistant", "content": text, "tool_calls": calls})
                for wanted in calls:
                    self._run_tool(wanted)
        self._tell(GAVE_UP.format(steps=self.engine.agent.max_steps))
        return self._finish("stop")

    async def _turn(self, client: httpx.AsyncClient, last: bool) -> tuple[str, list[dict[str, Any]], str]:
        """Text, calls and the reason of the end of one turn of the model."""
        text, calls, reason = "", dict[int, dict[str, Any]](), "stop"
        async for chunk in self._chunks(client, self._body(last)):
            if not self.started:
                self.started = True
                self.ticket.notify(Started())
            self.usage = chunk.get("usage") or self.usage
            for choice in chunk.get("choices", []):
                delta, reason = choice.get("delta") or {}, choice.get("finish_reason") or reason
                text += delta.get("content") or ""
                self._tell(delta.get("content") or "")
                for part in delta.get("tool_calls") or []:
                    _join(calls.setdefault(part.get("index", 0), {}), part)
                    if self.ask.tools:
                        self.ticket.notify(Called(part))
        self.written += int(self.usage.get("completion_tokens", 0))
        return text, [calls[index] for index in sorted(calls)], reason

    def _body(self, last: bool) -> dict[str, Any]:
        limit = self.engine.max_new_tokens if self.ask.max_tokens is None else self.ask.max_tokens - self.written
        body: dict[str, Any] = {
            "model": self.engine.model_name,
            "messages": self.messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": max(1, limit),
            "temperature": self.ask.temperature,
            "top_p": self.ask.top_p,
        }
        wish = self.ask.wish
        if self.tools and self.ask.may_call:
            choice: Any = {"type": "function", "function": {"name": wish.tool}} if wish.tool else wish.calls
            body |= {"tools": list(self.tools), "tool_choice": "none" if last else choice}
        if wish.schema is not None:
            shape = {"name": "answer", "schema": wish.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": shape}
        if self.ask.seed is not None:
            body["seed"] = self.ask.seed
        if self.ask.stops:
            body["stop"] = list(self.ask.stops)
        return body

    async def _chunks(self, client: httpx.AsyncClient, body: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The server's events.

        Raises: ContextTooLong where it refuses the request, BackendDown where it cannot answer.
        """
        try:
            async with client.stream("POST", self.engine.url, json=body) as response:
                if response.status_code != 200:
                    raise _refusal(response.status_code, (await response.aread()).decode(errors="replace"))
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        chunk = json.loads(line.removeprefix("data: "))
                        if "error" in chunk:
                            raise BackendDown(f"{self.engine.url}: {chunk['error'].get('message')}")
                        yield chunk
        except httpx.HTTPError as error:
            raise BackendDown(f"{self.engine.url}: {error or type(error).__name__}; is the backend up?") from error

    def _run_tool(self, wanted: dict[str, Any]) -> None:
        name, arguments = wanted["function"]["name"], wanted["function"]["arguments"]
        with suppress(ValueError):
            arguments = json.loads(arguments)
        content = call(self.engine.agent.tools, name, arguments)[:MAX_RESULT_CHARACTERS]
        for step in (
            {"type": "call", "name": name, "arguments": arguments},
            {"type": "result", "name": name, "content": content},
        ):
            self.steps.append(step)
            self.ticket.notify(Stepped(step))
        self.messages.append({"role": "tool", "tool_call_id": wanted["id"], "name": name, "content": content})

    def _tell(self, text: str) -> None:
        if text:
            self.said.append(text)
            self.ticket.notify(Text(text))

    def _finish(self, reason: str, calls: list[dict[str, Any]] | None = None) -> Finished:
        prompt_tokens = int(self.usage.get("prompt_tokens", 0))
        return Finished("".join(self.said), self.steps, calls or [], reason, prompt_tokens, self.written)


def _join(call: dict[str, Any], part: Mapping[str, Any]) -> None:
    """Add a delta to the call that it is a part of."""
    function = part.get("function") or {}
    if not call:
        number = part.get("id") or f"call_{uuid.uuid4().hex[:24]}"
        call |= {"id": number, "type": "function", "function": {"name": "", "arguments": ""}}
    for key in ("name", "arguments"):
        call["function"][key] += function.get(key) or ""


def _refusal(status: int, body: str) -> Exception:
    message = body[:500]
    with suppress(ValueError, KeyError, TypeError):
        message = json.loads(body)["error"]["message"]
    if status in (400, 413, 422):
        return ContextTooLong(f"the backend refused the request: {message}")
    return BackendDown(f"the backend answered {status}: {message}")
