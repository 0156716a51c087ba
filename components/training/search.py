"""Search of hyper-parameters: short trainings that Optuna proposes, those that fall behind ended by the median rule.

Bergstra et al. 2011 (tree-structured Parzen estimator), Golovin et al. 2017 (median stopping). What is proposed is a
function of the seed and of earlier trials, and a trial resumes from its checkpoints as any training: a search that was
killed goes on with the same trials.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from components.training.early_stopping import EarlyStopping

if TYPE_CHECKING:
    import optuna

Values = dict[str, float]
FAR = 2.0
"""A score must be this many times what guessing has before it says anything."""


@dataclass(frozen=True)
class Range:
    """Where a value is sought."""

    low: float
    high: float
    log: bool = False
    """Whether to draw by factors rather than by differences."""


@dataclass(frozen=True)
class Tried:
    """A trial and how it ended."""

    number: int
    values: Values
    score: float
    steps: int
    pruned: bool


class TrialMonitor(EarlyStopping):
    """Early stopping that also ends a trial which does worse than the median of those before it at the same step."""

    def __init__(
        self,
        trial: optuna.trial.Trial,
        measure: Callable[[], float],
        every: int,
        patience: int,
        told: Callable[[int, float], None],
    ) -> None:
        super().__init__(measure, every, patience, told)
        self.trial, self.pruned = trial, False

    def look(self, step: int, weights: Mapping[str, Tensor]) -> None:
        super().look(step, weights)
        self.trial.report(self.scores[-1][1], step)
        self.pruned = bool(self.trial.should_prune())  # it may be numpy's
        self.over = self.over or self.pruned

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        best, facts = super().state()
        return best, facts | {"pruned": self.pruned}

    def restore(self, best: dict[str, Tensor], facts: dict[str, Any]) -> None:
        super().restore(best, facts)
        self.pruned = facts["pruned"]
        for step, score in self.scores:
            self.trial.report(score, step)


def search(
    trials: int,
    seed: int,
    given: Values,
    ranges: Mapping[str, Range],
    attempt: Callable[[optuna.trial.Trial, Values], TrialMonitor],
) -> list[Tried]:
    """Try the `given` values, then others within `ranges`; `attempt` trains once with some and returns its watch."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=0)
    study = optuna.create_study(direction="maximize", pruner=pruner)
    study.enqueue_trial(given)
    tried: list[Tried] = []
    for number in range(trials):
        study.sampler = optuna.samplers.TPESampler(n_startup_trials=3, seed=seed + number)
        trial = study.ask()
        values = {name: trial.suggest_float(name, one.low, one.high, log=one.log) for name, one in ranges.items()}
        watch = attempt(trial, values)
        if watch.pruned:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, watch.best_score)
        tried.append(Tried(number, values, watch.best_score, watch.scores[-1][0], watch.pruned))
    return tried


def best_of(tried: list[Tried], chance: float) -> Tried:
    """The first of those with the best score; the first of all, the given values, where none is far from `chance`.

    Trials too short to learn anything differ by luck alone.
    """
    best = max(tried, key=lambda one: (one.score, -one.number))
    return best if best.score > FAR * chance else tried[0]
