"""One request from its first prompt to its last event: the agent's turns, the words as they come, the tools between.

What is asked and what is told of the answer are declared here; `serving/engine/local.py` says when.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from components.agent.agent import AS_IT_LIKES, Agent, Answer, ContextTooLong, Prompt, openai_call
from components.agent.turn_grammar import Wish
from components.agent.turns import Rules
from components.inference.batching import Row
from serving.engine.scheduler import Turn
from serving.http.stop_filter import Speech
from serving.http.tool_call_stream import CallStream

if TYPE_CHECKING:
    from serving.engine.local import Engine

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
    rules: Rules | None = None
    """What each turn keeps to (`Agent.rules`); without, the model writes what it likes."""
    wish: Wish = AS_IT_LIKES
    """What `rules` were made of."""
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
class Called:
    """More of a call of the client's tools: OpenAI's delta, one of `tool_calls`."""

    delta: dict[str, Any]


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


Event = Started | Text | Called | Stepped | Finished | Failed
Notify = Callable[[Event], None]


class Late(Exception):
    """Nobody had time for this request within its deadline."""


@dataclass(eq=False)
class Ticket:
    """One submitted request; `cancel` frees its slot before the next token."""

    ask: Ask
    notify: Notify
    deadline: float
    """By `time.monotonic()`."""
    forget: Callable[[Ticket], None]
    """Told of the cancelling."""
    begun: float = 0.0
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        self.cancelled.set()
        self.forget(self)

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline


class _Steps(list[dict[str, Any]]):
    """What the agent does, told as it happens: a call before its tool has run."""

    def __init__(self, tell: Callable[[dict[str, Any]], None]) -> None:
        super().__init__()
        self._told = tell

    def append(self, step: dict[str, Any]) -> None:
        super().append(step)
        self._told(step)


class Reply:
    """One request from its first prompt to its last event.

    `begin` and `_go_on` run on the engine's pool, `_push` and `_ended` on the scheduler's thread: one at a time.
    """

    def __init__(self, engine: Engine, ticket: Ticket) -> None:
        self.engine, self.ask, self.ticket = engine, ticket.ask, ticket
        agent = engine.agent
        self.agent = agent if self.ask.may_call else Agent(agent.tokenizer, (), 1, agent.context_len)
        self.calls = CallStream(agent.tokenizer)
        self.said: list[str] = []
        self.steps = _Steps(lambda step: ticket.notify(Stepped(step)))
        self.conversation = self.agent.answer(self.ask.messages, self.ask.tools, self.steps, self.ask.rules)
        self.speech = Speech(agent.tokenizer, self.ask.stops)
        self.turn = -1
        self.row: Row | None = None
        """What the model writes in this turn; none where it may write nothing."""
        self.stopped = False
        self.prompt_tokens = 0
        self.written = 0

    def begin(self) -> None:
        """Make the first prompt and hand it in."""
        try:
            prompt = self._first()
        except Exception as error:  # noqa: BLE001 - logged below, and told
            self.engine.let_go()
            self._fail(error)
        else:
            if prompt is None:
                self.engine.let_go()
            else:
                self._write(prompt)

    def _first(self) -> Prompt | None:
        if self.ticket.cancelled.is_set():
            self._end(self._finish(None, "cancelled"))
            return None
        if self.ticket.late:
            raise Late("no slot became free within serve.request_seconds; try again later")
        prompt = next(self.conversation)
        self.ticket.notify(Started())
        return prompt

    def _write(self, prompt: Prompt) -> None:
        """Let the model write a turn."""
        self.turn += 1
        self.prompt_tokens = len(prompt.ids)
        left = self.engine.max_new_tokens if self.ask.max_tokens is None else self.ask.max_tokens - self.written
        left = min(left, self.agent.context_len - len(prompt.ids))
        self.speech = Speech(self.agent.tokenizer, self.ask.stops)
        if left <= 0:
            self.row = None
            self._ended(None)
            return
        greedy = self.ask.temperature < COLD or self.ask.top_p == 0
        self.row = Row(
            prompt.ids,
            left,
            temperature=0.0 if greedy else self.ask.temperature,
            top_p=self.ask.top_p or 1.0,
            seed=None if self.ask.seed is None else self.ask.seed + self.turn,
            stop_ids=(self.agent.tokenizer.end_id,),
            constraint=prompt.constraint,
        )
        turn = Turn(self.row, self._push, self._ended, self.ticket.deadline, self.ticket.cancelled)
        assert self.engine.scheduler is not None
        self.engine.scheduler.submit(turn, first=self.turn > 0)

    def _push(self, number: int) -> bool:
        """Tell the words that a token makes whole; false when no more are wanted."""
        self.written += 1
        self._tell(self.speech.push(number))
        for delta in self.calls.push(number) if self.ask.tools else ():
            self.ticket.notify(Called(delta))
        return not self.speech.stopped

    def _ended(self, error: Exception | None) -> None:
        """The turn is written; what comes of it is worked out elsewhere, and may take its time."""
        self.engine.pool.submit(self._go_on, error)
        self.engine.let_go()

    def _go_on(self, error: Exception | None) -> None:
        """Run the tools that the turn calls and hand in the next one, or end."""
        try:
            if error is not None:
                raise error
            if self.ticket.cancelled.is_set():
                self._end(self._finish(None, "cancelled"))
                return
            prompt = self._answer()
        except Exception as failure:  # noqa: BLE001 - logged below, and told
            self._fail(failure)
        else:
            if prompt is not None:
                self.engine.hold()
                self._write(prompt)

    def _answer(self) -> Prompt | None:
        """The prompt of the next turn; None when that was the last."""
        self._tell(self.speech.flush())
        self.stopped = self.speech.stopped
        if self.ticket.late:
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

    def _end(self, finished: Finished) -> None:
        self.ticket.notify(finished)
        self.engine.done(self.ticket)

    def _fail(self, error: Exception) -> None:
        # Bad input is the client's to hear of, anything else also ours to mend.
        if not isinstance(error, ContextTooLong | Late):
            logger.error("a request failed", exc_info=error)
        try:
            self.ticket.notify(Failed(error))
        finally:
            self.engine.done(self.ticket)

    def _tell(self, text: str) -> None:
        if text:
            self.said.append(text)
            self.ticket.notify(Text(text))

    def _finish(self, answer: Answer | None, reason: str = "length") -> Finished:
        calls: list[dict[str, Any]] = []
        if answer is not None:
            reason = "stop" if self.stopped else answer.finish_reason
            calls = [openai_call(call, number) for call, number in zip(answer.tool_calls, self.calls.ids, strict=False)]
            if not self.said and not self.stopped:
                self._tell(answer.content)  # the agent's own words, when the model ended on a call
        return Finished(
            content="".join(self.said),
            steps=list(self.steps),
            tool_calls=calls[:1] if self.ask.one_call else calls,
            finish_reason=reason,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.written,
        )
