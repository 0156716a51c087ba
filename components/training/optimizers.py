"""AdamW, Muon, and the fp32 masters that they update when the weights are bf16.

Muon (https://kellerjordan.github.io/posts/muon/): momentum, made orthogonal by a few steps of
Newton-Schulz, on the matrices of the blocks; AdamW on everything else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from components.config import TrainConfig
from components.models.attention import FusedLinear

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


class Muon(Optimizer):
    """Muon on matrices; each parameter group names the `parts` its matrices are split into by rows.

    Parts of one shape are orthogonalised as one batch. Equal to `torch.optim.Muon` on the parts one by one.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(list(groups), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "parts": None})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        alike: dict[tuple[int, int, float], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                update = self._momentum(weight, group["momentum"])
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                parts = list(group["parts"] or (weight.shape[0],))
                for rows, direction in zip(torch.split(weight, parts), torch.split(update, parts), strict=True):
                    short, long = sorted(rows.shape)
                    alike[short, long, group["lr"]].append((rows, direction))
        for (_, _, lr), pairs in alike.items():
            self._apply(pairs, lr)

    def _momentum(self, weight: Tensor, momentum: float) -> Tensor:
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        assert weight.grad is not None
        state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(state["momentum_buffer"], momentum)  # Nesterov's look ahead

    def _apply(self, pairs: list[tuple[Tensor, Tensor]], lr: float) -> None:
        wide = [direction if direction.shape[0] <= direction.shape[1] else direction.T for _, direction in pairs]
        for (rows, direction), flat in zip(pairs, orthogonal(torch.stack(wide).to(self.dtype)), strict=True):
            tall = max(1.0, rows.shape[0] / rows.shape[1]) ** 0.5
            rows.add_(
                flat if direction.shape == flat.shape and flat.shape[0] <= flat.shape[1] else flat.T, alpha=-lr * tall
            )


def orthogonal(matrices: Tensor) -> Tensor:
    """Newton-Schulz on a batch of wide matrices (N, short, long): their singular values go to about one."""
    a, b, c = NEWTON_SCHULZ
    x: Tensor = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Masters:
    """The weights that the optimizers update: the model's own in fp32, or fp32 copies of bf16 ones."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = dict(model.named_parameters())
        low = any(weight.dtype != torch.float32 for weight in self.weights.values())
        self.copies = {name: weight.detach().float().clone() for name, weight in self.weights.items()} if low else {}

    def items(self) -> dict[str, Tensor]:
        """The fp32 weights by name."""
        return self.copies or {name: weight.detach() for name, weight in self.weights.items()}

    def trained(self) -> dict[str, Tensor]:
        """What to hand to an optimizer, by name."""
        return self.copies or dict(self.weights)

    def collect(self) -> None:
        """Add the gradients of a micro-batch to those of the masters."""
        for name, copy in self.copies.items():
            grad, self.weights[name].grad = self.weights[name].grad, None
            if grad is not None:
                copy.grad = grad.float() if copy.grad is None else copy.grad.add_(grad)

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the model's weights."""
        if self.copies:
            torch._foreach_copy_(list(self.weights.values()), list(self.copies.values()))

    def load(self, saved: dict[str, Tensor]) -> None:
        for name, weight in self.items().items():
            weight.copy_(saved[name])
        self.publish()


def build_optimizers(model: nn.Module, masters: Masters, config: TrainConfig, dtype: torch.dtype) -> list[Optimizer]:
    """The optimizers of `config.optimizer`; each remembers its peak rate in `param_groups[i]["peak"]`."""
    weights = masters.trained()
    parts = {
        f"{name}.weight": module.parts if isinstance(module, FusedLinear) else None
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" in weights and name != "head"
    }
    optimizers: list[Optimizer] = []
    by_adamw = set(weights)
    if config.optimizer == "muon":
        groups = [{"params": [weights[name]], "parts": rows} for name, rows in parts.items()]
        optimizers.append(Muon(groups, config.muon_learning_rate, weight_decay=config.weight_decay, dtype=dtype))
        by_adamw -= set(parts)
    decayed = [weights[name] for name in weights if name in by_adamw and name in parts]
    others = [weights[name] for name in weights if name in by_adamw and name not in parts]
    adamw_groups: list[dict[str, Any]] = [
        {"params": group, "weight_decay": decay}
        for group, decay in ((decayed, config.weight_decay), (others, 0.0))
        if group
    ]
    optimizers.append(AdamW(adamw_groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def rate_factor(step: int, max_steps: int, warmup_steps: int, decay_share: float) -> float:
    """Share of the peak rate at a step: linear warm-up, a plateau, a linear fall to zero behind the last step."""
    warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    decay_steps = max(1, round(max_steps * decay_share))
    return min(warm, 1.0, (max_steps - step) / decay_steps) if decay_share else warm
