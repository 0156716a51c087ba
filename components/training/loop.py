"""The one training loop: what differs between stages is `objective(model, batch) -> Loss`.

Everything that decides the next step (weights, optimizers, step number, random states, what
was measured so far) is one checkpoint, so that a run killed at any instant ends at the same weights.
"""

from __future__ import annotations

import hashlib
import json
import math
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from components.config.model_settings import TrainConfig
from components.config.params import InputError
from components.models.devices import best_device, compute_dtype
from components.runtime.stage import StageRun
from components.token_rows.batches import IGNORED, Batch, Rows, Sampler, TokenRows, count_tokens
from components.training.checkpoints import Checkpoints, Saved
from components.training.objectives import M, Objective
from components.training.optimizers import Masters, build_optimizers, rate_factor, scale_and_clip


@dataclass
class Measured:
    """What was seen so far; part of the checkpoint."""

    tokens: int = 0
    """Tokens read, padding left out."""
    targets: float = 0
    """Tokens learned."""
    losses: list[tuple[int, float]] = field(default_factory=list)
    """Step, and the mean loss of the steps since the one before."""
    window_loss: float = 0.0
    window_targets: float = 0


class TrainingMonitor(Protocol):
    """Looks at a model in training every so many steps, remembers its best weights, and may end the training."""

    every: int
    """Steps between two looks; one is also taken behind the last step."""
    over: bool
    """Whether there is nothing more to be hoped for."""

    def look(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """Measure the model, which is in evaluation mode, and remember its fp32 `weights` if it is the best so far."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The best weights, and everything else that the next look depends on (JSON)."""

    def restore(self, best: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Go on from what `state` gave."""

    def best(self) -> Mapping[str, Tensor]:
        """The weights to deliver; none where it never looked."""


class Training(Generic[M]):
    """One model being trained: everything that a step changes."""

    def __init__(
        self, model: M, objective: Objective[M], config: TrainConfig, seed: int, watch: TrainingMonitor | None = None
    ) -> None:
        self.model, self.objective, self.config, self.seed = model, objective, config, seed
        self.watch = watch
        first = next(model.parameters())
        self.device, self.dtype = first.device, first.dtype
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
        """Whether every step is done, or its watch has seen enough."""
        return self.step >= self.config.max_steps or (self.watch is not None and self.watch.over)

    def train_step(self, micro_batches: list[Batch]) -> None:
        """One optimizer step over the targets of all micro-batches."""
        targets: float = 0
        for batch in micro_batches:
            loss = self.objective(self.model, batch)
            if loss.targets:
                torch.autograd.backward(loss.total)
                self.masters.collect()
            self._loss += loss.total.detach()
            targets += loss.targets
        self.measured.window_targets += targets
        self.measured.targets += targets
        if targets:
            self._update(targets)
        self.step += 1
        if self.watch is not None and (self.step % self.watch.every == 0 or self.step == self.config.max_steps):
            self.model.eval()
            self.watch.look(self.step, self.masters.trained())
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
        self._settle()
        measured = self.measured
        loss = measured.window_loss / max(1.0, measured.window_targets)
        measured.window_loss, measured.window_targets = 0.0, 0
        measured.losses.append((self.step, loss))
        return loss

    def _settle(self) -> None:
        self.measured.window_loss += float(self._loss)
        self._loss.zero_()

    def state(self) -> Saved:
        """Everything the next step depends on."""
        self._settle()
        tensors = {name: tensor.detach().cpu() for name, tensor in self._tensors().items()}
        tensors["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state()
        facts = {"measured": vars(self.measured), "inputs": self.inputs()}
        if self.watch is not None:
            best, facts["watch"] = self.watch.state()
            tensors |= {f"best.{name}": weight.cpu() for name, weight in best.items()}
        return Saved(self.step, tensors, facts)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"weights.{name}": weight for name, weight in self.masters.trained().items()}
        for optimizer in self.optimizers:
            kind = type(optimizer).__name__.lower()
            tensors |= {f"{kind}.{name}": tensor for name, tensor in optimizer.state().items()}
        return tensors

    @torch.no_grad()
    def restore(self, saved: Saved) -> bool:
        """Go on from a saved state; false when it is of a run with other inputs."""
        if saved.facts["inputs"] != self.inputs():
            return False
        for name, tensor in self._tensors().items():
            tensor.copy_(saved.tensors[name])
        self.masters.publish()
        torch.set_rng_state(saved.tensors["random.cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(saved.tensors["random.cuda"])
        self.step = saved.step
        facts = saved.facts["measured"]
        self.measured = Measured(**facts | {"losses": [(int(step), loss) for step, loss in facts["losses"]]})
        if self.watch is not None:
            best = {name[5:]: weight for name, weight in saved.tensors.items() if name.startswith("best.")}
            self.watch.restore(best, saved.facts["watch"])
        return True

    def inputs(self) -> str:
        """A digest of what decides the result, as far as the loop knows it."""
        config = self.config.model_dump(exclude={"checkpoint_seconds", "dataset"})
        shapes = {name: list(weight.shape) for name, weight in self.masters.trained().items()}
        facts = [config, shapes, str(self.dtype), self.device.type, self.seed]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def train(
    run: StageRun,
    config: TrainConfig,
    model: M,
    rows: Rows,
    objective: Objective[M],
    watch: TrainingMonitor | None = None,
) -> Measured:
    """Train `model` in place, going on from the last checkpoint where there is one.

    It ends at `config.max_steps`, or earlier where `watch` says so; then the model has the watch's best weights.
    """
    device = best_device()
    dtype = compute_dtype(config.precision, device)
    frozen = {name: weight.data for name, weight in model.named_parameters() if not weight.requires_grad}
    model.to(device=device, dtype=dtype).train()
    if config.compile == "on" or (config.compile == "auto" and device.type == "cuda"):
        for block in cast(Iterable[nn.Module], model.blocks):
            block.compile()
    training = Training(model, objective, config, run.params.seed, watch)
    checkpoints = Checkpoints(run.state)
    saved = checkpoints.load()
    if saved:
        resumed = training.restore(saved)
        said = "resumed at" if resumed else "starts over: other settings made the checkpoint of"
        print(f"{run.name}  {said} step {saved.step}", flush=True)
    with _stop_signals() as stopped:
        _run_steps(run, training, rows, checkpoints, stopped)
    best = watch.best() if watch is not None else {}
    with torch.no_grad():  # deliver what was trained and what was not, without their rounding
        weights = dict(model.float().named_parameters())
        for name, weight in (frozen | training.masters.trained() | dict(best)).items():
            weights[name].copy_(weight)
    model.eval()
    return training.measured


def _run_steps(run: StageRun, training: Training[M], rows: Rows, checkpoints: Checkpoints, stopped: list[int]) -> None:
    config, measured = training.config, training.measured
    sampler = Sampler(len(rows), run.params.seed)
    clock = saved_at = time.monotonic()
    seen = measured.tokens
    while not training.over:
        batches = _micro_batches(rows, sampler, training.step, config)
        measured.tokens += sum(count_tokens(batch) for batch in batches)
        training.train_step([{name: part.to(training.device) for name, part in batch.items()} for batch in batches])
        last = training.over
        if training.step % config.log_steps == 0 or last:
            loss, now = training.read_loss(), time.monotonic()
            if not math.isfinite(loss):
                where = f"params.yaml: {run.section}.learning_rate"
                raise InputError(f"{where}: the loss is {loss} at step {training.step}; lower the learning rates")
            speed = (measured.tokens - seen) / max(1e-9, now - clock)
            _report(run, training, loss, speed)
            clock, seen = now, measured.tokens
        if stopped or last or time.monotonic() - saved_at >= config.checkpoint_seconds:
            checkpoints.save(training.state())
            saved_at = time.monotonic()
        if stopped and not last:
            print(
                f"{run.name}  stopped at step {training.step}; the checkpoint is kept, run again to go on", flush=True
            )
            raise SystemExit(128 + stopped[0])


def _micro_batches(rows: Rows, sampler: Sampler, step: int, config: TrainConfig) -> list[Batch]:
    """The rows of one step. Who stands beside whom changes no gradient, and alike lengths need little padding."""
    drawn = sampler.step(step, config.global_batch_size)
    order = drawn[np.argsort(rows.lengths(drawn), kind="stable")].reshape(-1, config.micro_batch_size)
    return [rows.batch(part, step) for part in order]


def _report(run: StageRun, training: Training[M], loss: float, speed: float) -> None:
    config, step = training.config, training.step
    tokens_per_step = training.measured.tokens / step
    left = round((config.max_steps - step) * tokens_per_step / max(speed, 1e-9))
    eta = f"{left // 60}m{left % 60:02d}s"
    run.progress(step, config.max_steps, loss=loss, tokens_per_second=speed, eta=eta)
    run.tracker.metrics({"loss": loss, "tokens_per_second": speed, "learning_rate": training.rate}, step=step)


def refuse_bad_masks(rows: TokenRows, tuning: bool) -> None:
    """Refuse a mask that would teach nothing, or, in tuning, the user's words as well as the model's.

    Raises: InputError.
    """
    learned, tokens = rows.learned_share()
    where = f"{rows.folder}: mask: {learned} of {tokens} tokens are to be learned"
    if not learned:
        raise InputError(f'{where}; nothing would be; look at the dataset and run "loopwright run --until prepare"')
    if tuning and learned == tokens:
        raise InputError(
            f"{where}; tuning learns the model's own turns alone; look at the chat template's generation block"
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
    """Collect SIGTERM and SIGINT, so that the loop can save before it leaves."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    old = {
        number: signal.signal(number, lambda got, _: caught.append(got)) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
