"""Training that starts from a base: it fits the rows, and all its weights are trained or LoRA's low-rank pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from components.config.model_settings import Family, FineTuneConfig, QuantizeBase
from components.config.params import InputError
from components.models.base_store import store_base
from components.models.devices import best_device
from components.models.lora import add_lora, lora_of, quantize_base
from components.runtime.stage import StageRun
from components.token_rows.batches import Rows
from components.training.distributed import world_size
from components.training.loop import Measured, train
from components.training.objectives import M, Objective
from components.training.report import describe


def refuse_other_vocabulary(run: StageRun, family: Family, vocab_size: int, rows: Rows) -> None:
    """Refuse rows of another vocabulary than the base's; an imported base may have more tokens, as padding.

    Raises: InputError.
    """
    base = run.paths.start_of(family)
    padded = base != run.paths.base(family) and vocab_size > rows.vocab_size
    if vocab_size != rows.vocab_size and not padded:
        raise InputError(
            f"{base}: vocab_size {vocab_size} differs from the {rows.vocab_size} of {rows.folder};"
            f' run "loopwright run --until pretrain"'
        )


def quantize_frozen(run: StageRun, kind: QuantizeBase, model: nn.Module) -> None:
    """Quantize the weights that an adapter leaves as they are, if params.yaml says so.

    Raises: InputError without a CUDA device or an adapter, or with several processes.
    """
    if kind == "none":
        return
    where = f"params.yaml: {run.section}.quantize_base: {kind}"
    if world_size() > 1:
        raise InputError(f"{where}: needs one process, not {world_size()}; set it to none")
    if best_device().type != "cuda":
        raise InputError(f"{where}: needs a CUDA device, and this machine has none; set it to none")
    if lora_of(model) is None:
        raise InputError(f"{where}: is for the frozen base of an adapter; set {run.section}.lora_rank above 0")
    quantize_base(model, kind)


def train_from_base(
    run: StageRun, config: FineTuneConfig, model: M, folder: Path, rows: Rows, objective: Objective[M]
) -> Measured:
    """Train all weights of the model of a folder, or LoRA's low-rank pairs: new ones, or those that it has."""
    torch.manual_seed(run.params.seed)
    if config.lora_rank and lora_of(model) is None:
        base = store_base(folder, run.paths.home)
        add_lora(model, config.lora_rank, config.lora_alpha, base=base)
    quantize_frozen(run, config.quantize_base, model)
    shape: Any = model.config
    describe(run, model, shape.max_seq_len, rows)
    return train(run, config, model, rows, objective)
