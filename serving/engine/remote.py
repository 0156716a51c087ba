"""A backend whose model runs on another server with OpenAI's chat API (vLLM, llama.cpp, this one).

The agent's loop runs here: its tools are declared to the server, the calls that it returns are run, and their results
sent back. Records, feedback and lineage are kept here under the name of the registered version that the server runs.

A version that is an adapter is loaded into the server (vLLM's `/v1/load_lora_adapter`), again when that was restarted,
and unloaded with the last request. Other weights are what the server was started with.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import httpx

from components.agent.agent import GAVE_UP, Agent
from components.agent.tool_policy import ToolSession
from components.agent.tools import Tool
from components.config.loop_settings import ServeConfig
from components.config.params import InputError
from components.config.secrets import hidden
from components.models.base_store import is_adapter
from serving.engine.backend import (
    AgentStep,
    Backend,
    BackendNotReady,
    BackendUnavailable,
    Completion,
    DeadlineExceeded,
    Failure,
    GenerationRequest,
    GenerationTask,
    Notify,
    Start,
    ToolCallDelta,
    load_agent,
)
from serving.engine.picture_parts import with_picture_parts
from serving.engine.remote_errors import BUSY, error_message, refusal, unanswered
from serving.models.versions import check_weights, path_on_server

KEY_VARIABLE = "LOOPWRIGHT_BACKEND_KEY"
POLL_SECONDS = 0.05
"""Interval of the checks for cancellation and deadline."""
KEEPALIVE_SECONDS = 2.0
"""Lifetime of an idle connection; below the 5 s after which servers close theirs."""
LOAD_SECONDS = 120.0
"""Longest wait for the server's answer to anything but a chat, such as loading an adapter."""
VLLM_NEEDS = "adapters need vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment"
T = TypeVar("T")
_counting = threading.Lock()

logger = logging.getLogger("loopwright.remote")


class RemoteServer(Backend):
    """Answers with the model of another server.

    One event loop, on a thread of its own, sends all requests and owns the connections; tools and records, which may
    block, run on other threads.
    """

    agent: Agent
    _uses: ClassVar[Counter[tuple[str, str]]] = Counter()
    """Backends of this process by the server's address and the adapter there that they use."""

    def __init__(self, agent: Agent, name: str, config: ServeConfig, adapter: str | None = None) -> None:
        """`adapter`: path of the version's adapter, as the server sees it; None where it is no adapter.

        Raises: InputError when the server's address is missing.
        """
        if not config.backend_url or not config.backend_model:
            raise InputError("params.yaml: serve.backend: openai needs serve.backend_url and serve.backend_model")
        super().__init__(agent, name, config)
        self.sees_pictures = config.backend_sees_pictures
        self.max_new_tokens = config.max_new_tokens
        self.pool = ThreadPoolExecutor(self.room, f"{name}-reply")
        self.url = config.backend_url.rstrip("/")
        self.address = hidden(self.url)
        self.adapter, self._loaded = adapter, False
        self.model_name = name.replace("/", "-") if adapter else config.backend_model
        with _counting:
            self._uses[self.url, self.model_name] += 1
        key = os.environ.get(KEY_VARIABLE)
        limits = httpx.Limits(max_keepalive_connections=self.slots, keepalive_expiry=KEEPALIVE_SECONDS)
        self.client = httpx.AsyncClient(
            timeout=None, limits=limits, headers={"Authorization": f"Bearer {key}"} if key else {}
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name=f"{name}-backend", daemon=True)
        self._thread.start()

    @classmethod
    def load(
        cls,
        folder: Path,
        name: str,
        config: ServeConfig,
        external_tools: Callable[[], Sequence[Tool]] = tuple,
        home: Path | None = None,
    ) -> RemoteServer:
        """The agent of a model folder, whose model the server runs; an adapter is loaded there.

        `home` is the state folder, whose path on the server's machine `serve.adapter_root` gives.

        Raises: InputError when the folder holds no usable agent, or the server's address is missing; BackendNotReady
        when the server has other weights, or does not load the adapter.
        """
        adapter = path_on_server(folder, config.adapter_root, home) if is_adapter(folder) else None
        engine = cls(load_agent(folder, config, external_tools), name, config, adapter)
        ready = asyncio.run_coroutine_threadsafe(engine._prepare(folder, str(config.backend_model)), engine._loop)
        try:
            ready.result()
        except BackendUnavailable as error:  # it is loaded with the first request
            logger.warning("%s: %s", name, error)
        except BaseException:
            engine.close()
            raise
        return engine

    async def _prepare(self, folder: Path, base: str) -> None:
        """Check that the server runs this version's weights, or its base's, and load the adapter."""
        served = (await self._served_models()).get(base)
        await asyncio.to_thread(check_weights, folder, self.name, f"{self.address}: {base}", served)
        if self.adapter:
            await self.load_adapter()

    async def _served_models(self) -> dict[str, str | None]:
        """Path of each model that the server lists, which vLLM calls its root."""
        status, body = await self._ask("GET", "models")
        try:
            return {model["id"]: model.get("root") for model in json.loads(body)["data"]}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise BackendUnavailable(f"{self.address}/models: answered {status}: {body[:80]}") from None

    async def load_adapter(self) -> None:
        """Load this version's adapter into the server, unless it is there.

        Raises: BackendNotReady where the server refuses it, BackendUnavailable where it cannot answer.
        """
        body = {"lora_name": self.model_name, "lora_path": self.adapter}
        status, text = await self._ask("POST", "load_lora_adapter", body)
        message = error_message(text)[0]
        if status == 400 and "already been loaded" in message:
            path = (await self._served_models()).get(self.model_name)
            if path != self.adapter:
                raise BackendNotReady(
                    f"{self.address}: {self.model_name} is another adapter there, {path}; unload that"
                )
        elif status == 404 and "adapter" not in message:
            raise BackendNotReady(f"{self.address}/load_lora_adapter: not found; {VLLM_NEEDS}")
        elif status != 200:
            raise BackendNotReady(f"{self.address}: the adapter {self.adapter} is not loaded: {message}")
        self._loaded = True

    async def _unload_adapter(self) -> None:
        """Unload the adapter where this is the last backend of this process that uses it."""
        with _counting:
            self._uses[self.url, self.model_name] -= 1
            last = not self._uses[self.url, self.model_name]
        if self._loaded and last:
            try:
                await self._ask("POST", "unload_lora_adapter", {"lora_name": self.model_name})
            except BackendUnavailable as error:
                logger.warning("%s: its adapter is not unloaded: %s", self.name, error)

    async def _ask(self, method: str, route: str, body: Mapping[str, Any] | None = None) -> tuple[int, str]:
        """Status and text of the server's answer.

        Raises: BackendUnavailable where it cannot answer now.
        """
        url = f"{self.url}/{route}"
        try:
            response = await self.client.request(method, url, json=body, timeout=LOAD_SECONDS)
        except httpx.HTTPError as error:
            raise unanswered(url, error) from error
        if response.status_code in BUSY:
            raise refusal(response.status_code, response.text)
        return response.status_code, response.text

    @property
    def context_len(self) -> int:
        return self.agent.context_len

    def _run_loop(self) -> None:
        self._loop.run_forever()
        self._loop.run_until_complete(self._unload_adapter())
        self._loop.run_until_complete(self.client.aclose())
        self._loop.close()

    def _new_task(self, request: GenerationRequest, notify: Notify) -> GenerationTask:
        return RemoteTask(self, request, notify)

    def _start(self, task: GenerationTask) -> None:
        assert isinstance(task, RemoteTask)
        asyncio.run_coroutine_threadsafe(task.run(), self._loop)

    def _stop(self) -> None:
        with suppress(RuntimeError):  # stopped and closed before
            self._loop.call_soon_threadsafe(self._loop.stop)
        self.pool.shutdown(wait=False)

    def _join(self) -> None:
        self._thread.join()
        self.pool.shutdown()


class RemoteTask(GenerationTask):
    """One request from its first message to its last event."""

    def __init__(self, engine: RemoteServer, request: GenerationRequest, notify: Notify) -> None:
        super().__init__(engine, request, notify)
        self.engine = engine
        self.steps: list[dict[str, Any]] = []
        self.messages = [with_picture_parts(message) for message in self.request.messages]
        self.session = ToolSession(lambda: engine.agent.tools, request.policy)
        self.tools = self.request.tools or [tool.declaration() for tool in self.session.tools]
        self.usage: Mapping[str, int] = {}
        self.started = False

    async def run(self) -> None:
        try:
            await self._in_thread(self.notify, await self._answer_in_time())
        except Exception as error:
            if not isinstance(error, InputError | DeadlineExceeded):
                logger.error("a request failed", exc_info=error)
            with suppress(Exception):
                await self._in_thread(self.notify, Failure(error))
        finally:
            self.engine.release_slot()
            self.engine.finish(self)

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function that may block on another thread."""
        return await asyncio.get_running_loop().run_in_executor(self.engine.pool, function, *arguments)

    async def _answer_in_time(self) -> Completion:
        """The answer, or its beginning when the client disconnects or the deadline passes."""
        answer = asyncio.ensure_future(self._answer())
        while not answer.done() and not self.cancelled.is_set() and not self.expired:
            await asyncio.wait([answer], timeout=POLL_SECONDS)
        if answer.done():
            return answer.result()
        answer.cancel()
        with suppress(asyncio.CancelledError):
            await answer
        if not self.started and not self.cancelled.is_set():
            raise DeadlineExceeded("the backend did not answer within serve.request_seconds; try again later")
        return self._finish("cancelled" if self.cancelled.is_set() else "length")

    async def _answer(self) -> Completion:
        for turns_left in reversed(range(self.engine.agent.max_steps)):
            text, calls, reason = await self._turn(last=not turns_left and not self.request.tools)
            if not calls or self.request.tools:
                return self._finish(reason, calls[:1] if self.request.one_call else calls)
            if self.session.needs_confirmation({each["function"]["name"] for each in calls}):
                self.send_calls(calls)
                return self._finish("tool_calls", calls)
            self.messages.append({"role": "assistant", "content": text, "tool_calls": calls})
            for tool_call in calls:
                await self._run_tool(tool_call)
        self.send_text(GAVE_UP.format(steps=self.engine.agent.max_steps))
        return self._finish("stop")

    async def _turn(self, last: bool) -> tuple[str, list[dict[str, Any]], str]:
        """Text, calls and the reason of the end of one turn of the model."""
        text, calls, reason = "", dict[int, dict[str, Any]](), "stop"
        async for chunk in self._chunks(self._body(last)):
            if not self.started:
                self.started = True
                await self._in_thread(self.notify, Start())
            self.usage = chunk.get("usage") or self.usage
            for choice in chunk.get("choices", []):
                delta, reason = choice.get("delta") or {}, choice.get("finish_reason") or reason
                text += delta.get("content") or ""
                self.send_text(delta.get("content") or "")
                for part in delta.get("tool_calls") or []:
                    _join(calls.setdefault(part.get("index", 0), {}), part)
                    if self.request.tools:
                        self.notify(ToolCallDelta(part))
        self.written += int(self.usage.get("completion_tokens", 0))
        return text, [calls[index] for index in sorted(calls)], reason

    def _body(self, last: bool) -> dict[str, Any]:
        limit = (
            self.engine.max_new_tokens if self.request.max_tokens is None else self.request.max_tokens - self.written
        )
        body: dict[str, Any] = {
            "model": self.engine.model_name,
            "messages": self.messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": max(1, limit),
            "temperature": self.request.temperature,
            "top_p": self.request.top_p,
        }
        options = self.request.options
        if self.tools and self.request.may_call:
            choice: Any = {"type": "function", "function": {"name": options.tool}} if options.tool else options.calls
            body |= {"tools": list(self.tools), "tool_choice": "none" if last else choice}
        if options.schema is not None:
            shape = {"name": "answer", "schema": options.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": shape}
        if self.request.seed is not None:
            body["seed"] = self.request.seed
        if self.request.stops:
            body["stop"] = list(self.request.stops)
        return body

    async def _chunks(self, body: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """The server's events.

        Raises: InputError where it refuses the request, BackendUnavailable where it cannot answer.
        """
        engine, url = self.engine, f"{self.engine.url}/chat/completions"
        try:
            async with AsyncExitStack() as stack:
                response = await stack.enter_async_context(engine.client.stream("POST", url, json=body))
                if response.status_code == 404 and engine.adapter:  # the server was restarted
                    await response.aread()
                    await engine.load_adapter()
                    response = await stack.enter_async_context(engine.client.stream("POST", url, json=body))
                if response.status_code != 200:
                    raise refusal(response.status_code, (await response.aread()).decode(errors="replace"))
                async for line in response.aiter_lines():
                    if (chunk := self._chunk(line)) is not None:
                        yield chunk
        except httpx.HTTPError as error:
            raise unanswered(url, error) from error

    def _chunk(self, line: str) -> dict[str, Any] | None:
        """The JSON of a line of server-sent events; None where it has none."""
        data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
        if not data or data == "[DONE]":
            return None
        try:
            chunk = json.loads(data)
        except ValueError as error:
            raise BackendUnavailable(f"{self.engine.address}: an event is not JSON: {error}", False) from error
        if not isinstance(chunk, dict):
            raise BackendUnavailable(f"{self.engine.address}: an event is not a JSON object: {data[:80]}", False)
        if reported := chunk.get("error"):
            message = reported.get("message") if isinstance(reported, dict) else reported
            raise BackendUnavailable(f"{self.engine.address}: {message}", False)
        return chunk

    async def _run_tool(self, tool_call: dict[str, Any]) -> None:
        name, arguments = tool_call["function"]["name"], tool_call["function"]["arguments"]
        with suppress(ValueError):
            arguments = json.loads(arguments)
        self._step({"type": "call", "name": name, "arguments": arguments})
        content = await self._in_thread(self.session.call, name, arguments)
        self._step({"type": "result", "name": name, "content": content})
        self.messages.append({"role": "tool", "tool_call_id": tool_call["id"], "name": name, "content": content})

    def _step(self, step: dict[str, Any]) -> None:
        self.steps.append(step)
        self.notify(AgentStep(step))

    def _finish(self, reason: str, calls: list[dict[str, Any]] | None = None) -> Completion:
        prompt_tokens = int(self.usage.get("prompt_tokens", 0))
        return Completion("".join(self.text), self.steps, calls or [], reason, prompt_tokens, self.written)


def _join(call: dict[str, Any], part: Mapping[str, Any]) -> None:
    """Merge a delta into its tool call."""
    function = part.get("function") or {}
    if not call:
        number = part.get("id") or f"call_{uuid.uuid4().hex[:24]}"
        call |= {"id": number, "type": "function", "function": {"name": "", "arguments": ""}}
    for key in ("name", "arguments"):
        call["function"][key] += function.get(key) or ""
