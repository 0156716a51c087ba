"""Hyper-parameter search: short trials that Optuna proposes, with median pruning.

Bergstra et al. 2011 (tree-structured Parzen estimator), Golovin et al. 2017 (median stopping). Proposals are a function
of the seed and of earlier trials, and a trial resumes from its checkpoints as any training: a search that was killed
resumes with the same trials, and several ranks, which go by the same scores, make the same proposals.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from components.training.distributed import agreed
from components.training.early_stopping import EarlyStopping

if TYPE_CHECKING:
    import optuna

Values = dict[str, float]
MIN_RATIO_TO_CHANCE = 2.0
"""How many times the score of guessing a score must be before it counts."""


@dataclass(frozen=True)
class Range:
    """The range in which a hyper-parameter is searched."""

    low: float
    high: float
    log: bool = False
    """Whether to sample on a logarithmic scale."""


@dataclass(frozen=True)
class Trial:
    """A finished trial."""

    number: int
    values: Values
    score: float
    steps: int
    pruned: bool


class TrialMonitor(EarlyStopping):
    """Early stopping that also prunes a trial below the median of earlier trials at the same step."""

    def __init__(
        self,
        trial: optuna.trial.Trial,
        measure: Callable[[Any], float],
        interval: int,
        patience: int,
        on_score: Callable[[int, float], None],
    ) -> None:
        super().__init__(measure, interval, patience, on_score)
        self.trial, self.pruned = trial, False

    def evaluate(self, step: int, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        super().evaluate(step, model, weights)
        self.trial.report(self.scores[-1][1], step)
        self.pruned = bool(self.trial.should_prune())  # it may be numpy's
        self.stopped = self.stopped or self.pruned

    def state(self) -> dict[str, Any]:
        return super().state() | {"pruned": self.pruned}

    def restore(self, weights: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        super().restore(weights, state)
        self.pruned = state["pruned"]
        for step, score in self.scores:
            self.trial.report(score, step)


def search(
    trials: int,
    seed: int,
    initial: Values,
    ranges: Mapping[str, Range],
    run_trial: Callable[[optuna.trial.Trial, Values], TrialMonitor],
) -> list[Trial]:
    """Run a trial with the `initial` values, then with others within `ranges`; `run_trial` trains once."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=0)
    study = optuna.create_study(direction="maximize", pruner=pruner)
    study.enqueue_trial(initial)
    finished: list[Trial] = []
    for number in range(trials):
        study.sampler = optuna.samplers.TPESampler(n_startup_trials=3, seed=seed + number)
        trial = study.ask()
        values = {name: trial.suggest_float(name, each.low, each.high, log=each.log) for name, each in ranges.items()}
        values = agreed(values)  # another kind of processor may round differently
        monitor = run_trial(trial, values)
        if monitor.pruned:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, monitor.best_score)
        finished.append(Trial(number, values, monitor.best_score, monitor.scores[-1][0], monitor.pruned))
    return finished


def best_of(trials: list[Trial], chance: float) -> Trial:
    """The first trial with the best score; the first of all, with the initial values, where none is far from `chance`.

    Trials too short to learn anything differ by luck alone.
    """
    best = max(trials, key=lambda trial: (trial.score, -trial.number))
    return best if best.score > MIN_RATIO_TO_CHANCE * chance else trials[0]
