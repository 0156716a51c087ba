"""One loaded model answering requests: `submit` goes in, events come out, nothing is known of HTTP.

The tokens of all requests come from one scheduler (`serving/engine/scheduler.py`), a step of the model for all of
them at a time. Prompts, tools and records are the work of other threads, so that none of them is waited for.
The bound on how many may wait is what keeps the endpoint honest when it is full.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from components.agent.agent import Agent
from components.agent.tools import Tool
from components.config.loop_settings import ServeConfig
from components.inference.batching import Row, Slots, generate
from components.inference.packed_weights import pack, packing_pays, round_checked
from components.models.checkpoint import load_decoder, read_config
from components.models.decoder import Decoder
from components.models.devices import SMALL_MODEL, best_device, compute_dtype
from serving.engine.generation_task import (
    Ask,
    Called,
    Event,
    Failed,
    Finished,
    Late,
    Notify,
    Reply,
    Started,
    Stepped,
    Text,
    Ticket,
)
from serving.engine.scheduler import Scheduler

INT8_AGREEMENT = 0.98
"""Of the tokens that a model takes behind its own answers to SAMPLES, in full and rounded to int8."""
SAMPLES = ("Hello", "Thank you!", "What can you do?", "What does json.dumps do?", "What is 37*12?", "Tell me a story.")

__all__ = [
    "Ask",
    "Called",
    "Engine",
    "Event",
    "Failed",
    "Finished",
    "Full",
    "Late",
    "Notify",
    "Retired",
    "Started",
    "Stepped",
    "Text",
    "Ticket",
]


class Full(Exception):
    """As many requests wait as may wait."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


class Retired(Exception):
    """This engine takes no more requests: another model took its place."""


class Engine:
    """One model, its agent, and who answers with them."""

    model: Decoder
    scheduler: Scheduler | None = None
    """None where the tokens are made elsewhere."""

    def __init__(
        self,
        model: Decoder,
        agent: Agent,
        name: str,
        config: ServeConfig,
        slots: int = 0,
        stepped: Callable[[int], None] = lambda rows: None,
    ) -> None:
        """`stepped` is told of each step of the model how many requests wrote a token in it."""
        self._open(agent, name, config, slots)
        self.model = model
        self._stepped = stepped
        self.scheduler = Scheduler(Slots(model, self.slots), name, self._on_step)

    def _open(self, agent: Agent, name: str, config: ServeConfig, slots: int) -> None:
        """Get ready to take requests in."""
        self.name = name
        """`NAME/VERSION`."""
        self.loaded = int(time.time())
        """Unix time."""
        self.agent = agent
        self.max_new_tokens = config.max_new_tokens
        self.slots = slots or config.max_running
        self._room = self.slots + config.max_waiting
        self._request_seconds = config.request_seconds
        self._waiting: deque[Ticket] = deque()
        self._running: set[Ticket] = set()
        self._busy = 0
        """Running requests that write, or are about to: those that wait for a tool let others in."""
        self._changed = threading.RLock()
        self._retired = False
        self._seconds = 1.0
        """Running mean of what one request takes, for `Retry-After`."""
        # As many as there may be requests: every one of them may be waiting for a tool.
        self.pool = ThreadPoolExecutor(self._room, f"{name}-reply")

    @classmethod
    def load(
        cls,
        folder: Path,
        name: str,
        config: ServeConfig,
        guests: Callable[[], Sequence[Tool]] = tuple,
        stepped: Callable[[int], None] = lambda rows: None,
    ) -> Engine:
        """Load a model folder and answer one throw-away request, so that the first real one is not slow.

        `guests` are tools that its agent may call beside its own, asked for at each request.

        Raises: InputError when the folder holds no usable model.
        """
        agent = Agent.load(folder, read_config(folder).max_seq_len, guests)
        agent.max_steps = min(agent.max_steps, config.max_steps)
        if config.backend == "openai":
            from serving.engine.remote import Remote

            return Remote(agent, name, config)
        device = best_device()
        # As it was trained: a GPU computes in bf16 twice as fast and more, and reads half as much.
        model = load_decoder(folder, compute_dtype("auto", device) if device.type == "cuda" else torch.float32, device)
        model.eval()
        torch.set_num_threads(1 if model.num_parameters <= SMALL_MODEL else max(1, os.cpu_count() or 1))
        if config.int8 and not model.embed.weight.is_cuda:
            round_checked(model, _sample(model, agent), INT8_AGREEMENT)
        if packing_pays(model):
            pack(model)
        engine = cls(model, agent, name, config, stepped=stepped)
        engine.warm()
        return engine

    def warm(self) -> None:
        done = threading.Event()
        self.submit(
            Ask([{"role": "user", "content": "Hello"}], rules=self.agent.rules(), max_tokens=2),
            lambda event: done.set() if isinstance(event, Finished | Failed) else None,
        )
        done.wait()

    @property
    def tool_names(self) -> frozenset[str]:
        """Of the agent's own tools."""
        return frozenset(tool.name for tool in self.agent.tools)

    @property
    def context_len(self) -> int:
        """Tokens of prompt and answer together."""
        return self.agent.context_len

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
        ticket = Ticket(ask, notify, time.monotonic() + self._request_seconds, self._forget)
        with self._changed:
            if self._retired:
                raise Retired
            unfinished = len(self._waiting) + len(self._running)
            if unfinished >= self._room and not first:
                raise Full(max(1, math.ceil(self._seconds * unfinished / self.slots)))
            self._waiting.insert(0 if first else len(self._waiting), ticket)
        self._begin()
        return ticket

    def retire(self) -> None:
        """Take no more requests; finish those that are here, then let go of the threads."""
        with self._changed:
            self._retired = True
        self._begin()

    def close(self) -> None:
        """Retire, cancel what is left and wait for the threads."""
        self.retire()
        with self._changed:
            for ticket in (*self._waiting, *self._running):
                ticket.cancel()
        self._join()
        self.pool.shutdown()

    def hold(self) -> None:
        """A request is about to write again."""
        with self._changed:
            self._busy += 1

    def let_go(self) -> None:
        """A request no longer writes: another may."""
        with self._changed:
            self._busy -= 1
        self._begin()

    def done(self, ticket: Ticket) -> None:
        """A request has ended."""
        with self._changed:
            self._running.discard(ticket)
            self._seconds += 0.2 * (time.monotonic() - ticket.begun - self._seconds)
        self._begin()

    def _forget(self, ticket: Ticket) -> None:
        """Begin with a cancelled request right away, which ends it."""
        with self._changed:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                self._start(ticket)

    def _count_in(self, ticket: Ticket) -> None:
        ticket.begun = time.monotonic()
        self._running.add(ticket)
        self._busy += 1

    def _start(self, ticket: Ticket) -> None:
        self._count_in(ticket)
        self.pool.submit(Reply(self, ticket).begin)

    def _on_step(self, rows: int) -> None:
        """While all slots are taken, nothing but steps happens: who has waited too long is told so after one."""
        self._stepped(rows)
        if self._waiting and self._waiting[0].late:
            self._begin()

    def _begin(self) -> None:
        """Begin with those that wait, as far as there are slots, and with those that are late, which ends them.

        Lets go of the threads when nobody comes any more.
        """
        with self._changed:
            while self._waiting and (self._busy < self.slots or self._waiting[0].late):
                self._start(self._waiting.popleft())
            if self._retired and not self._waiting and not self._running:
                self._rest()
                self.pool.shutdown(wait=False)

    def _rest(self) -> None:
        """Let whoever makes the tokens end: nobody comes any more. May be called again."""
        if self.scheduler is not None:
            self.scheduler.end()

    def _join(self) -> None:
        """Wait for whoever makes the tokens."""
        if self.scheduler is not None:
            self.scheduler.join()


def _sample(model: Decoder, agent: Agent) -> list[list[int]]:
    """Some questions, each with the model's own answer."""
    chats: list[tuple[list[dict[str, str]], None]] = [([{"role": "user", "content": text}], None) for text in SAMPLES]
    prompts = agent.tokenizer.encode_chats(chats, add_generation_prompt=True)
    rows = [Row(ids, 48, stop_ids=(agent.tokenizer.end_id,)) for ids, _ in prompts]
    generate(model, rows)
    return [row.ids for row in rows]
