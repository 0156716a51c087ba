"""Keep the weights that do best on validation rows, and stop when more steps no longer help (Prechelt 1998)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


class EarlyStopping:
    """The loop's watch: `measure` gives a score, of which more is better, of the model as it is in training."""

    def __init__(
        self, measure: Callable[[], float], every: int, patience: int, told: Callable[[int, float], None]
    ) -> None:
        """`patience`: looks without a better score after which it is over; `told` hears of step and score."""
        self.measure, self.every, self.patience, self.told = measure, every, patience, told
        self.over = False
        self.scores: list[tuple[int, float]] = []
        """Step and score of each look."""
        self._best: dict[str, Tensor] = {}

    def look(self, step: int, weights: Mapping[str, Tensor]) -> None:
        score = self.measure()
        if not self.scores or score > self.best_score:
            self._best = {name: weight.detach().clone() for name, weight in weights.items()}
        self.scores.append((step, score))
        self.over = len(self.scores) - 1 - self._best_look() >= self.patience
        self.told(step, score)

    @property
    def best_score(self) -> float:
        return self.scores[self._best_look()][1]

    @property
    def best_step(self) -> int:
        return self.scores[self._best_look()][0]

    def _best_look(self) -> int:
        """The first of the best ones."""
        return max(range(len(self.scores)), key=lambda number: (self.scores[number][1], -number))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self._best, {"scores": self.scores, "over": self.over}

    def restore(self, best: dict[str, Tensor], facts: dict[str, Any]) -> None:
        self._best = best
        self.scores, self.over = [(int(step), score) for step, score in facts["scores"]], facts["over"]

    def best(self) -> Mapping[str, Tensor]:
        return self._best
