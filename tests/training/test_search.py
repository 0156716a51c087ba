"""A search runs the initial settings first, prunes trials below the median, and resumes with the same trials."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from components.training.classifier import apply_temperature, fit_temperature
from components.training.search import Range, Trial, TrialMonitor, best_of, search

RANGES = {"rate": Range(0.001, 0.1, log=True), "share": Range(0.0, 0.5)}
INITIAL = {"rate": 0.01, "share": 0.25}


def trial_runner(seen: list[dict[str, float]], stop: int = 99) -> Callable[[Any, dict[str, float]], TrialMonitor]:
    """Trials whose score grows by steps towards 1 less their distance from a share of 0.4."""

    def run_trial(trial: Any, values: dict[str, float]) -> TrialMonitor:
        if len(seen) == stop:
            raise KeyboardInterrupt
        seen.append(values)
        monitor = TrialMonitor(trial, lambda _: 0.0, 1, 9, lambda *_: None)
        for step in range(1, 5):
            score = (1 - abs(values["share"] - 0.4)) * step / 4
            monitor.measure = lambda _, score=score: score  # type: ignore[misc]
            monitor.evaluate(step, nn.Identity(), {})
            if monitor.stopped:
                break
        return monitor

    return run_trial


def test_the_initial_values_come_first_and_others_within_their_ranges() -> None:
    seen: list[dict[str, float]] = []
    trials = search(8, 0, INITIAL, RANGES, trial_runner(seen))
    assert seen[0] == INITIAL
    assert [trial.values for trial in trials] == seen
    assert all(0.001 <= values["rate"] <= 0.1 and 0 <= values["share"] <= 0.5 for values in seen)
    assert len({values["rate"] for values in seen}) == 8
    best = best_of(trials, chance=0.1)
    assert best.score == max(trial.score for trial in trials)
    assert abs(best.values["share"] - 0.4) <= 0.15


def test_a_trial_below_the_median_of_earlier_trials_is_pruned() -> None:
    trials = search(8, 0, INITIAL, RANGES, trial_runner([]))
    pruned = [trial for trial in trials if trial.pruned]
    assert pruned
    for trial in pruned:
        before = [other.score for other in trials[: trial.number]]
        assert trial.steps < 4
        assert (1 - abs(trial.values["share"] - 0.4)) < sorted(before)[-1]
    assert not any(trial.pruned for trial in trials[:2]), "there is nothing to compare the first two with"


@pytest.mark.parametrize("killed_at", [1, 4])
def test_a_killed_search_resumes_with_the_same_trials(killed_at: int) -> None:
    uninterrupted = search(6, 0, INITIAL, RANGES, trial_runner([]))
    with pytest.raises(KeyboardInterrupt):
        search(6, 0, INITIAL, RANGES, trial_runner([], stop=killed_at))
    assert search(6, 0, INITIAL, RANGES, trial_runner([])) == uninterrupted
    assert search(6, 1, INITIAL, RANGES, trial_runner([])) != uninterrupted


def test_the_first_of_equal_trials_is_the_best() -> None:
    trials = [Trial(number, {}, score, 1, False) for number, score in enumerate((0.5, 0.7, 0.7))]
    assert best_of(trials, chance=0.1).number == 1


def test_trials_no_better_than_guessing_leave_the_initial_values() -> None:
    trials = [Trial(number, {}, score, 1, False) for number, score in enumerate((0.01, 0.03, 0.02))]
    assert best_of(trials, chance=0.02).number == 0
    assert best_of(trials, chance=0.01).number == 1


def test_the_temperature_undoes_what_logits_were_multiplied_by() -> None:
    """Labels drawn from softmax(logits) are likeliest at a temperature of 1, so at 3 when logits are tripled."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 5, generator=random) * 2
    labels = torch.multinomial(logits.softmax(-1), 1, generator=random).squeeze(1)
    assert fit_temperature(logits, labels) == pytest.approx(1.0, rel=0.05)
    assert fit_temperature(logits * 3, labels) == pytest.approx(3.0, rel=0.05)
    assert fit_temperature(logits[:0], labels[:0]) == 1.0


def test_the_temperature_divides_the_logits_of_the_head() -> None:
    from components.models.encoder import Classifier, EncoderConfig

    torch.manual_seed(0)
    model = Classifier(EncoderConfig(20, 16, 1, 2, 32, 16, labels=("a", "b"))).eval()
    torch.nn.init.normal_(model.head.bias)
    ids = torch.randint(0, 20, (3, 7))
    with torch.no_grad():
        before = model.logits(ids)
        apply_temperature(model, 2.5)
        torch.testing.assert_close(model.logits(ids), before / 2.5)
