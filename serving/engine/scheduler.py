"""The scheduler: the one thread that runs a model's continuous batch, alternating prefill and decode steps.

It runs no tool, renders no prompt and writes no record: it passes each token to the turn's `push`, and the end of the
turn to `ended`, whose work continues on other threads.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from components.inference.batching import ContinuousBatch, Row
from components.models.devices import use_threads

REST_SECONDS = 60.0
"""For which a device whose step failed gets turns only where all have failed."""
PREFILLS = 4
"""Prefills in a row while more turns wait than decode: a decode step of few rows costs nearly as much as of many."""

logger = logging.getLogger("loopwright.engine")


@dataclass(eq=False)
class Turn:
    row: Row
    push: Callable[[int], bool]
    """Called with each token, on the scheduler's thread; false ends the turn."""
    ended: Callable[[Exception | None], None]
    """Called once at the end, on the scheduler's thread; must not block."""
    deadline: float
    """By `time.monotonic()`; latest end of the turn."""
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def over(self) -> bool:
        return self.cancelled.is_set() or time.monotonic() > self.deadline


class Scheduler:
    """Generates turns in slots until `end` is called."""

    def __init__(self, slots: ContinuousBatch, name: str, on_step: Callable[[int], None] = lambda rows: None) -> None:
        """`on_step` is called with the number of rows of each decode step."""
        self.slots = slots
        self._observe_step = on_step
        self._turns: dict[Row, Turn] = {}
        """Turns that have a slot."""
        self._waiting: deque[Turn] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._failed = -REST_SECONDS
        """By `time.monotonic()`: the last step that failed."""
        self._threads = torch.get_num_threads()
        """The loading thread's setting: a packed model's size is unknown."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def load(self) -> int:
        """Turns that wait or have a slot."""
        with self._changed:
            return len(self._waiting) + len(self._turns)

    @property
    def failing(self) -> bool:
        return time.monotonic() - self._failed < REST_SECONDS

    def submit(self, turn: Turn, first: bool = False) -> None:
        """Queue a turn; `first` puts it in front of the queue."""
        with self._changed:
            self._waiting.insert(0 if first else len(self._waiting), turn)
            self._changed.notify()

    def end(self) -> None:
        """End the thread when no turn is left."""
        with self._changed:
            self._ended = True
            self._changed.notify()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        use_threads(self._threads)
        if self.slots.device.type == "cuda":
            torch.cuda.set_device(self.slots.device)  # of this thread: streams and graphs are those of the current one
        while True:
            with self._changed:
                while not (self._waiting or self._turns or self._ended):
                    self._changed.wait()
                if not (self._waiting or self._turns):
                    return
            try:
                self._step()
            except Exception as error:
                # The failing row is unknown: all turns end.
                logger.exception("a step of the model failed")
                self._failed = time.monotonic()
                self._fail_all(error)

    def _step(self) -> None:
        """Drop turns that are over, prefill some prompts, and decode one token for each row."""
        for turn in [each for each in self._turns.values() if each.over]:
            self._end(turn)
        for _ in range(PREFILLS):
            self._admit()
            self._push(self.slots.prefill())
            if self.slots.prefilling or not self.slots.free or len(self._waiting) <= len(self.slots.decoding):
                break
        if rows := self.slots.decode():
            self._observe_step(len(rows))
            self._push(rows)

    def _admit(self) -> None:
        """Give free slots to waiting turns, unless a prefill is in progress."""
        with self._changed:
            over = [turn for turn in self._waiting if turn.over]
            for turn in over:
                self._waiting.remove(turn)
            count = 0 if self.slots.prefilling else self.slots.group([turn.row for turn in self._waiting])
            turns = [self._waiting.popleft() for _ in range(count)]
            self._turns |= {turn.row: turn for turn in turns}
        for turn in over:
            turn.ended(None)
        if turns:
            self.slots.admit([turn.row for turn in turns])

    def _push(self, rows: list[Row]) -> None:
        for row in list(rows):
            turn = self._turns[row]
            try:
                more = turn.push(row.ids[-1])
            except Exception as error:  # noqa: BLE001 - passed to `ended`
                self._end(turn, error)
            else:
                if row.finished or not more:
                    self._end(turn)

    def _end(self, turn: Turn, error: Exception | None = None) -> None:
        del self._turns[turn.row]
        self.slots.drop(turn.row)
        turn.ended(error)

    def _fail_all(self, error: Exception) -> None:
        turns, self._turns = list(self._turns.values()), {}
        try:
            self.slots.clear()
        except Exception:  # a device that answers nothing any more; turns that come fail as well, instead of waiting
            logger.exception("the memory of a failed step was not released")
        for turn in turns:
            turn.ended(error)
