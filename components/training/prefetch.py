"""The micro-batches of each step; for a GPU a thread makes the next step's while the device computes this one's."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from components.config.model_settings import LoopConfig
from components.token_rows.batches import Batch, Rows, Sampler
from components.training.distributed import dealt


def step_batches(
    rows: Rows, seed: int, config: LoopConfig, first: int, device: torch.device
) -> Generator[list[Batch], None, None]:
    """This rank's micro-batches of the steps from `first` on, in the CPU's memory; for a GPU made ahead, and pinned.

    They are a function of seed and step, whoever makes them. What fails in the thread is raised here, at its step.
    Close the iterator to end the thread.
    """
    make = partial(_micro_batches, rows, Sampler(len(rows), seed), config, device.type == "cuda")
    steps = range(first, config.max_steps)
    if device.type != "cuda":
        yield from map(make, steps)
        return
    with ThreadPoolExecutor(1, "batches") as pool:
        ahead = pool.submit(make, first)
        for step in steps:
            batches = ahead.result()
            if step + 1 < config.max_steps:
                ahead = pool.submit(make, step + 1)
            yield batches


def _micro_batches(rows: Rows, sampler: Sampler, config: LoopConfig, pinned: bool, step: int) -> list[Batch]:
    """The rows of one step: grouping by length changes no gradient, and needs little padding."""
    drawn = sampler.step(step, config.global_batch_size)
    order = drawn[np.argsort(rows.lengths(drawn), kind="stable")]
    batches = [rows.batch(part, step) for part in dealt(order, config.micro_batch_size)]
    if not pinned:
        return batches
    return [{name: part.pin_memory() for name, part in batch.items()} for batch in batches]
