"""A search tries the given settings first, ends what falls behind, and goes on with the same trials after a kill."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from components.training.classifier import apply_temperature, fit_temperature
from components.training.search import Range, TrialMonitor, Tried, best_of, search

RANGES = {"rate": Range(0.001, 0.1, log=True), "share": Range(0.0, 0.5)}
GIVEN = {"rate": 0.01, "share": 0.25}


def attempts(seen: list[dict[str, float]], stop: int = 99) -> Callable[[Any, dict[str, float]], TrialMonitor]:
    """Trials whose score grows by steps towards 1 less their distance from a share of 0.4."""

    def attempt(trial: Any, values: dict[str, float]) -> TrialMonitor:
        if len(seen) == stop:
            raise KeyboardInterrupt
        seen.append(values)
        watch = TrialMonitor(trial, lambda: 0.0, 1, 9, lambda *_: None)
        for step in range(1, 5):
            score = (1 - abs(values["share"] - 0.4)) * step / 4
            watch.measure = lambda score=score: score  # type: ignore[misc]
            watch.look(step, {})
            if watch.over:
                break
        return watch

    return attempt


def test_the_given_values_are_tried_first_and_others_within_their_ranges() -> None:
    seen: list[dict[str, float]] = []
    tried = search(8, 0, GIVEN, RANGES, attempts(seen))
    assert seen[0] == GIVEN
    assert [one.values for one in tried] == seen
    assert all(0.001 <= values["rate"] <= 0.1 and 0 <= values["share"] <= 0.5 for values in seen)
    assert len({values["rate"] for values in seen}) == 8
    best = best_of(tried, chance=0.1)
    assert best.score == max(one.score for one in tried)
    assert abs(best.values["share"] - 0.4) <= 0.15


def test_a_trial_below_the_median_of_those_before_is_ended_early() -> None:
    tried = search(8, 0, GIVEN, RANGES, attempts([]))
    pruned = [one for one in tried if one.pruned]
    assert pruned
    for one in pruned:
        before = [other.score for other in tried[: one.number]]
        assert one.steps < 4
        assert (1 - abs(one.values["share"] - 0.4)) < sorted(before)[-1]
    assert not any(one.pruned for one in tried[:2]), "there is nothing to compare the first two with"


@pytest.mark.parametrize("killed_at", [1, 4])
def test_a_search_that_was_killed_goes_on_with_the_same_trials(killed_at: int) -> None:
    unbroken = search(6, 0, GIVEN, RANGES, attempts([]))
    with pytest.raises(KeyboardInterrupt):
        search(6, 0, GIVEN, RANGES, attempts([], stop=killed_at))
    assert search(6, 0, GIVEN, RANGES, attempts([])) == unbroken
    assert search(6, 1, GIVEN, RANGES, attempts([])) != unbroken


def test_the_first_of_equal_trials_is_the_best() -> None:
    tried = [Tried(number, {}, score, 1, False) for number, score in enumerate((0.5, 0.7, 0.7))]
    assert best_of(tried, chance=0.1).number == 1


def test_trials_no_better_than_guessing_leave_the_given_values() -> None:
    tried = [Tried(number, {}, score, 1, False) for number, score in enumerate((0.01, 0.03, 0.02))]
    assert best_of(tried, chance=0.02).number == 0
    assert best_of(tried, chance=0.01).number == 1


def test_the_temperature_undoes_what_logits_were_multiplied_by() -> None:
    """Labels drawn from softmax(logits) are likeliest at a temperature of 1, so at 3 when logits are tripled."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 5, generator=random) * 2
    labels = torch.multinomial(logits.softmax(-1), 1, generator=random).squeeze(1)
    assert fit_temperature(logits, labels) == pytest.approx(1.0, rel=0.05)
    assert fit_temperature(logits * 3, labels) == pytest.approx(3.0, rel=0.05)
    assert fit_temperature(logits[:0], labels[:0]) == 1.0


def test_cooling_divides_the_logits_of_the_head() -> None:
    from components.models.encoder import Classifier, EncoderConfig

    torch.manual_seed(0)
    model = Classifier(EncoderConfig(20, 16, 1, 2, 32, 16, labels=("a", "b"))).eval()
    torch.nn.init.normal_(model.head.bias)
    ids = torch.randint(0, 20, (3, 7))
    with torch.no_grad():
        before = model.logits(ids)
        apply_temperature(model, 2.5)
        torch.testing.assert_close(model.logits(ids), before / 2.5)
