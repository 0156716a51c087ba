"""A model of this process: its requests are written by one scheduler, a step of the model for all of them at a time.

Prompts, tools and records are the work of other threads (`serving/engine/scheduler.py` says why), so that none of them
is waited for.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from components.agent.agent import Agent, Answer, ContextTooLong, Prompt
from components.agent.tools import Tool
from components.config.loop_settings import ServeConfig
from components.inference.batching import ContinuousBatch, Row, generate
from components.inference.packed_weights import pack, round_checked, should_pack
from components.models.checkpoint import load_decoder
from components.models.decoder import Decoder
from components.models.devices import best_device, compute_dtype, threads_for, use_threads
from components.tokenization.chat_tokenizer import ChatTokenizer
from components.tokenization.tool_calls import ToolCallDeltaParser, openai_call
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
from serving.engine.scheduler import Scheduler, Turn

INT8_AGREEMENT = 0.98
"""Of the tokens that a model takes behind its own answers to SAMPLES, in full and rounded to int8."""
SAMPLES = ("Hello", "Thank you!", "What can you do?", "How much is 37 times 12?", "Tell me a story.")
COLD = 1e-4
"""Temperatures under this are greedy; dividing by them would overflow."""

logger = logging.getLogger("loopwright.engine")


class LocalEngine(Backend):
    """One model, its agent, and who answers with them."""

    agent: Agent

    def __init__(
        self,
        model: Decoder,
        agent: Agent,
        name: str,
        config: ServeConfig,
        slots: int = 0,
        on_step: Callable[[int], None] = lambda rows: None,
    ) -> None:
        """`on_step` is told of each step of the model how many requests wrote a token in it."""
        batch = ContinuousBatch(model, slots or config.max_running, config.max_context_tokens)
        super().__init__(agent, name, config, batch.count)
        agent.context_len = batch.context
        if note := batch.plan.note(model.config.max_seq_len, slots or config.max_running):
            logger.warning("%s: %s", name, note)
        self.model = model
        self.max_new_tokens = config.max_new_tokens
        self._observe_step = on_step
        # As many as there may be requests: every one of them may be waiting for a tool.
        self.pool = ThreadPoolExecutor(self.room, f"{name}-reply")
        self.scheduler = Scheduler(batch, name, self._on_step)

    @classmethod
    def load(
        cls,
        folder: Path,
        name: str,
        config: ServeConfig,
        external_tools: Callable[[], Sequence[Tool]] = tuple,
        on_step: Callable[[int], None] = lambda rows: None,
    ) -> LocalEngine:
        """Load a model folder and answer one throw-away request, so that the first real one is not slow.

        Raises: InputError when the folder holds no usable model.
        """
        agent = load_agent(folder, config, external_tools)
        device = best_device()
        # As it was trained: a GPU computes in bf16 twice as fast and more, and reads half as much.
        model = load_decoder(folder, compute_dtype("auto", device) if device.type == "cuda" else torch.float32, device)
        model.eval()
        use_threads(threads_for(model.num_parameters))
        if config.int8 and not model.embed.weight.is_cuda:
            round_checked(model, _sample(model, agent), INT8_AGREEMENT)
        if should_pack(model):
            pack(model)
        engine = cls(model, agent, name, config, on_step=on_step)
        engine.warm()
        return engine

    def warm(self) -> None:
        done = threading.Event()
        self.submit(
            GenerationRequest([{"role": "user", "content": "Hello"}], rules=self.agent.rules(), max_tokens=2),
            lambda event: done.set() if isinstance(event, Completion | Failure) else None,
        )
        done.wait()

    @property
    def context_len(self) -> int:
        return self.agent.context_len

    def _new_task(self, request: GenerationRequest, notify: Notify) -> GenerationTask:
        return LocalTask(self, request, notify)

    def _start(self, task: GenerationTask) -> None:
        assert isinstance(task, LocalTask)
        self.pool.submit(task.begin)

    def _on_step(self, rows: int) -> None:
        """While all slots are taken, nothing but steps happens: who has waited too long is told so after one."""
        self._observe_step(rows)
        if self._waiting and self._waiting[0].expired:
            self.start_waiting()

    def _stop(self) -> None:
        self.scheduler.end()
        self.pool.shutdown(wait=False)

    def _join(self) -> None:
        self.scheduler.join()
        self.pool.shutdown()


def _sample(model: Decoder, agent: Agent) -> list[list[int]]:
    """Some questions, each with the model's own answer."""
    chats: list[tuple[list[dict[str, str]], None]] = [([{"role": "user", "content": text}], None) for text in SAMPLES]
    prompts = agent.tokenizer.encode_chats(chats, add_generation_prompt=True)
    rows = [Row(ids, 48, stop_ids=(agent.tokenizer.end_id,)) for ids, _ in prompts]
    generate(model, rows)
    return [row.ids for row in rows]


class _Steps(list[dict[str, Any]]):
    """What the agent does, told as it happens: a call before its tool has run."""

    def __init__(self, tell: Callable[[dict[str, Any]], None]) -> None:
        super().__init__()
        self._told = tell

    def append(self, step: dict[str, Any]) -> None:
        super().append(step)
        self._told(step)


class LocalTask(GenerationTask):
    """One request from its first prompt to its last event: the agent's turns, the words as they come, its tools.

    `begin` and `_go_on` run on the engine's pool, `_push` and `_ended` on the scheduler's thread: one at a time.
    """

    def __init__(self, engine: LocalEngine, request: GenerationRequest, notify: Notify) -> None:
        super().__init__(engine, request, notify)
        self.engine, agent = engine, engine.agent
        self.agent = agent if self.request.may_call else Agent(agent.tokenizer, (), 1, agent.context_len)
        self.calls = ToolCallDeltaParser(agent.tokenizer)
        self.steps = _Steps(lambda step: notify(AgentStep(step)))
        self.conversation = self.agent.answer(self.request.messages, self.request.tools, self.steps, self.request.rules)
        self.speech = StopSequenceFilter(agent.tokenizer, self.request.stops)
        self.turn = -1
        self.row: Row | None = None
        """What the model writes in this turn; none where it may write nothing."""
        self.stopped = False
        self.prompt_tokens = 0

    def begin(self) -> None:
        """Make the first prompt and hand it in."""
        try:
            prompt = self._first()
        except Exception as error:  # noqa: BLE001 - logged below, and told
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
        """Let the model write a turn."""
        self.turn += 1
        self.prompt_tokens = len(prompt.ids)
        left = self.engine.max_new_tokens if self.request.max_tokens is None else self.request.max_tokens - self.written
        left = min(left, self.agent.context_len - len(prompt.ids))
        self.speech = StopSequenceFilter(self.agent.tokenizer, self.request.stops)
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
        )
        turn = Turn(self.row, self._push, self._ended, self.deadline, self.cancelled)
        self.engine.scheduler.submit(turn, first=self.turn > 0)

    def _push(self, number: int) -> bool:
        """Tell the words that a token makes whole; false when no more are wanted."""
        self.written += 1
        self.send_text(self.speech.push(number))
        for delta in self.calls.push(number) if self.request.tools else ():
            self.notify(ToolCallDelta(delta))
        return not self.speech.stopped

    def _ended(self, error: Exception | None) -> None:
        """The turn is written; what comes of it is worked out elsewhere, and may take its time."""
        self.engine.pool.submit(self._go_on, error)
        self.engine.release_slot()

    def _go_on(self, error: Exception | None) -> None:
        """Run the tools that the turn calls and hand in the next one, or end."""
        try:
            if error is not None:
                raise error
            if self.cancelled.is_set():
                self._end(self._finish(None, "cancelled"))
                return
            prompt = self._answer()
        except Exception as failure:  # noqa: BLE001 - logged below, and told
            self._fail(failure)
        else:
            if prompt is not None:
                self.engine.acquire_slot()
                self._write(prompt)

    def _answer(self) -> Prompt | None:
        """The prompt of the next turn; None when that was the last."""
        self.send_text(self.speech.flush())
        self.stopped = self.speech.stopped
        if self.expired:
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
        # Bad input is the client's to hear of, anything else also ours to mend.
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
            calls = [openai_call(call, number) for call, number in zip(answer.tool_calls, self.calls.ids, strict=False)]
            if not self.text and not self.stopped:
                self.send_text(answer.content)  # the agent's own words, when the model ended on a call
        return Completion(
            content="".join(self.text),
            steps=list(self.steps),
            tool_calls=calls[:1] if self.request.one_call else calls,
            finish_reason=reason,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.written,
        )


class StopSequenceFilter:
    """The words of one turn as its ids come: whole characters, no call, nothing from a stop string on."""

    def __init__(self, tokenizer: ChatTokenizer, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._stream = tokenizer.stream()
        self._held = ""
        """Could be the beginning of a stop string."""
        self._first = self._speaking = True
        self.stopped = False

    def push(self, number: int) -> str:
        """Text that is now certain to belong to the answer."""
        if not self._speaking:
            return ""
        if not self._tokenizer.token_bytes(number):  # a special token: what follows are calls, or nothing
            return self.flush()
        return self._certain(self._stream.push(number))

    def flush(self) -> str:
        """What was held back, now that no more text comes."""
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
    """Length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)
