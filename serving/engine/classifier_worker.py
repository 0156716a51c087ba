"""A loaded classifier that serves: labels and vectors of texts, those of several requests in one forward pass."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from components.inference.classifier import LabelPrediction, TextClassifier, TextEmbedding
from components.models.devices import threads_for, use_threads
from components.runtime.model_tasks import Task
from serving.engine.adaptive_batching import Batcher
from serving.observability.metrics import Metrics

WARM = "Warm up."
R = TypeVar("R")


class ClassifierWorker:
    """One version of a classifier."""

    task: Task = "classify"

    def __init__(self, texts: TextClassifier, name: str, metrics: Metrics) -> None:
        self.texts, self.name = texts, name
        self.loaded = int(time.time())
        self.running = 0
        """Requests that wait for their texts to be read, or are."""
        self.waiting = 0
        threads = threads_for(texts.model.num_parameters)
        thread = ThreadPoolExecutor(1, f"{name}-classifier", use_threads, (threads,))
        self._labels = Batcher(texts.classify, thread, metrics.classify_batch.observe)
        self._vectors = Batcher(texts.embed, thread, metrics.embed_batch.observe)

    @classmethod
    def load(cls, folder: Path, name: str, metrics: Metrics) -> ClassifierWorker:
        """Load a model folder and read one text, so that the first real one is not slow.

        Raises: InputError when the folder holds no usable classifier.
        """
        texts = TextClassifier.load(folder)
        use_threads(threads_for(texts.model.num_parameters))
        texts.classify([WARM])
        return cls(texts, name, metrics)

    @property
    def context_len(self) -> int:
        """Tokens that are read of a text."""
        return self.texts.max_seq_len

    async def classify(self, texts: Sequence[str]) -> list[LabelPrediction]:
        """Raises: Overloaded."""
        return await self._read(self._labels, texts)

    async def embed(self, texts: Sequence[str]) -> list[TextEmbedding]:
        """Raises: Overloaded."""
        return await self._read(self._vectors, texts)

    async def _read(self, batcher: Batcher[str, R], texts: Sequence[str]) -> list[R]:
        self.running += 1  # on the event loop alone
        try:
            return await asyncio.wrap_future(batcher.submit(texts))
        finally:
            self.running -= 1

    def retire(self) -> None:
        """Nothing runs here by itself: the thread ends with the last request that holds this."""

    def close(self) -> None:
        """As `retire`."""
