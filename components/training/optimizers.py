"""AdamW, Muon, and the fp32 masters that they update when the weights are bf16.

Muon (https://kellerjordan.github.io/posts/muon/): momentum, made orthogonal by a few steps of
Newton-Schulz, on the matrices of the blocks; AdamW (arXiv 1711.05101) on everything else.
AdamW is `torch.optim`'s function rather than its class: making the class imports torch's compiler, four seconds of
every process.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from components.config.model_settings import LoopConfig
from components.models.attention import FusedLinear
from components.training.distributed import apply_to_whole, local, total_norm, world_size

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
CACHED_MATRICES = 4
"""Matrices in one batch of Newton-Schulz on a CPU: more would not fit its caches."""
BATCHED_ELEMENTS = 2**24
"""Elements in one elsewhere: enough to fill a GPU, and what a batch needs beside the states stays below a byte a
parameter from some 200 million on."""
Weights = Mapping[str, Tensor]


class Optimizer(Protocol):
    """Updates weights from their gradients; its state is tensors."""

    learning_rate: float
    """The peak."""

    def step(self, factor: float) -> None:
        """One step at `factor` times the peak rate."""

    def state(self) -> dict[str, Tensor]:
        """The state, by name."""


class AdamW:
    """AdamW on all weights, with decoupled decay on the `decayed` ones; torch's fused kernel."""

    def __init__(
        self,
        weights: Weights,
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        decayed: frozenset[str] = frozenset(),
        eps: float = 1e-8,
    ) -> None:
        self.learning_rate, self.betas, self.eps = learning_rate, betas, eps
        self.weights = dict(weights)
        self.first = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        self.second = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        self.steps = {name: torch.zeros((), device=weight.device) for name, weight in weights.items()}
        self.groups = [
            (names, decay)
            for names, decay in (
                ([name for name in weights if name in decayed], weight_decay),
                ([name for name in weights if name not in decayed], 0.0),
            )
            if names
        ]

    @torch.no_grad()
    def step(self, factor: float) -> None:
        for names, decay in self.groups:
            adamw(
                [self.weights[name] for name in names],
                _grads(self.weights, names),
                [self.first[name] for name in names],
                [self.second[name] for name in names],
                [],
                [self.steps[name] for name in names],
                fused=True,
                lr=self.learning_rate * factor,
                beta1=self.betas[0],
                beta2=self.betas[1],
                weight_decay=decay,
                eps=self.eps,
                amsgrad=False,
                maximize=False,
            )

    def state(self) -> dict[str, Tensor]:
        parts = {"first": self.first, "second": self.second, "steps": self.steps}
        return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


class Muon:
    """Muon on matrices; `parts` names the heights of those that are several products fused into one.

    Parts of one shape are orthogonalised in batches. A step turns the gradients into its updates, in place: beside
    weights, gradients and momentum, 12 bytes a parameter, it holds one batch alone. Equal to `torch.optim.Muon` on the
    parts one by one.
    `shapes`: of the whole matrices, where the weights are this rank's rows of them.
    """

    def __init__(
        self,
        weights: Weights,
        learning_rate: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        parts: Mapping[str, tuple[int, ...]] | None = None,
        dtype: torch.dtype = torch.bfloat16,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self.learning_rate, self.momentum, self.weight_decay, self.dtype = learning_rate, momentum, weight_decay, dtype
        self.weights, self.shapes = dict(weights), dict(shapes or {})
        self.buffers = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        self.parts = {name: list((parts or {}).get(name, weight.shape[:1])) for name, weight in weights.items()}

    @torch.no_grad()
    def step(self, factor: float) -> None:
        names, rate = list(self.weights), self.learning_rate * factor
        weights, buffers = list(self.weights.values()), list(self.buffers.values())
        grads = _grads(self.weights, names)
        torch._foreach_lerp_(buffers, grads, 1 - self.momentum)
        torch._foreach_lerp_(grads, buffers, self.momentum)  # Nesterov's look ahead
        if self.weight_decay:
            torch._foreach_mul_(weights, 1 - rate * self.weight_decay)
        if world_size() == 1:
            self._add_orthogonal(names, weights, grads, rate)
            return
        # Orthogonal rows of a shard are not those of the matrix: its owner has all of them.
        shapes = [(self.shapes[name][0], self.shapes[name][1]) for name in names]
        changes = apply_to_whole(grads, shapes, lambda number, update: self._change(names[number], update, rate))
        for weight, change in zip(weights, changes, strict=True):
            weight.add_(change)

    def _change(self, name: str, update: Tensor, rate: float) -> Tensor:
        change = torch.zeros_like(update)
        self._add_orthogonal([name], [change], [update], rate)
        return change

    def _add_orthogonal(self, names: list[str], weights: list[Tensor], updates: list[Tensor], rate: float) -> None:
        """Add the orthogonal directions of whole matrices' updates to the weights."""
        alike: dict[tuple[int, ...], list[tuple[Tensor, Tensor, float]]] = defaultdict(list)
        for name, weight, update in zip(names, weights, updates, strict=True):
            heights = self.parts[name]
            for rows, direction in zip(torch.split(weight, heights), torch.split(update, heights), strict=True):
                height, width = rows.shape
                if height > width:  # laid wide, the products of Newton-Schulz are the smaller ones
                    rows, direction = rows.mT, direction.mT
                alike[tuple(rows.shape)].append((rows, direction, -rate * max(1.0, height / width) ** 0.5))
        for group in alike.values():
            first = group[0][0]
            count = CACHED_MATRICES if first.is_cpu else max(1, BATCHED_ELEMENTS // first.numel())
            for start in range(0, len(group), count):
                batch = group[start : start + count]
                flat = orthogonal(torch.stack([direction.to(self.dtype) for _, direction, _ in batch]))
                for (rows, _, length), direction in zip(batch, flat, strict=True):
                    rows.add_(direction, alpha=length)

    def state(self) -> dict[str, Tensor]:
        return {f"momentum.{name}": buffer for name, buffer in self.buffers.items()}


def orthogonal(matrices: Tensor) -> Tensor:
    """Newton-Schulz on a batch of wide matrices (N, short, long): their singular values go to about one."""
    x: Tensor = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    # Exact to fp32's last digits; bf16 would lose small singular values on the way.
    by_gram = x.dtype == torch.float32 and x.shape[2] > 1.5 * x.shape[1]
    return _newton_schulz_by_gram(x) if by_gram else _newton_schulz(x)


def _newton_schulz(x: Tensor) -> Tensor:
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _newton_schulz_by_gram(x: Tensor) -> Tensor:
    """The same steps on the small square x x^T, applied to x at the end: a third fewer products."""
    a, b, c = NEWTON_SCHULZ
    gram, product = x @ x.mT, None
    for step in range(NEWTON_SCHULZ_STEPS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        if step + 1 < NEWTON_SCHULZ_STEPS:
            gram = factor @ gram @ factor
    assert product is not None
    return product @ x


def _grads(weights: Weights, names: list[str]) -> list[Tensor]:
    """Of each weight, zero where no row of the step reached it."""
    grads = ((weights[name], weights[name].grad) for name in names)
    return [grad if grad is not None else torch.zeros_like(weight) for weight, grad in grads]


class Masters:
    """The weights that the optimizers update: the model's own in fp32, fp32 copies of bf16 weights, or this rank's rows
    of sharded weights, which are fp32."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.shapes = {name: tuple(weight.shape) for name, weight in self.weights.items()}
        self.sharded = world_size() > 1
        low = any(weight.dtype != torch.float32 for weight in self.weights.values())
        self.copies: dict[str, Tensor] = {}
        if self.sharded:
            self.copies = {name: local(weight) for name, weight in self.weights.items()}
        elif low:
            self.copies = {name: weight.detach().float().clone() for name, weight in self.weights.items()}

    def trained(self) -> dict[str, Tensor]:
        """The fp32 weights by name; their `grad` is what the optimizers see."""
        return self.copies or dict(self.weights)

    def collect(self) -> None:
        """Add the gradients of a micro-batch to those of the masters."""
        for name, copy in self.copies.items():
            grad, self.weights[name].grad = self.weights[name].grad, None
            if grad is not None:
                grad = local(grad) if self.sharded else grad
                copy.grad = grad.float() if copy.grad is None else copy.grad.add_(grad)

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the model's weights."""
        if self.copies and not self.sharded:
            torch._foreach_copy_(list(self.weights.values()), list(self.copies.values()))


def build_optimizers(model: nn.Module, masters: Masters, config: LoopConfig, dtype: torch.dtype) -> list[Optimizer]:
    """The optimizers of `config.optimizer`; Newton-Schulz computes in `dtype`.

    Muon takes the matrices of the blocks alone, not what reads tokens or names classes.
    """
    weights = masters.trained()
    parts = {
        f"{name}.weight": module.parts if isinstance(module, FusedLinear) else (module.out_features,)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" in weights and name != "head"
    }
    in_blocks = [name for name in parts if "blocks." in name]
    by_muon = {name: weights[name] for name in in_blocks} if config.optimizer == "muon" else {}
    by_adamw = {name: weight for name, weight in weights.items() if name not in by_muon}
    decayed = frozenset(parts)
    rest = AdamW(by_adamw, config.learning_rate, weight_decay=config.weight_decay, decayed=decayed)
    if not by_muon:
        return [rest]
    heights = {name: parts[name] for name in in_blocks}
    rate, decay, shapes = config.muon_learning_rate, config.weight_decay, masters.shapes
    return [Muon(by_muon, rate, weight_decay=decay, parts=heights, dtype=dtype, shapes=shapes), rest]


@torch.no_grad()
def scale_and_clip(weights: list[Tensor], factor: float, max_norm: float) -> None:
    """Multiply all gradients by `factor`, then clip them to a global norm, in one pass."""
    grads = [weight.grad for weight in weights if weight.grad is not None]
    norm = total_norm(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))) * factor
    torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp_(max=1.0) * factor)


def rate_factor(step: int, max_steps: int, warmup_steps: int, decay_share: float) -> float:
    """Share of the peak rate at a step: linear warm-up, a plateau, a linear decay to zero after the last step."""
    warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    decay_steps = max(1, round(max_steps * decay_share))
    return min(warm, 1.0, (max_steps - step) / decay_steps) if decay_share else warm
