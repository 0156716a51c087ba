"""Early stopping by a score on validation data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from components.training.distributed import agreed


class EarlyStopping:
    """Keep the weights with the best validation score, and stop when it no longer improves (Prechelt 1998)."""

    def __init__(
        self, measure: Callable[[Any], float], interval: int, patience: int, on_score: Callable[[int, float], None]
    ) -> None:
        """`measure` scores the model it gets, higher is better, every `interval` steps and behind the last one.

        `patience`: scores without a better one after which training stops; `on_score` gets each step and score.
        """
        self.measure, self.interval, self.patience, self.on_score = measure, interval, patience, on_score
        self.stopped = False
        self.scores: list[tuple[int, float]] = []
        """Step and score of each evaluation."""
        self.best_weights: dict[str, Tensor] = {}

    def evaluate(self, step: int, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Score `model`, which is in evaluation mode, and keep its fp32 `weights` if they are the best so far.

        Of several ranks each keeps its rows, and all go by rank 0's score: one that stopped alone would block the rest.
        """
        score = agreed(self.measure(model))
        if not self.scores or score > self.best_score:
            self.best_weights = {name: weight.detach().clone() for name, weight in weights.items()}
        self.scores.append((step, score))
        self.stopped = len(self.scores) - 1 - self._best() >= self.patience
        self.on_score(step, score)

    @property
    def best_score(self) -> float:
        return self.scores[self._best()][1]

    @property
    def best_step(self) -> int:
        return self.scores[self._best()][0]

    def _best(self) -> int:
        """Index of the first best score."""
        return max(range(len(self.scores)), key=lambda number: (self.scores[number][1], -number))

    def state(self) -> dict[str, Any]:
        """What the next evaluation depends on beside `best_weights` (JSON)."""
        return {"scores": self.scores, "over": self.stopped}

    def restore(self, weights: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        """Go on from what `state` gave; `best_weights`, of the shapes of `weights`, are for the caller to fill."""
        self.scores, self.stopped = [(int(step), score) for step, score in state["scores"]], state["over"]
        like = weights if self.scores else {}
        self.best_weights = {name: torch.empty_like(weight, requires_grad=False) for name, weight in like.items()}
