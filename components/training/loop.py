"""The training loop of all stages, which differ in `objective(model, batch) -> Loss`.

Everything that decides the next step (weights, optimizers, step number, random states, metrics so far) is one
checkpoint, so that a run killed at any instant ends at the same weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Generic

import numpy as np
import torch
from torch import Tensor, nn

from components.config.model_settings import LoopConfig
from components.config.params import InputError
from components.models.devices import best_device, compute_dtype
from components.runtime.stage import StageRun
from components.token_rows.batches import IGNORED, Batch, Rows, TokenRows, count_tokens
from components.training.activations import checkpoint_blocks
from components.training.budget import announce
from components.training.checkpoints import Checkpoints, CheckpointState
from components.training.distributed import (
    agreed,
    as_sharded,
    configure_blocks,
    gather_weights,
    leave,
    passes,
    rank,
    reshard,
    seed_step,
    shard,
    summed,
    wait_for_all,
    world_size,
)
from components.training.early_stopping import EarlyStopping
from components.training.objectives import Loss, M, Objective
from components.training.optimizers import Masters, build_optimizers, rate_factor, scale_and_clip
from components.training.prefetch import step_batches


@dataclass
class Measured:
    """Metrics of a run so far; part of the checkpoint."""

    tokens: int = 0
    """Tokens read, padding left out."""
    targets: float = 0
    """Tokens with a target."""
    losses: list[tuple[int, float]] = field(default_factory=list)
    """Step, and the mean loss of the steps since the previous entry."""
    window_loss: float = 0.0
    window_targets: float = 0


class Training(Generic[M]):
    """One model being trained: everything that a step changes."""

    def __init__(
        self,
        model: M,
        objective: Objective[M],
        config: LoopConfig,
        seed: int,
        early_stopping: EarlyStopping | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """`dtype` of the passes; that of the weights unless given."""
        self.model, self.objective, self.config, self.seed = model, objective, config, seed
        self.early_stopping = early_stopping
        first = next(model.parameters())
        self.device, self.dtype = first.device, dtype or first.dtype
        self.masters = Masters(model)
        self.optimizers = build_optimizers(model, self.masters, config, self.dtype)
        self.trained = list(self.masters.trained().values())
        self.step = 0
        self.rate = 0.0
        """Learning rate of the last step."""
        self.measured = Measured()
        self._loss = torch.zeros((), dtype=torch.float64, device=self.device)

    @property
    def over(self) -> bool:
        """Whether every step is done, or early stopping ended the run."""
        stopped = self.early_stopping is not None and self.early_stopping.stopped
        return stopped or self.step >= self.config.max_steps

    def train_step(self, micro_batches: list[Batch]) -> None:
        """One optimizer step over the targets of all micro-batches, of all ranks."""
        targets: float = 0
        config, own = self.config, len(micro_batches)
        for number in range(passes(config.global_batch_size, config.micro_batch_size) if world_size() > 1 else own):
            loss = self.objective(self.model, micro_batches[min(number, own - 1)])
            if number >= own:
                loss = Loss(loss.total * 0.0, 0)
            if loss.targets or world_size() > 1:  # the ranks add up their gradients within the backward pass
                torch.autograd.backward(loss.total)
                self.masters.collect()
            self._loss += loss.total.detach()
            targets += loss.targets
        (targets,) = summed(targets)
        self.measured.window_targets += targets
        self.measured.targets += targets
        if targets:
            self._update(targets)
        self.step += 1
        stopping = self.early_stopping
        if stopping is not None and (self.step % stopping.interval == 0 or self.step == self.config.max_steps):
            self.model.eval()
            stopping.evaluate(self.step, self.model, self.masters.trained())
            reshard(self.model)
            self.model.train()

    def _update(self, targets: float) -> None:
        config = self.config
        scale_and_clip(self.trained, 1.0 / targets, config.max_grad_norm)
        factor = rate_factor(self.step, config.max_steps, config.warmup_steps, config.decay_share)
        for optimizer in self.optimizers:
            optimizer.step(factor)
        for weight in self.trained:
            weight.grad = None
        self.rate = factor * self.optimizers[0].learning_rate
        self.masters.publish()

    def read_loss(self) -> float:
        """Mean loss since it was last read; the one place that waits for the device."""
        self._flush_loss()
        measured = self.measured
        loss = measured.window_loss / max(1.0, measured.window_targets)
        measured.window_loss, measured.window_targets = 0.0, 0
        measured.losses.append((self.step, loss))
        return loss

    def _flush_loss(self) -> None:
        self.measured.window_loss += summed(float(self._loss))[0]
        self._loss.zero_()

    def state(self) -> CheckpointState:
        """Everything the next step depends on; the tensors are those that it changes."""
        self._flush_loss()
        tensors = {name: tensor.detach() for name, tensor in self._tensors().items()}
        if world_size() == 1:
            tensors["random.cpu"] = torch.get_rng_state()
            if self.device.type == "cuda":
                tensors["random.cuda"] = torch.cuda.get_rng_state()
        dtype = str(self.dtype).removeprefix("torch.")
        values = {"measured": vars(self.measured), "inputs": self.inputs(), "dtype": dtype}
        if self.early_stopping is not None:
            values["watch"] = self.early_stopping.state()
        return CheckpointState(self.step, tensors, values)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"weights.{name}": weight for name, weight in self.masters.trained().items()}
        for optimizer in self.optimizers:
            kind = type(optimizer).__name__.lower()
            tensors |= {f"{kind}.{name}": tensor for name, tensor in optimizer.state().items()}
        if self.early_stopping is not None:
            tensors |= {f"best.{name}": weight for name, weight in self.early_stopping.best_weights.items()}
        return as_sharded(tensors, self.masters.weights)

    @torch.no_grad()
    def restore(self, saved: CheckpointState) -> bool:
        """Resume from a checkpoint; false when it is of a run with other inputs."""
        if saved.values["inputs"] != self.inputs():
            return False
        stopping = self.early_stopping
        if stopping is not None:
            stopping.restore(self.masters.trained(), saved.values["watch"])
        saved.copy_into(self._tensors())
        self.masters.publish()
        if saved.folder is not None:
            torch.manual_seed(self.seed + saved.step)  # ranks save no random state
        else:
            torch.set_rng_state(saved.tensors["random.cpu"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(saved.tensors["random.cuda"])
        self.step = saved.step
        measured = saved.values["measured"]
        self.measured = Measured(**measured | {"losses": [(int(step), loss) for step, loss in measured["losses"]]})
        return True

    def inputs(self) -> str:
        """A digest of the settings, shapes and seed that decide the result."""
        config = self.config.model_dump(exclude={"activation_checkpointing", "checkpoint_seconds", "dataset"})
        shapes = {name: list(shape) for name, shape in self.masters.shapes.items()}
        inputs = [config, shapes, str(self.dtype), self.device.type, self.seed]
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def train(
    run: StageRun,
    config: LoopConfig,
    model: M,
    rows: Rows,
    objective: Objective[M],
    early_stopping: EarlyStopping | None = None,
    is_last: bool = True,
) -> Measured:
    """Train `model` in place up to `config.max_steps`, resuming from the last checkpoint where there is one.

    With `early_stopping` it may end earlier, and the model gets the weights with the best score. The stage's last
    training ends all ranks but 0, which alone has the trained model then; others give it to every rank.
    """
    device, checkpoints = best_device(), Checkpoints(run.state)
    saved = checkpoints.load()
    dtype = agreed(_compute_dtype(config, device, model, saved))
    frozen = {name: weight.data for name, weight in model.named_parameters() if not weight.requires_grad}
    computed = model
    if world_size() > 1:
        computed = shard(run, model, config, device, dtype)
    else:
        compute_in(model, config, device, dtype)
    training = Training(computed.train(), objective, config, run.params.seed, early_stopping, dtype)
    if saved:
        resumed = training.restore(saved)
        verb = "resumed at" if resumed else "starts over: other settings made the checkpoint of"
        wait_for_all()
        if not resumed and rank() == 0:
            checkpoints.clear()
        print(f"{run.name}  {verb} step {saved.step}", flush=True)
    if world_size() == 1:
        copies = sum(weight.nbytes for weight in frozen.values() if weight.dtype != dtype)
        announce(run, config, model, rows, objective, copies, training.step)
    steps = step_batches(rows, run.params.seed, config, training.step, device)
    with _stop_signals() as stopped, closing(steps):
        _run_steps(run, training, steps, checkpoints, stopped)
    best = early_stopping.best_weights if early_stopping is not None else {}
    if world_size() > 1:
        with torch.no_grad():
            for name, weight in best.items():
                training.masters.trained()[name].copy_(weight)
        gather_weights(computed, model, everywhere=not is_last)
        if is_last:
            leave()
        model.to(device)
    else:
        weights = frozen | training.masters.trained() | best  # without the rounding of the training's dtype
        for name, parameter in model.named_parameters():
            parameter.data = weights[name].detach()
    if all(weight.dtype == torch.float32 for weight in model.parameters()):
        model.float()  # what is no weight
    checkpoint_blocks(model.eval(), "none")
    return training.measured


def compute_in(model: nn.Module, config: LoopConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Move a model to where and to what it is trained in; configure its blocks."""
    model.to(device=device, dtype=dtype)
    configure_blocks(model, config, device)


def _compute_dtype(
    config: LoopConfig, device: torch.device, model: nn.Module, saved: CheckpointState | None
) -> torch.dtype:
    """That of a checkpoint, where the choice is ours: a training goes on in the precision that it began in."""
    begun = saved.values.get("dtype") if saved and config.precision == "auto" else None
    return getattr(torch, begun) if begun else compute_dtype(config.precision, device, model)


def _run_steps(
    run: StageRun, training: Training[M], steps: Iterator[list[Batch]], checkpoints: Checkpoints, stopped: list[int]
) -> None:
    config, measured = training.config, training.measured
    clock = saved_at = time.monotonic()
    tokens_before = measured.tokens
    if not training.over:
        checkpoints.prepare(training.state().tensors)
    while not training.over:
        batches = next(steps)
        seed_step(run.params.seed, training.step)
        training.train_step([_on_device(batch, training.device) for batch in batches])
        last, loss = training.over, None
        due = rank() == 0 and time.monotonic() - saved_at >= config.checkpoint_seconds
        signals = [signal.SIGTERM in stopped, signal.SIGINT in stopped]
        tokens, saving, terminated, interrupted = summed(sum(map(count_tokens, batches)), due, *signals)
        stopping = terminated or interrupted
        measured.tokens += int(tokens)
        if training.step % config.log_steps == 0 or last:
            loss = training.read_loss()
            if not math.isfinite(loss):
                where = f"params.yaml: {run.section}.learning_rate"
                raise InputError(f"{where}: the loss is {loss} at step {training.step}; lower the learning rates")
        if stopping or last or saving:
            checkpoints.save(training.state())
            if stopping or last:
                checkpoints.wait()
            saved_at = time.monotonic()
        if loss is not None:  # behind the checkpoint: a last step that is reported is never repeated
            now = time.monotonic()
            _report(run, training, loss, (measured.tokens - tokens_before) / max(1e-9, now - clock))
            clock, tokens_before = now, measured.tokens
        if stopping and not last:
            print(
                f"{run.name}  stopped at step {training.step}; the checkpoint is kept, run again to resume", flush=True
            )
            raise SystemExit(128 + (signal.SIGINT if interrupted else signal.SIGTERM))


def _on_device(batch: Batch, device: torch.device) -> Batch:
    return {name: part.to(device, non_blocking=True) for name, part in batch.items()}


def _report(run: StageRun, training: Training[M], loss: float, speed: float) -> None:
    config, step = training.config, training.step
    tokens_per_step = training.measured.tokens / step
    left = round((config.max_steps - step) * tokens_per_step / max(speed, 1e-9))
    eta = f"{left // 60}m{left % 60:02d}s"
    run.progress(step, config.max_steps, loss=loss, tokens_per_second=speed, eta=eta)
    run.tracker.metrics({"loss": loss, "tokens_per_second": speed, "learning_rate": training.rate}, step=step)


def refuse_bad_masks(rows: TokenRows, tuning: bool) -> None:
    """Refuse an empty mask, or, in tuning, one that has the user's turns as well as the model's.

    Raises: InputError.
    """
    masked, tokens = rows.masked_tokens()
    where = f"{rows.folder}: mask: {masked} of {tokens} tokens are trained on"
    if not masked:
        raise InputError(f'{where}; look at the dataset and run "loopwright run --until prepare"')
    if tuning and masked == tokens:
        raise InputError(
            f"{where}; tuning trains on the model's own turns alone; look at the chat template's generation block"
        )


@torch.no_grad()
def measure_loss(model: M, rows: Rows, objective: Objective[M], batch_size: int, max_rows: int) -> float | None:
    """Mean loss on the first rows of a split; None where it has no targets."""
    total, targets = 0.0, 0.0
    device = next(model.parameters()).device
    count = min(len(rows), max_rows)
    for start in range(0, count, batch_size):
        batch = rows.batch(np.arange(start, min(start + batch_size, count)))
        batch = {name: value.to(device) for name, value in batch.items()}
        if bool((batch["labels"] != IGNORED).any()):
            loss = objective(model, batch)
            total, targets = total + float(loss.total), targets + loss.targets
    return total / targets if targets else None


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT, so that the loop can save a checkpoint before it ends."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    old = {
        number: signal.signal(number, lambda signum, _: caught.append(signum))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
