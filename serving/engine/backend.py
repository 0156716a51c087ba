"""What a backend is asked and what it tells of an answer, and the queue that every backend keeps.

A backend answers generation requests with one version of a model: in this process (`local.py`), behind another server
(`remote.py`), or by an encoder-decoder (`summarizer_worker.py`). `submit` goes in, events come out; nothing is known
of HTTP. The bound on how many may wait is what keeps the endpoint honest when it is full.
"""

from __future__ import annotations

import math
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from components.agent.agent import DEFAULT_OPTIONS, Agent
from components.agent.tools import Tool
from components.agent.turn_grammar import Rules, TurnOptions
from components.config.loop_settings import ServeConfig
from components.models.checkpoint import read_config
from components.runtime.model_tasks import Task


@dataclass(frozen=True)
class GenerationRequest:
    """What to answer, and how."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    """The client's tools: calls of them are handed back. Without, the agent uses its own."""
    may_call: bool = True
    one_call: bool = False
    """Hand back the first call of a turn only."""
    rules: Rules | None = None
    """What each turn keeps to (`Agent.rules`); without, the model writes what it likes."""
    options: TurnOptions = DEFAULT_OPTIONS
    """What `rules` were made of."""
    max_tokens: int | None = None
    """Over all turns; None: the configured number for each turn."""
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stops: tuple[str, ...] = ()


@dataclass(frozen=True)
class Start:
    """The request has a slot and fits the context."""


@dataclass(frozen=True)
class TextDelta:
    """More of the answer, whole characters."""

    text: str


@dataclass(frozen=True)
class ToolCallDelta:
    """More of a call of the client's tools: OpenAI's delta, one of `tool_calls`."""

    delta: dict[str, Any]


@dataclass(frozen=True)
class AgentStep:
    """The agent called a tool, or a tool answered."""

    step: dict[str, Any]


@dataclass(frozen=True)
class Completion:
    """The last event of a request: `content` is all its `TextDelta` in one."""

    content: str
    steps: list[dict[str, Any]]
    tool_calls: list[dict[str, Any]]
    finish_reason: str
    """stop, length, tool_calls; cancelled when the client went away."""
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Failure:
    """The last event of a request that could not be answered."""

    error: Exception


Event = Start | TextDelta | ToolCallDelta | AgentStep | Completion | Failure
Notify = Callable[[Event], None]


class QueueFull(Exception):
    """As many requests wait as may wait."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


class BackendRetired(Exception):
    """This backend takes no more requests: another model took its place."""


class DeadlineExceeded(Exception):
    """Nobody had time for this request within its deadline."""

    def __init__(self, message: str = "no slot became free within serve.request_seconds; try again later") -> None:
        super().__init__(message)


class LoadedModel(Protocol):
    """A loaded version of a model, whatever it answers."""

    @property
    def name(self) -> str:
        """`NAME/VERSION`."""

    @property
    def task(self) -> Task: ...

    @property
    def loaded(self) -> int:
        """Unix time."""

    @property
    def context_len(self) -> int:
        """Tokens that it reads and writes at most."""

    @property
    def running(self) -> int:
        """Requests that it is answering."""

    @property
    def waiting(self) -> int: ...

    def retire(self) -> None:
        """Take no more requests, finish those that are here."""

    def close(self) -> None:
        """Retire, and let go of everything."""


class Backend(LoadedModel, Protocol):
    """A loaded model that answers generation requests."""

    @property
    def agent(self) -> Agent | None:
        """Whose turns it writes; None: it makes one text of one text."""

    @property
    def tool_names(self) -> frozenset[str]:
        """Of the agent's own tools."""

    def submit(self, request: GenerationRequest, notify: Notify, first: bool = False) -> GenerationTask:
        """Queue a request; `notify` is called from the backend's threads, last with Completion or Failure.

        `first` puts it before all that wait, however many they are.

        Raises: Full, Retired.
        """


class GenerationTask:
    """One submitted request; `cancel` frees its slot before the next token."""

    def __init__(self, queue: QueuedBackend, request: GenerationRequest, notify: Notify) -> None:
        self._queue, self.request, self.notify = queue, request, notify
        self.deadline = time.monotonic() + queue.request_seconds
        self.begun = 0.0
        """By `time.monotonic()`."""
        self.cancelled = threading.Event()
        self.said: list[str] = []
        self.written = 0
        """Tokens."""

    def cancel(self) -> None:
        self.cancelled.set()
        self._queue.forget(self)

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def tell(self, text: str) -> None:
        """Tell more of the answer, if there is more."""
        if text:
            self.said.append(text)
            self.notify(TextDelta(text))


class QueuedBackend(ABC):
    """A backend's requests: those that wait, those that run, and how many may write at once."""

    task: Task = "chat"

    def __init__(self, agent: Agent | None, name: str, config: ServeConfig, slots: int = 0) -> None:
        self.agent = agent
        self.name = name
        self.loaded = int(time.time())
        self.slots = slots or config.max_running
        self.room = self.slots + config.max_waiting
        """Requests that may be here at once."""
        self.request_seconds = config.request_seconds
        self._waiting: deque[GenerationTask] = deque()
        self._running: set[GenerationTask] = set()
        self._busy = 0
        """Running requests that write, or are about to: those that wait for a tool let others in."""
        self._changed = threading.RLock()
        self._retired = False
        self._seconds = 1.0
        """Running mean of what one request takes, for `Retry-After`."""

    @abstractmethod
    def _new_task(self, request: GenerationRequest, notify: Notify) -> GenerationTask:
        """A new request."""

    @abstractmethod
    def _start(self, task: GenerationTask) -> None:
        """Let a request run on other threads; it says `let_go` and `done` at its end."""

    @abstractmethod
    def _stop(self) -> None:
        """Let the threads end: nothing runs, and nobody comes any more. May be called again."""

    @abstractmethod
    def _join(self) -> None:
        """Wait until the threads have ended."""

    @property
    @abstractmethod
    def context_len(self) -> int:
        """Tokens of prompt and answer together."""

    @property
    def tool_names(self) -> frozenset[str]:
        return frozenset(tool.name for tool in self.agent.tools) if self.agent else frozenset()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def submit(self, request: GenerationRequest, notify: Notify, first: bool = False) -> GenerationTask:
        task = self._new_task(request, notify)
        with self._changed:
            if self._retired:
                raise BackendRetired
            unfinished = len(self._waiting) + len(self._running)
            if unfinished >= self.room and not first:
                raise QueueFull(max(1, math.ceil(self._seconds * unfinished / self.slots)))
            self._waiting.insert(0 if first else len(self._waiting), task)
        self.begin()
        return task

    def retire(self) -> None:
        with self._changed:
            self._retired = True
        self.begin()

    def close(self) -> None:
        self.retire()
        with self._changed:
            for task in (*self._waiting, *self._running):
                task.cancel()
        self._join()

    def hold(self) -> None:
        """A request is about to write again."""
        with self._changed:
            self._busy += 1

    def let_go(self) -> None:
        """A request no longer writes: another may."""
        with self._changed:
            self._busy -= 1
        self.begin()

    def done(self, task: GenerationTask) -> None:
        """A request has ended."""
        with self._changed:
            self._running.discard(task)
            self._seconds += 0.2 * (time.monotonic() - task.begun - self._seconds)
        self.begin()

    def forget(self, task: GenerationTask) -> None:
        """Begin with a cancelled request right away, which ends it."""
        with self._changed:
            if task in self._waiting:
                self._waiting.remove(task)
                self._run(task)

    def begin(self) -> None:
        """Begin with those that wait, as far as there are slots, and with those that are late, which ends them.

        Lets go of the threads when nobody comes any more.
        """
        with self._changed:
            while self._waiting and (self._busy < self.slots or self._waiting[0].late):
                self._run(self._waiting.popleft())
            if self._retired and not self._waiting and not self._running:
                self._stop()

    def _run(self, task: GenerationTask) -> None:
        task.begun = time.monotonic()
        self._running.add(task)
        self._busy += 1
        self._start(task)


def load_agent(folder: Path, config: ServeConfig, external_tools: Callable[[], Sequence[Tool]] = tuple) -> Agent:
    """The agent of a model folder, bounded as serving wants it; it may call `external_tools` too.

    Raises: InputError when the folder holds no usable agent.
    """
    agent = Agent.load(folder, read_config(folder).max_seq_len, external_tools)
    agent.max_steps = min(agent.max_steps, config.max_steps)
    return agent
