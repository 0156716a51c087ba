"""One loaded model answering requests: `submit` goes in, events come out, nothing is known of HTTP.

A few threads each drive one request from start to end; the bound on how many may wait is what
keeps the endpoint honest when it is full. How tokens are made is `_generate`'s business alone.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from components.agent.agent import Agent, Answer, ContextTooLong, Prompt, openai_call
from components.config import ServeConfig
from components.data.tokenizer import ChatTokenizer
from components.generation.decode import Sampling, stream
from components.models.checkpoint import load_decoder
from components.models.decoder import Decoder

SMALL_MODEL = 50_000_000
"""Parameters up to which one torch thread per request beats several: waking threads costs more than the products."""

COLD = 1e-4
"""Temperatures under this are greedy; dividing by them would overflow."""

logger = logging.getLogger("loopwright.engine")


@dataclass(frozen=True)
class Ask:
    """What to answer, and how."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    """The client's tools: calls of them are handed back. Without, the agent uses its own."""
    may_call: bool = True
    one_call: bool = False
    """Hand back the first call of a turn only."""
    max_tokens: int | None = None
    """Over all turns; None: the configured number for each turn."""
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stops: tuple[str, ...] = ()


@dataclass(frozen=True)
class Started:
    """The request has a slot and fits the context."""


@dataclass(frozen=True)
class Text:
    """More of the answer, whole characters."""

    text: str


@dataclass(frozen=True)
class Stepped:
    """The agent called a tool, or a tool answered."""

    step: dict[str, Any]


@dataclass(frozen=True)
class Finished:
    """The last event of a request: `content` is all its `Text` in one."""

    content: str
    steps: list[dict[str, Any]]
    tool_calls: list[dict[str, Any]]
    finish_reason: str
    """stop, length, tool_calls; cancelled when the client went away."""
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Failed:
    """The last event of a request that could not be answered."""

    error: Exception


Event = Started | Text | Stepped | Finished | Failed
Notify = Callable[[Event], None]


class Full(Exception):
    """As many requests wait as may wait."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


class Retired(Exception):
    """This engine takes no more requests: another model took its place."""


class Cancelled(Exception):
    """The client went away."""


@dataclass(eq=False)
class Ticket:
    """One submitted request; `cancel` frees its slot at the next token."""

    ask: Ask
    notify: Notify
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        self.cancelled.set()


class Engine:
    """One model, its agent, and the threads that answer with them."""

    def __init__(self, model: Decoder, agent: Agent, name: str, config: ServeConfig, slots: int = 0) -> None:
        self.name = name
        """`NAME/VERSION`."""
        self.loaded = int(time.time())
        """Unix time."""
        self.model, self.agent = model, agent
        self.max_new_tokens = config.max_new_tokens
        self.slots = slots or max(2, os.cpu_count() or 1)
        self._room = self.slots + config.max_waiting
        self._waiting: deque[Ticket] = deque()
        self._running: set[Ticket] = set()
        self._changed = threading.Condition()
        self._retired = False
        self._seconds = 1.0
        """Running mean of what one request takes, for `Retry-After`."""
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True) for number in range(self.slots)
        ]
        for thread in self._threads:
            thread.start()

    @classmethod
    def load(cls, folder: Path, name: str, config: ServeConfig) -> Engine:
        """Load a model folder and answer one throw-away request, so that the first real one is not slow.

        Raises: InputError when the folder holds no usable model.
        """
        model = load_decoder(folder, device="cuda" if torch.cuda.is_available() else None).eval()
        parameters = sum(part.numel() for part in model.parameters())
        torch.set_num_threads(1 if parameters <= SMALL_MODEL else max(1, (os.cpu_count() or 1) // 2))
        agent = Agent.load(folder, model.config.max_seq_len)
        agent.max_steps = min(agent.max_steps, config.max_steps)
        engine = cls(model, agent, name, config)
        engine.warm()
        return engine

    def warm(self) -> None:
        done = threading.Event()
        self.submit(
            Ask([{"role": "user", "content": "Hello"}], may_call=False, max_tokens=2),
            lambda event: done.set() if isinstance(event, Finished | Failed) else None,
        )
        done.wait()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def submit(self, ask: Ask, notify: Notify, first: bool = False) -> Ticket:
        """Queue a request; `notify` is called from the engine's threads, last with Finished or Failed.

        `first` puts it before all that wait, however many they are.

        Raises: Full, Retired.
        """
        ticket = Ticket(ask, notify)
        with self._changed:
            if self._retired:
                raise Retired
            unfinished = len(self._waiting) + len(self._running)
            if unfinished >= self._room and not first:
                raise Full(max(1, math.ceil(self._seconds * unfinished / self.slots)))
            self._waiting.insert(0 if first else len(self._waiting), ticket)
            self._changed.notify()
        return ticket

    def retire(self) -> None:
        """Take no more requests; finish those that are here, then let go of the threads."""
        with self._changed:
            self._retired = True
            self._changed.notify_all()

    def close(self) -> None:
        """Retire, cancel what is left and wait for the threads."""
        self.retire()
        with self._changed:
            for ticket in (*self._waiting, *self._running):
                ticket.cancel()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (ticket := self._next()) is not None:
            start = time.monotonic()
            try:
                ticket.notify(self._answer(ticket))
            except Exception as error:
                # Bad input is the client's to hear of, anything else also ours to mend; the thread lives on.
                if not isinstance(error, ContextTooLong):
                    logger.exception("a request failed")
                ticket.notify(Failed(error))
            with self._changed:
                self._running.discard(ticket)
                self._seconds += 0.2 * (time.monotonic() - start - self._seconds)

    def _next(self) -> Ticket | None:
        with self._changed:
            while not self._waiting:
                if self._retired:
                    return None
                self._changed.wait()
            ticket = self._waiting.popleft()
            self._running.add(ticket)
            return ticket

    def _answer(self, ticket: Ticket) -> Finished:
        return _Reply(self, ticket).run()

    def generate(self, prompt: Prompt, ask: Ask, limit: int, turn: int) -> Iterator[int]:
        """Ids of one model turn, the end token included when it is reached."""
        greedy = ask.temperature < COLD or ask.top_p == 0
        sampling = Sampling(
            max_new_tokens=limit,
            temperature=0.0 if greedy else ask.temperature,
            top_p=ask.top_p or 1.0,
            seed=None if ask.seed is None else ask.seed + turn,
            stop_ids=(self.agent.tokenizer.end_id,),
        )
        return stream(self.model, prompt.ids, sampling, prompt.constraint)


class _Reply:
    """One request from its first prompt to its last event."""

    def __init__(self, engine: Engine, ticket: Ticket) -> None:
        self.engine, self.ask, self.ticket = engine, ticket.ask, ticket
        agent = engine.agent
        self.agent = agent if self.ask.may_call else Agent(agent.tokenizer, (), 1, agent.context_len)
        self.said: list[str] = []
        self.steps: list[dict[str, Any]] = []
        self.stopped = False
        self.prompt_tokens = 0
        self.written = 0

    def run(self) -> Finished:
        try:
            return self._finish(self._converse())
        except Cancelled:
            return self._finish(None, "cancelled")

    def _converse(self) -> Answer | None:
        """Drive the agent to its answer; None when a tool's result left no room for one."""
        if self.ticket.cancelled.is_set():
            raise Cancelled
        conversation = self.agent.answer(self.ask.messages, self.ask.tools, self.steps)
        prompt = next(conversation)
        self.ticket.notify(Started())
        turn = 0
        while True:
            told = len(self.steps)
            ids = self._turn(prompt, turn)
            try:
                prompt = conversation.send(ids)
            except StopIteration as stop:
                answer: Answer = stop.value
                return answer
            except ContextTooLong:
                return None
            finally:
                for step in self.steps[told:]:
                    self.ticket.notify(Stepped(step))
            turn += 1

    def _turn(self, prompt: Prompt, turn: int) -> list[int]:
        """Generate one turn, telling its words as they come."""
        self.prompt_tokens = len(prompt.ids)
        left = self.engine.max_new_tokens if self.ask.max_tokens is None else self.ask.max_tokens - self.written
        left = min(left, self.agent.context_len - len(prompt.ids))
        speech = Speech(self.agent.tokenizer, self.ask.stops)
        ids: list[int] = []
        if left > 0:
            for number in self.engine.generate(prompt, self.ask, left, turn):
                if self.ticket.cancelled.is_set():
                    raise Cancelled
                ids.append(number)
                self.written += 1
                self._tell(speech.push(number))
                if speech.stopped:
                    self.stopped = True
                    return ids
        self._tell(speech.flush())
        self.stopped = speech.stopped
        return ids

    def _tell(self, text: str) -> None:
        if text:
            self.said.append(text)
            self.ticket.notify(Text(text))

    def _finish(self, answer: Answer | None, reason: str = "length") -> Finished:
        calls: list[dict[str, Any]] = []
        if answer is not None:
            reason = "stop" if self.stopped else answer.finish_reason
            calls = [openai_call(call, f"call_{uuid.uuid4().hex[:24]}") for call in answer.tool_calls]
            if not self.said and not self.stopped:
                self._tell(answer.content)  # the agent's own words, when the model ended on a call
        return Finished(
            content="".join(self.said),
            steps=self.steps,
            tool_calls=calls[:1] if self.ask.one_call else calls,
            finish_reason=reason,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.written,
        )


class Speech:
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
        if not self._tokenizer.decode([number]):  # a special token: what follows are calls, or nothing
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
