"""What a training takes: memory and time, said before its first step, and refused where the memory does not hold it.

What the passes of a few of the longest rows save for the backward pass is counted, and their seconds are taken.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from components.config.model_settings import Checkpointing, FineTuneConfig, LoopConfig
from components.config.params import InputError
from components.models.devices import SMALL_MODEL, device_memory, product_shapes
from components.runtime.stage import StageRun
from components.token_rows.batches import Batch, Rows
from components.training.activations import checkpoint_blocks, watch_saved
from components.training.defaults import LORA_RANK, count_parameters
from components.training.objectives import M, Objective, chunk_rows

GIB = 2**30
TRIED_TOKENS = 512
"""Of the passes that are measured: few enough for any memory that holds the training."""
LIBRARIES = int(0.45 * GIB)
"""Of a stage's process before it reads a model, and of a CUDA context."""
STATE_BYTES = 12
"""Of a trained weight: its fp32 gradient and AdamW's two moments."""
MASTER_BYTES = 4 + 2
"""Of a trained bf16 weight beyond these: its fp32 master, and the gradient of the passes."""
COPY_BYTES = 12 + 12
"""Of a trained weight on a CPU, while a checkpoint is written beside the training: a copy of it and of AdamW's moments,
and the content of the file."""
CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "selective", "full")
"""By what they save, the most first."""
LOGIT_BYTES = 4 + 4
"""Of a logit at a time, beyond the one of the passes: probabilities, and their gradient."""


@dataclass(frozen=True)
class Budget:
    """Bytes of a training on one device, by what they are for."""

    weights: int
    """Weights that the passes read, and exact copies of frozen ones."""
    trained: int
    """Number of trained weights."""
    itemsize: int
    """Bytes of a weight in the passes."""
    row: int
    """Saved by the forward pass of one row for the backward pass."""
    rows: int
    """Rows of a forward pass."""
    logits: int
    checkpoint: int = 0
    """Bytes of a trained weight that checkpoints take on the device."""

    @property
    def states(self) -> int:
        return self.trained * (STATE_BYTES + (MASTER_BYTES if self.itemsize < 4 else 0))

    @property
    def copies(self) -> int:
        return self.trained * self.checkpoint

    @property
    def total(self) -> int:
        return LIBRARIES + self.weights + self.states + self.row * self.rows + self.logits + self.copies

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "gradients and optimizer": self.states,
            "activations": self.row * self.rows + self.logits,
            "checkpoint": self.copies,
        }
        return ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)


def announce(
    run: StageRun, config: LoopConfig, model: M, rows: Rows, objective: Objective[M], copies: int = 0, done: int = 0
) -> None:
    """Print the memory and the time that a training takes from step `done`, where it starts from a base or is large.

    The model is as it will be trained: device, dtype and frozen weights; random states stay as they are.
    `copies`: bytes of further copies of frozen weights, in the dtype of their file.

    Raises: InputError when the device's memory does not hold it, with settings that would fit.
    """
    parameters, weight = count_parameters(model), next(model.parameters())
    if not (getattr(config, "base", "") or parameters > SMALL_MODEL):
        return
    lengths = rows.lengths(np.arange(len(rows)))
    longest = int(lengths.max())
    tried = min(config.micro_batch_size, len(rows), -(-TRIED_TOKENS // longest))
    sample = rows.batch(np.argsort(lengths, kind="stable")[-tried:])
    sample = {name: part.to(weight.device) for name, part in sample.items()}
    saved, seconds = _passes(model, sample, objective)
    if config.activation_checkpointing != "none":
        saved = _saved(model, sample, objective, config, config.activation_checkpointing)
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    head = getattr(model, "head", None)
    width = head.weight.shape[0] if isinstance(head, nn.Linear) else 0
    targets = min(chunk_rows(width, weight.device.type) if width else 0, config.micro_batch_size * longest)
    size = weight.element_size()
    logits = targets * width * (LOGIT_BYTES + size)
    weights = sum(each.nbytes for each in model.parameters())
    checkpoint = 0 if weight.is_cuda else COPY_BYTES
    budget = Budget(weights + copies, trained, size, saved // tried, config.micro_batch_size, logits, checkpoint)
    memory = device_memory(weight.device)
    if budget.total > memory:
        stronger = CHECKPOINTING[CHECKPOINTING.index(config.activation_checkpointing) + 1 :]
        by_row: dict[Checkpointing, int] = {
            how: _saved(model, sample, objective, config, how) // tried for how in stronger
        }
        raise InputError(
            f"params.yaml: {run.section}: training takes {budget.total / GIB:.1f} GiB ({budget}), and this machine has"
            f" {memory / GIB:.1f}; {_remedy(run.section, config, model, budget, memory, by_row)}"
        )
    steps = (config.max_steps - done) * config.global_batch_size
    minutes = seconds * steps * float(lengths.mean()) / (tried * longest) / 60
    print(
        f"{run.name}  takes {budget.total / GIB:.1f} GiB of {memory / GIB:.1f} ({budget}) and about {minutes:.0f}"
        f" minutes for {config.max_steps - done} steps in {str(weight.dtype).removeprefix('torch.')}",
        flush=True,
    )
    run.tracker.metrics({"expected.gib": budget.total / GIB, "expected.minutes": minutes}, step=done)


def _passes(model: M, batch: Batch, objective: Objective[M]) -> tuple[int, float]:
    """Bytes that a forward pass saves beside the model's weights, and the seconds of it and its backward pass."""
    storages = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    saved: dict[int, int] = {}

    def watch(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            saved[storage.data_ptr()] = storage.nbytes()

    device = next(model.parameters()).device
    seconds = 0.0
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for _ in range(2):  # the first also prepares kernels
            started = time.perf_counter()
            with watch_saved(watch):
                loss = objective(model, batch)
            held = sum(saved.values())
            if loss.targets:
                torch.autograd.backward(loss.total)
            float(loss.total.detach())  # waits for the device
            seconds = time.perf_counter() - started
            model.zero_grad()
            saved.clear()
    return held, seconds


def _saved(model: M, batch: Batch, objective: Objective[M], config: LoopConfig, how: Checkpointing) -> int:
    """Bytes held at the peak with another checkpointing: by all blocks, and by the first as it is recomputed."""
    checkpoint_blocks(model, how, whole=1)
    with torch.compiler.set_stance("force_eager"):
        saved, _ = _passes(model, batch, objective)
    checkpoint_blocks(model, config.activation_checkpointing)
    return saved


def _remedy(
    section: str, config: LoopConfig, model: nn.Module, budget: Budget, memory: int, by_row: dict[Checkpointing, int]
) -> str:
    """The settings, of few changes, that would fit; else what is too large. `by_row`: saved with checkpointing."""
    tries: list[tuple[dict[str, object], Budget]] = [({}, budget)]
    if isinstance(config, FineTuneConfig) and not config.lora_rank:
        pairs = LORA_RANK * sum(map(sum, product_shapes(model)))
        tries.append(({"lora_rank": LORA_RANK}, replace(budget, trained=pairs)))
    if budget.itemsize == 4:
        halved = {"weights": budget.weights // 2, "row": budget.row // 2, "itemsize": 2}
        tries += [(settings | {"precision": "bf16"}, replace(each, **halved)) for settings, each in tries]
    plain = list(tries)
    for how, row in by_row.items():
        shares = [(settings, replace(each, row=row * each.row // max(1, budget.row))) for settings, each in plain]
        tries += [(settings | {"activation_checkpointing": how}, each) for settings, each in shares]
    for settings, each in tries:
        for rows in (config.micro_batch_size // 2**power for power in range(config.micro_batch_size.bit_length())):
            if config.global_batch_size % rows == 0 and replace(each, rows=rows).total <= memory:
                changed = settings | ({"micro_batch_size": rows} if rows != config.micro_batch_size else {})
                return "set " + ", ".join(f"{section}.{name} to {value}" for name, value in changed.items())
    return "name a smaller base, or train on a larger machine"
