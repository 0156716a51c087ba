"""Backends: their requests, events and request queue.

A backend answers generation requests with one version of a model: in this process (`local.py`), on another server
(`remote.py`), or by an encoder-decoder (`summarizer_worker.py`). `submit` takes a request, events report its answer;
no backend knows of HTTP. The queue is bounded: a full endpoint refuses requests instead of delaying all of them.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from components.agent.agent import DEFAULT_OPTIONS, Agent
from components.agent.tool_policy import OPEN, ToolPolicy
from components.agent.tools import Tool
from components.agent.turn_grammar import Rules, TurnOptions
from components.config.loop_settings import ServeConfig
from components.config.params import InputError
from components.models.checkpoint import read_config
from components.runtime.model_tasks import Task

logger = logging.getLogger("loopwright.backend")


@dataclass(frozen=True)
class GenerationRequest:
    """The conversation to answer, and how."""

    messages: Sequence[Mapping[str, Any]]
    """For the chat template; those with pictures have them in `images`, and as many marks in their content."""
    tools: Sequence[Mapping[str, Any]] | None = None
    """The client's tools, whose calls are returned to it. None: the agent calls its own."""
    may_call: bool = True
    one_call: bool = False
    """Return only the first call of a turn."""
    policy: ToolPolicy = OPEN
    """Which of the agent's tools are called, and which calls are returned for confirmation."""
    rules: Rules | None = None
    """Grammars of the turns (`Agent.rules`); None: unconstrained."""
    options: TurnOptions = DEFAULT_OPTIONS
    """The options that `rules` were compiled from."""
    max_tokens: int | None = None
    """Over all turns; None: the configured limit for each turn."""
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stops: tuple[str, ...] = ()


@dataclass(frozen=True)
class Start:
    """The request has a slot and fits the context."""


@dataclass(frozen=True)
class TextDelta:
    """More text of the answer, in whole characters."""

    text: str


@dataclass(frozen=True)
class ToolCallDelta:
    """More of a call of the client's tools: an element of `tool_calls` in OpenAI's delta."""

    delta: dict[str, Any]


@dataclass(frozen=True)
class AgentStep:
    """The agent called a tool, or a tool returned."""

    step: dict[str, Any]


@dataclass(frozen=True)
class Completion:
    """The last event of a request: `content` joins its text deltas."""

    content: str
    steps: list[dict[str, Any]]
    tool_calls: list[dict[str, Any]]
    finish_reason: str
    """stop, length, tool_calls; cancelled when the client disconnected."""
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Failure:
    """The last event of a request that could not be answered."""

    error: Exception


Event = Start | TextDelta | ToolCallDelta | AgentStep | Completion | Failure
Notify = Callable[[Event], None]


class QueueFull(Exception):
    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


class BackendRetired(Exception):
    """This backend accepts no more requests: its model was replaced."""


class DeadlineExceeded(Exception):
    """The request was not answered within its deadline."""

    def __init__(self, message: str = "no slot became free within serve.request_seconds; try again later") -> None:
        super().__init__(message)


class BackendUnavailable(DeadlineExceeded):
    """The server of a remote backend cannot answer now; `temporary` where that says nothing of the model."""

    def __init__(self, message: str, temporary: bool = True) -> None:
        super().__init__(message)
        self.temporary = temporary


class BackendNotReady(InputError):
    """The server of a remote backend does not have a version's weights, and refuses to load them."""


class GenerationTask:
    """A submitted request; `cancel` frees its slot before the next token."""

    def __init__(self, queue: Backend, request: GenerationRequest, notify: Notify) -> None:
        self._queue, self.request, self.notify = queue, request, notify
        self.deadline = time.monotonic() + queue.request_seconds
        self.start_time = 0.0
        """By `time.monotonic()`."""
        self.cancelled = threading.Event()
        self.text: list[str] = []
        """The text deltas so far."""
        self.written = 0
        """Completion tokens so far."""

    def cancel(self) -> None:
        self.cancelled.set()
        self._queue.start_cancelled(self)

    @property
    def expired(self) -> bool:
        return time.monotonic() > self.deadline

    def send_text(self, text: str) -> None:
        """Send a text delta, unless it is empty."""
        if text:
            self.text.append(text)
            self.notify(TextDelta(text))

    def send_calls(self, calls: Sequence[dict[str, Any]]) -> None:
        """Send whole calls, which a person is to confirm."""
        for index, each in enumerate(calls):
            self.notify(ToolCallDelta({"index": index, **each}))


class Backend(ABC):
    """A loaded model that answers generation requests: its queue of waiting and running requests, and its slots."""

    task: Task = "chat"
    sees_pictures: bool = False
    """Whether its model reads the pictures in the `images` of messages."""

    model: nn.Module | None = None
    """Its weights, where they are in this process."""

    def __init__(self, agent: Agent | None, name: str, config: ServeConfig, slots: int = 0) -> None:
        self.agent = agent
        """Whose turns it generates; None for text to text."""
        self.name = name
        """`NAME/VERSION`."""
        self.loaded = int(time.time())
        """Time of the load, in Unix time."""
        self.slots = slots or config.max_running
        self.room = self.slots + config.max_waiting
        """Waiting and running requests at most."""
        self.request_seconds = config.request_seconds
        self._waiting: deque[GenerationTask] = deque()
        self._running: set[GenerationTask] = set()
        self._admitted = 0
        """Places of requests that are being prepared."""
        self._busy = 0
        """Slots in use: a running request that waits for a tool uses none."""
        self._changed = threading.RLock()
        self._retired = False
        self._seconds = 1.0
        """Running mean of a request's duration, for `Retry-After`."""

    @abstractmethod
    def _new_task(self, request: GenerationRequest, notify: Notify) -> GenerationTask: ...

    @abstractmethod
    def _start(self, task: GenerationTask) -> None:
        """Run a request on other threads; it calls `release_slot` and `finish` at its end."""

    @abstractmethod
    def _stop(self) -> None:
        """Make the idle threads end: there will be no more requests. May be called again."""

    @abstractmethod
    def _join(self) -> None:
        """Wait for the threads to end."""

    @property
    @abstractmethod
    def context_len(self) -> int:
        """Tokens of prompt and answer together."""

    @property
    def tool_names(self) -> frozenset[str]:
        """Names of the agent's tools."""
        return frozenset(tool.name for tool in self.agent.tools) if self.agent else frozenset()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @contextmanager
    def admission(self) -> Iterator[None]:
        """Hold a place for a request while it is prepared: pictures and schemas are read for those that have one.

        Raises: QueueFull, BackendRetired.
        """
        with self._changed:
            self._check_room()
            self._admitted += 1
        try:
            yield
        finally:
            with self._changed:
                self._admitted -= 1

    def _check_room(self) -> None:
        """Raises: QueueFull, BackendRetired."""
        if self._retired:
            raise BackendRetired
        unfinished = len(self._waiting) + len(self._running) + self._admitted
        if unfinished >= self.room:
            raise QueueFull(max(1, math.ceil(self._seconds * unfinished / self.slots)))

    def submit(
        self, request: GenerationRequest, notify: Notify, first: bool = False, admitted: bool = False
    ) -> GenerationTask:
        """Queue a request; `notify` is called from the backend's threads, last with Completion or Failure.

        `first` puts it in front of the queue, even of a full one; `admitted`: within an `admission`, which holds its
        place.

        Raises: QueueFull, BackendRetired.
        """
        task = self._new_task(request, notify)
        with self._changed:
            if not (first or admitted):
                self._check_room()
            elif self._retired:
                raise BackendRetired
            self._waiting.insert(0 if first else len(self._waiting), task)
        self.start_waiting()
        return task

    def retire(self) -> None:
        """Refuse new requests, and finish the accepted ones."""
        with self._changed:
            self._retired = True
        self.start_waiting()

    def close(self) -> None:
        """Retire, cancel all requests and wait for the threads to end."""
        self.retire()
        with self._changed:
            for task in (*self._waiting, *self._running):
                task.cancel()
        self._join()

    def acquire_slot(self) -> None:
        """Count a slot for the next turn of a running request."""
        with self._changed:
            self._busy += 1

    def release_slot(self) -> None:
        """Free the slot of a request whose turn has ended, and start the next request."""
        with self._changed:
            self._busy -= 1
        self.start_waiting()

    def finish(self, task: GenerationTask) -> None:
        """Remove a request that has ended."""
        with self._changed:
            self._running.discard(task)
            self._seconds += 0.2 * (time.monotonic() - task.start_time - self._seconds)
        self.start_waiting()

    def start_cancelled(self, task: GenerationTask) -> None:
        """Start a cancelled waiting request at once, which ends it."""
        with self._changed:
            if task in self._waiting:
                self._waiting.remove(task)
                self._run(task)

    def start_waiting(self) -> None:
        """Start waiting requests in free slots, and expired ones, which ends them.

        Stops the threads of a retired backend that has no request left.
        """
        with self._changed:
            while self._waiting and (self._busy < self.slots or self._waiting[0].expired):
                self._run(self._waiting.popleft())
            if self._retired and not self._waiting and not self._running:
                self._stop()

    def _run(self, task: GenerationTask) -> None:
        task.start_time = time.monotonic()
        self._running.add(task)
        self._busy += 1
        self._start(task)


def load_agent(folder: Path, config: ServeConfig, external_tools: Callable[[], Sequence[Tool]] = tuple) -> Agent:
    """The agent of a model folder with serving's step limit; it may call `external_tools` too.

    A chat template that knows no tools is extended by declarations and calls; where none fit, it has no tools.

    Raises: InputError when the folder holds no usable agent.
    """
    agent = Agent.load(folder, read_config(folder).max_seq_len, external_tools)
    agent.max_steps = min(agent.max_steps, config.max_steps)
    try:
        agent.tokenizer = agent.tokenizer.with_tools()
    except InputError as error:
        agent.external_tools = tuple
        logger.warning("served without tools: %s", error)
    return agent
