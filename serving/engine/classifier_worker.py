"""A loaded classifier: labels and embeddings of texts, by adaptive batching.

Requests that arrive while a batch is computed form the next one. No timer delays a request: without load it is computed
at once, and batches grow with the load.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Generic, TypeVar

from components.inference.classifier import LabelPrediction, TextClassifier, TextEmbedding
from components.models.devices import threads_for, use_threads
from components.runtime.model_tasks import Task
from serving.observability.metrics import Metrics

WARM = "Warm up."
T = TypeVar("T")
R = TypeVar("R")

MAX_BATCH_SIZE = 64
"""Items in one batch; requests are not split, so that a larger one is a batch by itself."""
MAX_WAIT_SECONDS = 30.0
"""A request with a longer estimated wait is refused."""


class Overloaded(Exception):
    """The queue's estimated wait exceeds MAX_WAIT_SECONDS."""


class Batcher(Generic[T, R]):
    """Calls `function` with the items of all queued requests, on the one thread of `executor`."""

    def __init__(
        self, function: Callable[[list[T]], list[R]], executor: ThreadPoolExecutor, observe: Callable[[int], object]
    ) -> None:
        """`observe` is called with the size of each batch."""
        self._function, self._executor, self._observe = function, executor, observe
        self._lock = threading.Lock()
        self._waiting: deque[tuple[list[T], Future[list[R]]]] = deque()
        self._count = 0
        """Queued items."""
        self._seconds = 0.0
        """Running mean of the time per item."""

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
        self._executor.submit(self._run)  # a no-op where an earlier batch included this request
        return future

    def _run(self) -> None:
        if not (batch := self._next()):
            return
        items = [item for part, _ in batch for item in part]
        self._observe(len(items))
        started = time.perf_counter()
        try:
            results = self._function(items)
        except Exception as error:  # noqa: BLE001 - raised by the futures' results
            for _, future in batch:
                future.set_exception(error)
            return
        seconds = (time.perf_counter() - started) / len(items)
        self._seconds += 0.2 * (seconds - self._seconds)
        start = 0
        for part, future in batch:
            future.set_result(results[start : start + len(part)])
            start += len(part)

    def _next(self) -> list[tuple[list[T], Future[list[R]]]]:
        """The requests of the next batch, without cancelled ones."""
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


class ClassifierWorker:
    """One version of a classifier."""

    task: Task = "classify"

    def __init__(self, texts: TextClassifier, name: str, metrics: Metrics) -> None:
        self.texts, self.name = texts, name
        self.loaded = int(time.time())
        self.running = 0
        """Requests queued or in a batch."""
        self.waiting = 0
        threads = threads_for(texts.model.num_parameters)
        thread = ThreadPoolExecutor(1, f"{name}-classifier", use_threads, (threads,))
        self._labels = Batcher(texts.classify, thread, metrics.classify_batch.observe)
        self._vectors = Batcher(texts.embed, thread, metrics.embed_batch.observe)

    @classmethod
    def load(cls, folder: Path, name: str, metrics: Metrics) -> ClassifierWorker:
        """Load a model folder and classify one text as a warm-up.

        Raises: InputError when the folder holds no usable classifier.
        """
        texts = TextClassifier.load(folder)
        use_threads(threads_for(texts.model.num_parameters))
        texts.classify([WARM])
        return cls(texts, name, metrics)

    @property
    def context_len(self) -> int:
        """Tokens of a text at most; longer texts are truncated."""
        return self.texts.max_seq_len

    async def classify(self, texts: Sequence[str]) -> list[LabelPrediction]:
        """Raises: Overloaded."""
        return await self._batched(self._labels, texts)

    async def embed(self, texts: Sequence[str]) -> list[TextEmbedding]:
        """Raises: Overloaded."""
        return await self._batched(self._vectors, texts)

    async def _batched(self, batcher: Batcher[str, R], texts: Sequence[str]) -> list[R]:
        self.running += 1  # on the event loop alone
        try:
            return await asyncio.wrap_future(batcher.submit(texts))
        finally:
            self.running -= 1

    def retire(self) -> None:
        """A no-op: the thread ends when the last request drops its reference."""

    def close(self) -> None:
        """As `retire`."""
