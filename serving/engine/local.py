"""A backend whose model runs in this process: a scheduler for each device generates, a decode step at a time.

Prompts, tools and records are processed on other threads, so that they do not block the scheduler.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from components.agent.agent import Agent, Answer, ContextTooLong, Prompt
from components.agent.tools import Tool
from components.config.loop_settings import ServeConfig
from components.inference.batching import Row
from components.inference.served_model import load_replicas
from components.models.base_store import base_folder, is_adapter
from components.models.decoder import Decoder
from components.tokenization.call_formats import CallTextFilter
from components.tokenization.chat_tokenizer import ChatTokenizer
from components.tokenization.tool_calls import ToolCallDeltaParser, new_call_id, openai_call
from serving.engine.backend import (
    AgentStep,
    Backend,
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
from serving.engine.router import Router, serving_devices
from serving.engine.scheduler import Turn
from serving.engine.shared_base import SharedBase

COLD = 1e-4
"""Temperatures below this are greedy; dividing by them would overflow."""

logger = logging.getLogger("loopwright.engine")


class LocalEngine(Backend):
    """One model, its agent, and who answers with them."""

    agent: Agent

    def __init__(
        self,
        models: Sequence[Decoder],
        agent: Agent,
        name: str,
        config: ServeConfig,
        slots: int = 0,
        on_step: Callable[[int], None] = lambda rows: None,
        shared: tuple[SharedBase, int] | None = None,
    ) -> None:
        """`models`: the model on each device; `on_step` is called with the number of requests in each decode step.

        `shared`: the base with which others share the models, and the number of this engine's adapter.
        """
        self._shared = shared[0] if shared else None
        self.adapter = shared[1] if shared else 0
        self.router = self._shared.router if self._shared else Router(models, name, config, slots, self._on_step)
        super().__init__(agent, name, config, self.router.count)
        agent.context_len = self.router.context
        if self.router.note:
            logger.warning("%s: %s", name, self.router.note)
        self.model = self.router.models[0]
        self.sees_pictures = self.model.sees_pictures
        self.max_new_tokens = config.max_new_tokens
        self._observe_step = on_step
        # As many as there may be requests: every one of them may be waiting for a tool.
        self.pool = ThreadPoolExecutor(self.room, f"{name}-reply")
        self._stopped = threading.Event()
        if self._shared is not None:
            self._shared.listen(self.adapter, self._on_step)

    @classmethod
    def load(
        cls,
        folder: Path,
        name: str,
        config: ServeConfig,
        external_tools: Callable[[], Sequence[Tool]] = tuple,
        on_step: Callable[[int], None] = lambda rows: None,
    ) -> LocalEngine:
        """Load a model folder and answer one request as a warm-up.

        Raises: InputError when the folder holds no usable model.
        """
        agent = load_agent(folder, config, external_tools)

        def load(source: Path) -> list[Decoder]:
            return load_replicas(source, agent.tokenizer, config.int8, serving_devices(config.devices))

        if is_adapter(folder):
            shared = SharedBase.open(folder, config, lambda: load(base_folder(folder)))
            engine = cls((), agent, name, config, on_step=on_step, shared=shared)
        else:
            engine = cls(load(folder), agent, name, config, on_step=on_step)
        engine.warm()
        return engine

    def warm(self) -> None:
        """Answer a request, and a turn on each other device."""
        done, chat = threading.Semaphore(0), [{"role": "user", "content": "Hello"}]
        self.submit(
            GenerationRequest(chat, rules=self.agent.rules(), max_tokens=2),
            lambda event: done.release() if isinstance(event, Completion | Failure) else None,
        )
        done.acquire()
        ids = self.agent.tokenizer.encode_chat(chat, None, add_generation_prompt=True)[0]
        for scheduler in self.router.schedulers[1:]:
            row = Row(ids, 2, adapter=self.adapter)
            scheduler.submit(Turn(row, lambda token: True, lambda error: done.release(), math.inf))
            done.acquire()

    @property
    def context_len(self) -> int:
        return self.agent.context_len

    def _new_task(self, request: GenerationRequest, notify: Notify) -> GenerationTask:
        return LocalTask(self, request, notify)

    def _start(self, task: GenerationTask) -> None:
        assert isinstance(task, LocalTask)
        self.pool.submit(task.begin)

    def _on_step(self, rows: int) -> None:
        """Start expired requests, which ends them: while all slots are in use, only steps run."""
        self._observe_step(rows)
        if self._waiting:  # whether one is expired is decided under the lock: another thread may empty the queue
            self.start_waiting()

    def _stop(self) -> None:
        if self._shared is not None:
            self._shared.leave(self.adapter)
        else:
            self.router.end()
        self.pool.shutdown(wait=False)
        self._stopped.set()

    def _join(self) -> None:
        self._stopped.wait()
        if self._shared is None:
            self.router.join()
        self.pool.shutdown()


class _Steps(list[dict[str, Any]]):
    """The agent's steps, sent as they are appended: a call before its tool runs."""

    def __init__(self, tell: Callable[[dict[str, Any]], None]) -> None:
        super().__init__()
        self._told = tell

    def append(self, step: dict[str, Any]) -> None:
        super().append(step)
        self._told(step)


class LocalTask(GenerationTask):
    """One request: the agent's turns, the text as it is generated, and the tool calls.

    `begin` and `_go_on` run on the engine's pool, `_push` and `_ended` on the scheduler's thread, never concurrently.
    """

    def __init__(self, engine: LocalEngine, request: GenerationRequest, notify: Notify) -> None:
        super().__init__(engine, request, notify)
        self.engine, agent = engine, engine.agent
        self.agent = agent if self.request.may_call else Agent(agent.tokenizer, (), 1, agent.context_len)
        self.calls = ToolCallDeltaParser(agent.tokenizer)
        self.steps = _Steps(lambda step: notify(AgentStep(step)))
        self.conversation = self.agent.answer(
            self.request.messages, self.request.tools, self.steps, self.request.rules, self.request.policy
        )
        self.speech = StopSequenceFilter(agent.tokenizer, self.request.stops)
        self.words = self._call_filter()
        self.turn = -1
        self.row: Row | None = None
        """The row of this turn; None where no token is left."""
        self.stopped = False
        self.prompt_tokens = 0

    def _call_filter(self) -> CallTextFilter | None:
        """For a turn that may call in a format whose marks are no special tokens."""
        may_call = not self.agent.tokenizer.native and (self.request.tools or self.agent.tools)
        return CallTextFilter(self.agent.tokenizer.call_format) if may_call else None

    def begin(self) -> None:
        """Render the first prompt and submit its turn."""
        try:
            prompt = self._first()
        except Exception as error:  # noqa: BLE001 - logged and reported below
            self.engine.release_slot()
            self._fail(error)
        else:
            if prompt is None:
                self.engine.release_slot()
            else:
                self._write(prompt)

    def _first(self) -> Prompt | None:
        if self.cancelled.is_set():
            self._end(self._finish(None, "cancelled"))
            return None
        if self.expired:
            raise DeadlineExceeded
        prompt = next(self.conversation)
        self.notify(Start())
        return prompt

    def _write(self, prompt: Prompt) -> None:
        """Submit a turn to the scheduler."""
        self.turn += 1
        self.prompt_tokens = len(prompt.ids)
        left = self.engine.max_new_tokens if self.request.max_tokens is None else self.request.max_tokens - self.written
        left = min(left, self.agent.context_len - len(prompt.ids))
        self.speech = StopSequenceFilter(self.agent.tokenizer, self.request.stops)
        self.words = self._call_filter()
        if left <= 0:
            self.row = None
            self._ended(None)
            return
        greedy = self.request.temperature < COLD or self.request.top_p == 0
        self.row = Row(
            prompt.ids,
            left,
            temperature=0.0 if greedy else self.request.temperature,
            top_p=self.request.top_p or 1.0,
            seed=None if self.request.seed is None else self.request.seed + self.turn,
            stop_ids=(self.agent.tokenizer.end_id,),
            constraint=prompt.constraint,
            adapter=self.engine.adapter,
            pictures=prompt.pictures,
        )
        turn = Turn(self.row, self._push, self._ended, self.deadline, self.cancelled)
        self.engine.router.submit(turn, first=self.turn > 0)

    def _push(self, number: int) -> bool:
        """Send the text and calls that a token completes; false when a stop string ends the turn."""
        self.written += 1
        text = self.speech.push(number)
        self.send_text(self.words.push(text) if self.words is not None else text)
        for delta in self.calls.push(number) if self.request.tools else ():
            self.notify(ToolCallDelta(delta))
        return not self.speech.stopped

    def _ended(self, error: Exception | None) -> None:
        """Continue with a generated turn on the pool, where it may block."""
        self.engine.pool.submit(self._go_on, error)
        self.engine.release_slot()

    def _go_on(self, error: Exception | None) -> None:
        """Run the turn's tool calls and submit the next turn, or end."""
        try:
            if error is not None:
                raise error
            if self.cancelled.is_set():
                self._end(self._finish(None, "cancelled"))
                return
            prompt = self._answer()
        except Exception as failure:  # noqa: BLE001 - logged and reported below
            self._fail(failure)
        else:
            if prompt is not None:
                self.engine.acquire_slot()
                self._write(prompt)

    def _answer(self) -> Prompt | None:
        """The prompt of the next turn; None when that was the last."""
        text = self.speech.flush()
        self.send_text(self.words.push(text) + self.words.flush() if self.words is not None else text)
        self.stopped = self.speech.stopped
        if self.expired:
            if not self.written:  # it waited for memory all the time
                raise DeadlineExceeded
            self._end(self._finish(None))
            return None
        answer = None
        try:
            return self.conversation.send(self.row.generated if self.row is not None else [])
        except StopIteration as stop:
            answer = stop.value
        except ContextTooLong:
            pass  # a tool's result left no room for an answer
        self._end(self._finish(answer))
        return None

    def _end(self, finished: Completion) -> None:
        self.notify(finished)
        self.engine.finish(self)

    def _fail(self, error: Exception) -> None:
        # Bad input is reported to the client only; other errors are logged too.
        if not isinstance(error, ContextTooLong | DeadlineExceeded):
            logger.error("a request failed", exc_info=error)
        try:
            self.notify(Failure(error))
        finally:
            self.engine.finish(self)

    def _finish(self, answer: Answer | None, reason: str = "length") -> Completion:
        calls: list[dict[str, Any]] = []
        if answer is not None:
            reason = "stop" if self.stopped else answer.finish_reason
            numbers = self.calls.ids if self.request.tools else map(new_call_id, answer.tool_calls)
            calls = [openai_call(call, number) for call, number in zip(answer.tool_calls, numbers, strict=False)]
            self.send_calls([] if self.request.tools else calls)
            if not self.text and not self.stopped and not calls:
                self.send_text(answer.content)  # the agent's fallback answer, when the model ended on a call
        return Completion(
            content="".join(self.text),
            steps=list(self.steps),
            tool_calls=calls[:1] if self.request.one_call else calls,
            finish_reason=reason,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.written,
        )


class StopSequenceFilter:
    """The text of one turn as its ids are generated: whole characters, without calls, up to a stop string."""

    def __init__(self, tokenizer: ChatTokenizer, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._stream = tokenizer.stream()
        self._held = ""
        """May be the beginning of a stop string."""
        self._first = self._speaking = True
        self.stopped = False

    def push(self, number: int) -> str:
        """Text that certainly belongs to the answer."""
        if not self._speaking:
            return ""
        if not self._tokenizer.token_bytes(number):  # a special token: calls or the end follow
            return self.flush()
        return self._certain(self._stream.push(number))

    def flush(self) -> str:
        """The text held back, at the end of the turn."""
        if not self._speaking:
            return ""
        text = self._certain(self._stream.flush())
        self._speaking = False
        held, self._held = self._held, ""
        return text + ("" if self.stopped else held)

    def _certain(self, text: str) -> str:
        if self._first and text:
            self._first, text = False, text.removeprefix(" ")  # the template's space before all text
        text = self._held + text
        cut = min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=None)
        if cut is not None:
            self.stopped, self._speaking, self._held = True, False, ""
            return text[:cut]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a prefix of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)
