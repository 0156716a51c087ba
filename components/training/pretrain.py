"""Stage: a decoder from scratch, by causal language modelling on packed documents."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from components.config import InputError, TrainConfig
from components.data.batches import Rows, TokenRows
from components.data.datasets import write_json
from components.models.checkpoint import save_decoder, weights_digest
from components.models.decoder import Decoder, DecoderConfig
from components.stage import StageRun
from components.training.checkpoints import Checkpoints
from components.training.loop import Measured, measure_loss, refuse_bad_masks, settle_cpu, train
from components.training.objectives import causal_lm

TEST_ROWS = 128
"""Held-out rows read for the test loss at the end."""


def pretrain(run: StageRun) -> None:
    """Train on data/tokens/FAMILY/pretrain, save data/models/base/FAMILY.

    Raises: InputError when there is nothing to learn, or when saving fails.
    """
    settle_cpu()
    rows = TokenRows(run.paths.tokens(run.family) / "pretrain", "train")
    refuse_bad_masks(rows, tuning=False)
    torch.manual_seed(run.params.seed)
    model = Decoder(DecoderConfig.from_params(run.params.model, rows.vocab_size))
    describe(run, model, model.config.max_seq_len, rows)
    measured = train(run, run.params.pretrain, model, rows, causal_lm)
    base = run.paths.base(run.family)
    save_decoder(model, base, run.paths.tokenizer(run.family))
    test = measure_loss(
        model, TokenRows(rows.folder, "test"), causal_lm, run.params.pretrain.micro_batch_size, TEST_ROWS
    )
    report(run, run.params.pretrain, model, measured, base, {"test_loss": test})


def describe(run: StageRun, model: nn.Module, max_seq_len: int, rows: Rows) -> None:
    """Check that the rows fit the model, and tell the tracker their sizes."""
    if rows.seq_len > max_seq_len:
        raise InputError(f"params.yaml: prepare.seq_len: {rows.seq_len} exceeds the {max_seq_len} tokens of the model")
    run.tracker.params({"parameters": count_parameters(model), "rows": len(rows), "seq_len": rows.seq_len})


def report(
    run: StageRun,
    config: TrainConfig,
    model: nn.Module,
    measured: Measured,
    folder: Path,
    more: Mapping[str, float | int | str | None],
) -> None:
    """Write the stage's metrics, with `more` of its own that is not None, and its loss curve; then its checkpoints
    have served."""
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
    Checkpoints(run.state).clear()


def count_parameters(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())
