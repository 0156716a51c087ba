"""A loaded classifier that serves: labels and vectors of texts, for as long as a request holds it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from components.inference.classifier import TextReader
from components.models.devices import SMALL_MODEL

WARM = "Warm up."


class Reader:
    """One version of a classifier. Its work is done by whoever batches requests; here it is counted who still asks."""

    def __init__(self, texts: TextReader, name: str) -> None:
        self.texts, self.name = texts, name
        self.loaded = int(time.time())
        self.running = 0
        self.waiting = 0
        self._changed = threading.Lock()

    @classmethod
    def load(cls, folder: Path, name: str) -> Reader:
        """Load a model folder and read one text, so that the first real one is not slow.

        Raises: InputError when the folder holds no usable classifier.
        """
        reader = cls(TextReader.load(folder), name)
        if reader.texts.model.num_parameters <= SMALL_MODEL:
            torch.set_num_threads(1)  # the other cores carry the requests in and out
        reader.texts.classify([WARM])
        return reader

    @property
    def context_len(self) -> int:
        """Tokens that are read of a text."""
        return self.texts.max_seq_len

    @contextmanager
    def held(self) -> Iterator[None]:
        """Counts a request in while the block runs."""
        with self._changed:
            self.running += 1
        try:
            yield
        finally:
            with self._changed:
                self.running -= 1

    def retire(self) -> None:
        """Nothing runs here by itself: the last request that holds it lets it go."""

    def close(self) -> None:
        """As `retire`."""
