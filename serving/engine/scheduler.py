"""The one thread that owns a model's slots: it reads prompts together, steps all rows, and hands out tokens.

It runs no tool, renders no prompt and writes no record: whoever asked for a turn is told each token here, and the
end of the turn on a thread of their own.
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

READS = 4
"""Groups of prompts read in a row while more wait than write: a step costs few rows nearly what it costs many."""

logger = logging.getLogger("loopwright.engine")


@dataclass(eq=False)
class Turn:
    """One turn of the model."""

    row: Row
    push: Callable[[int], bool]
    """Told each token, on the scheduler's thread; false: this was the last one wanted."""
    ended: Callable[[Exception | None], None]
    """Told the end, once, on the scheduler's thread; what takes longer goes elsewhere."""
    deadline: float
    """By `time.monotonic()`; the turn ends here at the latest."""
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def over(self) -> bool:
        return self.cancelled.is_set() or time.monotonic() > self.deadline


class Scheduler:
    """Continues turns on slots until it is told to end."""

    def __init__(self, slots: ContinuousBatch, name: str, on_step: Callable[[int], None] = lambda rows: None) -> None:
        """`on_step` is told of each step how many rows wrote a token in it."""
        self._slots, self._observe_step = slots, on_step
        self._turns: dict[Row, Turn] = {}
        """Those that hold a slot."""
        self._waiting: deque[Turn] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._threads = torch.get_num_threads()
        """Of whoever loaded the model: once packed, it no longer shows its size."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, turn: Turn, first: bool = False) -> None:
        """Take a turn in; `first` puts it before those that wait."""
        with self._changed:
            self._waiting.insert(0 if first else len(self._waiting), turn)
            self._changed.notify()

    def end(self) -> None:
        """Let the thread go once nothing is left to do."""
        with self._changed:
            self._ended = True
            self._changed.notify()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        use_threads(self._threads)
        while True:
            with self._changed:
                while not (self._waiting or self._turns or self._ended):
                    self._changed.wait()
                if not (self._waiting or self._turns):
                    return
            try:
                self._round()
            except Exception as error:
                # What is wrong with one row cannot be told from what is wrong with all: none goes on.
                logger.exception("a step of the model failed")
                self._give_up(error)

    def _round(self) -> None:
        """Let go of whom nobody waits for, read some prompts, and give each row that writes a token."""
        for turn in [each for each in self._turns.values() if each.over]:
            self._end(turn)
        for _ in range(READS):
            self._admit()
            self._tell(self._slots.prefill())
            if self._slots.prefilling or not self._slots.free or len(self._waiting) <= len(self._slots.decoding):
                break
        if rows := self._slots.decode():
            self._observe_step(len(rows))
            self._tell(rows)

    def _admit(self) -> None:
        """Give slots to those who wait, when nobody else's prompt is being read."""
        with self._changed:
            late = [turn for turn in self._waiting if turn.over]
            for turn in late:
                self._waiting.remove(turn)
            count = 0 if self._slots.prefilling else self._slots.group([turn.row for turn in self._waiting])
            turns = [self._waiting.popleft() for _ in range(count)]
        for turn in late:
            turn.ended(None)
        self._turns |= {turn.row: turn for turn in turns}
        if turns:
            self._slots.admit([turn.row for turn in turns])

    def _tell(self, rows: list[Row]) -> None:
        for row in list(rows):
            turn = self._turns[row]
            try:
                more = turn.push(row.ids[-1])
            except Exception as error:  # noqa: BLE001 - whoever is told of the end reports it
                self._end(turn, error)
            else:
                if row.finished or not more:
                    self._end(turn)

    def _end(self, turn: Turn, error: Exception | None = None) -> None:
        del self._turns[turn.row]
        self._slots.drop(turn.row)
        turn.ended(error)

    def _give_up(self, error: Exception) -> None:
        self._slots.clear()
        turns, self._turns = list(self._turns.values()), {}
        for turn in turns:
            turn.ended(error)
