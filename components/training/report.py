"""Report of a training stage: sizes before training, metrics and the loss curve after it."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from components.config.model_settings import LoopConfig
from components.config.params import InputError
from components.datasets.formats import write_json
from components.models.weight_files import weights_digest
from components.runtime.stage import StageRun
from components.token_rows.batches import Rows
from components.training.defaults import count_parameters
from components.training.loop import Measured

TEST_ROWS = 128
"""Held-out rows of the test loss."""


def describe(run: StageRun, model: nn.Module, max_seq_len: int, rows: Rows) -> None:
    """Check that the rows fit the model, and log their sizes."""
    if rows.seq_len > max_seq_len:
        raise InputError(
            f"params.yaml: prepare.{run.family}.seq_len: {rows.seq_len} exceeds the {max_seq_len} tokens of the model"
        )
    run.tracker.params({"parameters": count_parameters(model), "rows": len(rows), "seq_len": rows.seq_len})


def report(
    run: StageRun,
    config: LoopConfig,
    model: nn.Module,
    measured: Measured,
    folder: Path,
    more: Mapping[str, float | int | str | None],
) -> None:
    """Write the stage's metrics, with the values of `more` that are not None, and its loss curve."""
    steps = len(measured.losses)
    values: dict[str, float | int | str | None] = {
        "loss": sum(loss for _, loss in measured.losses[-5:]) / min(steps, 5),
        "steps": measured.losses[-1][0],
        "tokens": measured.tokens,
        "targets": measured.targets,
        "parameters": count_parameters(model),
        "weights_sha256": weights_digest(folder),
    }
    values = {name: value for name, value in {**values, **more}.items() if value is not None}
    write_json(run.paths.metrics / f"{run.name}.json", values)
    with (run.paths.metrics / f"{run.name}_loss.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("step", "loss"), *measured.losses])
    numbers = {name: float(value) for name, value in values.items() if isinstance(value, (int, float))}
    run.tracker.metrics({f"final.{name}": value for name, value in numbers.items()}, step=config.max_steps)
