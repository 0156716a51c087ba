"""Adaptive batching: texts of requests that come at once are read in one forward pass.

While one batch is read the next one gathers, so that nobody waits for a timer: alone a request is read at once, and the
more come the larger the batches become.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

MAX_BATCH_SIZE = 64
"""Items in one batch; requests stay whole, so that one with more is a batch by itself."""
MAX_WAIT_SECONDS = 30.0
"""A request that would have to wait longer is refused: the machine is overloaded."""


class Overloaded(Exception):
    """What waits takes longer than anyone would wait."""


class Batcher(Generic[T, R]):
    """Calls `function` with the items of as many requests as wait, on the one thread of `executor`."""

    def __init__(
        self, function: Callable[[list[T]], list[R]], executor: ThreadPoolExecutor, observe: Callable[[int], object]
    ) -> None:
        """`observe` is told the size of each batch."""
        self._function, self._executor, self._observe = function, executor, observe
        self._lock = threading.Lock()
        self._waiting: deque[tuple[list[T], Future[list[R]]]] = deque()
        self._count = 0
        """Items that wait."""
        self._seconds = 0.0
        """Running mean of what one item takes."""

    def submit(self, items: Sequence[T]) -> Future[list[R]]:
        """The results of one request's items, in order.

        Raises: Overloaded.
        """
        future: Future[list[R]] = Future()
        with self._lock:
            if self._count * self._seconds > MAX_WAIT_SECONDS:
                raise Overloaded(f"{self._count} texts wait; try again soon")
            self._waiting.append((list(items), future))
            self._count += len(items)
        self._executor.submit(self._run)  # finds nothing where an earlier call has taken this request along
        return future

    def _run(self) -> None:
        if not (batch := self._next()):
            return
        items = [item for part, _ in batch for item in part]
        self._observe(len(items))
        began = time.perf_counter()
        try:
            results = self._function(items)
        except Exception as error:  # noqa: BLE001 - raised by whoever waits for the result
            for _, future in batch:
                future.set_exception(error)
            return
        taken = (time.perf_counter() - began) / len(items)
        self._seconds += 0.2 * (taken - self._seconds)
        start = 0
        for part, future in batch:
            future.set_result(results[start : start + len(part)])
            start += len(part)

    def _next(self) -> list[tuple[list[T], Future[list[R]]]]:
        """The requests of the next batch, without those whose sender has left."""
        batch: list[tuple[list[T], Future[list[R]]]] = []
        size = 0
        with self._lock:
            while self._waiting and (not batch or size + len(self._waiting[0][0]) <= MAX_BATCH_SIZE):
                items, future = self._waiting.popleft()
                self._count -= len(items)
                if future.set_running_or_notify_cancel():
                    batch.append((items, future))
                    size += len(items)
        return batch
