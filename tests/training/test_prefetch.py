"""Batches made ahead by a thread are those made in time; what fails there is raised at its step."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing

import numpy as np
import pytest
import torch

from components.config.params import InputError
from components.runtime.stage import StageRun
from components.token_rows.batches import Batch, Indices, TokenRows
from components.training.prefetch import step_batches

GPU = torch.device("cuda")


class FailingRows(TokenRows):
    """Rows that break at a step, and count the steps that are made."""

    def __init__(self, run: StageRun, breaks: int) -> None:
        super().__init__(run.paths.tokens("decoder") / "pretrain", "train")
        self.breaks, self.made = breaks, set[int]()

    def batch(self, indices: Indices, step: int = 0) -> Batch:
        self.made.add(step)
        if step == self.breaks:
            raise InputError("rows.bin: torn")
        return super().batch(indices, step)


@pytest.fixture(autouse=True)
def _no_pinning(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)


def test_a_thread_makes_the_batches_of_the_same_steps(new_run: Callable[..., StageRun]) -> None:
    run = new_run()
    config, rows = run.params.pretrain.decoder, FailingRows(run, -1)
    here, ahead = (list(step_batches(rows, 7, config, 19, device)) for device in (torch.device("cpu"), GPU))
    assert len(here) == config.max_steps - 19
    for expected, made in zip(here, ahead, strict=True):
        for one, other in zip(expected, made, strict=True):
            assert all(np.array_equal(one[name], other[name]) for name in one)


def test_what_fails_in_the_thread_is_raised_at_its_step(new_run: Callable[..., StageRun]) -> None:
    run = new_run()
    rows = FailingRows(run, 3)
    with closing(step_batches(rows, 7, run.params.pretrain.decoder, 0, GPU)) as steps:
        for _ in range(3):
            next(steps)
        with pytest.raises(InputError, match="torn"):
            next(steps)
    assert rows.made == {0, 1, 2, 3}
    assert not any(thread.name.startswith("batches") for thread in threading.enumerate())
