"""The gate's statistics against scipy's, its error rates by simulation, and its reasons."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest, permutation_test

from components.config.params import load_params
from components.evaluation.gate import Mode, Slice, decide, holm, p_greater, report, wins_needed
from tests.conftest import SOURCE

CONFIG = load_params(SOURCE / "params.yaml", {"scale": "smoke"}).judge
"""No gain by chance in more than 1 of 100, no regression of more than 1 % that is significant at 5 %."""


def right(*counts: int) -> list[float]:
    """Ones and zeros in turn: `right(3, 2)` is three right, then two wrong."""
    return [float(1 - number % 2) for number, count in enumerate(counts) for _ in range(count)]


def guard(champion: list[float], candidate: list[float], skill: str = "lookup") -> Slice:
    return Slice(skill, False, candidate, champion)


def target(champion: list[float], candidate: list[float], skill: str = "feedback/bases") -> Slice:
    return Slice(skill, True, candidate, champion)


def test_right_and_wrong_are_compared_by_the_sign_test() -> None:
    differences = np.array([1.0] * 8 + [-1.0] * 2 + [0.0] * 30)
    assert p_greater(differences) == pytest.approx(binomtest(8, 10, alternative="greater").pvalue)


def test_numbers_are_compared_by_flipping_signs() -> None:
    differences = np.array([0.5, 1.25, -0.25, 2.0, 0.75, -0.5, 1.5])
    theirs = permutation_test(
        (differences,),
        np.sum,
        permutation_type="samples",
        vectorized=False,
        alternative="greater",
        n_resamples=np.inf,
    )
    assert p_greater(differences) == pytest.approx(theirs.pvalue)


def test_many_numbers_are_compared_by_drawn_signs() -> None:
    differences = np.random.default_rng(1).normal(0.2, 1, 60)
    # The normal approximation of the same test.
    z = differences.sum() / np.sqrt((differences**2).sum())
    assert p_greater(differences) == pytest.approx(0.5 * (1 - np.tanh(z * 0.7978845608)), abs=0.02)
    assert p_greater(differences) == p_greater(differences), "the drawn signs are the same each time"


def test_equal_answers_prove_nothing() -> None:
    assert p_greater(np.zeros(40)) == 1.0


def test_holm_corrects_step_by_step() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_a_significant_gain_without_a_regression_is_promoted() -> None:
    decision = decide([target(right(0, 10), right(9, 1)), guard(right(300, 20), right(299, 21))], CONFIG)
    assert decision.promote
    assert decision.reason.startswith("gains: feedback/bases from 0.000 to 0.900 (9 won, 0 lost)")


def test_a_gain_that_costs_another_skill_is_refused() -> None:
    decision = decide([target(right(0, 10), right(10)), guard(right(300, 20), right(280, 40))], CONFIG)
    assert not decision.promote
    assert decision.reason.startswith("regresses: lookup from 0.938 to 0.875")


def test_a_gain_in_a_skill_without_feedback_does_not_count() -> None:
    decision = decide([target(right(0, 10), right(0, 10)), guard(right(200, 100), right(300))], CONFIG)
    assert not decision.promote
    assert "no significant gain: closest is feedback/bases" in decision.reason


def test_too_little_feedback_is_told_with_what_is_needed() -> None:
    decision = decide([target(right(0, 3), right(3))], CONFIG)
    assert not decision.promote
    assert decision.reason == "too little held-out feedback: feedback/bases has 3 prompts, a gain needs 7"
    assert wins_needed(0.01) == 7


def test_without_held_out_feedback_nothing_is_promoted() -> None:
    assert not decide([guard(right(10), right(10))], CONFIG).promote


def test_a_champion_that_must_go_is_replaced_by_a_candidate_no_worse() -> None:
    slices = [target(right(8, 2), right(8, 2)), guard(right(300, 20), right(300, 20))]
    assert not decide(slices, CONFIG).promote
    assert decide(slices, CONFIG, "replace").promote
    assert not decide([*slices, guard(right(100), right(80, 20), "search")], CONFIG, "replace").promote


def test_a_new_run_may_gain_in_any_skill() -> None:
    slices = [guard(right(280, 40), right(310, 10)), guard(right(100), right(100), "search")]
    assert decide(slices, CONFIG, "any_gain").promote
    assert not decide(slices[1:], CONFIG, "any_gain").promote


def test_no_questions_replace_nobody() -> None:
    assert not decide([], CONFIG, "replace").promote


def test_the_commonest_of_contradicting_corrections_is_no_gain() -> None:
    learned = Slice("feedback/bases", True, right(14, 26), right(0, 40), floor=0.6)
    assert not decide([learned], CONFIG).promote
    assert decide([Slice("feedback/bases", True, right(30, 10), right(0, 40), floor=0.6)], CONFIG).promote


def test_a_skill_too_small_to_pass_costs_the_others_nothing() -> None:
    gained = target(right(0, 7), right(7))
    assert decide([gained, target(right(0, 2), right(2), "feedback/search")], CONFIG).promote


def test_a_skill_with_feedback_may_not_regress_at_all() -> None:
    slices = [target(right(0, 10), right(10)), target(right(1600), right(1590, 10), "feedback/lookup")]
    decision = decide(slices, CONFIG)
    assert not decision.promote
    assert "regresses: feedback/lookup" in decision.reason
    assert decide([slices[0], guard(right(1600), right(1590, 10))], CONFIG).promote


def slice_of(won: int, lost: int, questions: int, skill: str, is_target: bool) -> Slice:
    """A skill of which the candidate answers `won` more and `lost` fewer questions right."""
    same = questions - won - lost
    return Slice(skill, is_target, right(won, lost, same), right(0, won, lost + same))


def changed(won: int, lost: int, questions: int, skill: str = "feedback/bases") -> Slice:
    return slice_of(won, lost, questions, skill, True)


def others(won: int, lost: int, questions: int, skill: str = "lookup") -> Slice:
    return slice_of(won, lost, questions, skill, False)


@pytest.mark.parametrize(
    ("slices", "mode", "better"),
    [
        # The sign test's p is 1/128 after seven questions won and none lost, 1/64 after six.
        pytest.param([changed(7, 0, 7)], "gain", [True], id="seven of seven"),
        pytest.param([changed(6, 0, 7)], "gain", [False], id="six of seven"),
        pytest.param([changed(10, 1, 40)], "gain", [True], id="ten won, one lost: p = 0.0059"),
        pytest.param([changed(9, 1, 40)], "gain", [False], id="nine won, one lost: p = 0.0107"),
        # Holm: the smallest of two p is doubled, the other one stays.
        pytest.param([changed(7, 0, 7), changed(0, 0, 7, "feedback/b")], "gain", [False, False], id="one of two"),
        pytest.param([changed(8, 0, 8), changed(0, 0, 7, "feedback/b")], "gain", [True, False], id="one more won"),
        pytest.param([changed(8, 0, 8), changed(7, 0, 7, "feedback/b")], "gain", [True, True], id="both of two"),
        # A skill that could not pass alone, or is not to gain, does not count among those that could have gained.
        pytest.param([changed(7, 0, 7), changed(6, 0, 6, "feedback/b")], "gain", [True, False], id="too small"),
        pytest.param([changed(7, 0, 7), others(7, 0, 7)], "gain", [True, False], id="guards"),
        pytest.param([others(7, 0, 7), others(0, 0, 7, "b")], "any_gain", [False, False], id="any of two"),
        pytest.param([others(8, 0, 8), others(0, 0, 7, "b")], "any_gain", [True, False], id="any of two, one more won"),
    ],
)
def test_a_gain_is_significant_at_the_rate_corrected_for_the_skills_that_could_gain(
    slices: list[Slice], mode: Mode, better: list[bool]
) -> None:
    decision = decide(slices, CONFIG, mode)
    assert [each.outcome == "better" for each in decision.findings] == better
    assert decision.promote is any(better)


@pytest.mark.parametrize(
    ("slices", "worse"),
    [
        # The sign test's p is 1/32 after five questions lost and none won, 1/16 after four.
        pytest.param([others(0, 5, 400)], True, id="five: p = 0.031"),
        pytest.param([others(0, 4, 300)], False, id="four: p = 0.063"),
        pytest.param([others(1, 7, 400)], True, id="seven lost, one won: p = 0.035"),
        pytest.param([others(1, 6, 400)], False, id="six lost, one won: p = 0.063"),
        pytest.param([others(0, 5, 499)], True, id="just above 1 % of the questions"),
        pytest.param([others(0, 5, 500)], False, id="1 % of the questions"),
        pytest.param([changed(0, 5, 500)], True, id="with user feedback, 1 %"),
        pytest.param([changed(0, 5, 50_000)], True, id="with user feedback, 0.01 %"),
        pytest.param([others(0, 5, 400), others(0, 0, 400, "b")], False, id="one of two: p = 0.063"),
        pytest.param([others(0, 6, 400), others(0, 0, 400, "b")], True, id="one of two: p = 0.031"),
        pytest.param([others(0, 6, 400), others(0, 0, 0, "b")], True, id="without questions does not count"),
        pytest.param([others(0, 6, 400), others(0, 5, 400, "b")], True, id="two of two"),
    ],
)
def test_a_regression_is_significant_where_it_is_large_and_no_chance(slices: list[Slice], worse: bool) -> None:
    assert decide(slices, CONFIG, "replace").promote is not worse


def test_both_of_two_regressions_are_named() -> None:
    decision = decide([others(0, 6, 400), others(0, 5, 400, "search")], CONFIG, "replace")
    assert [each.outcome for each in decision.findings] == ["worse", "worse"]


@pytest.mark.parametrize(("corrected", "promote"), [(24, True), (23, False)])
def test_a_gain_counts_from_the_share_of_corrections_that_must_be_answered(corrected: int, promote: bool) -> None:
    learned = Slice("feedback/bases", True, right(corrected, 40 - corrected), right(0, 40), CONFIG.min_corrected)
    assert decide([learned], CONFIG).promote is promote


def test_the_report_names_each_skill_and_the_rate() -> None:
    page = report(
        decide([target(right(0, 10), right(9, 1)), guard(right(10), right(10))], CONFIG), "agent/2", "agent/1"
    )
    assert "# agent/2 against agent/1: promoted" in page
    assert "| lookup | must not regress | 10 |" in page
    assert "at most 0.01" in page


def noisy_pair(random: np.random.Generator, questions: int, share: float, gain: float = 0.0) -> tuple[list[float], ...]:
    """Two models of the same strength that disagree by chance; `gain` of the wrong answers become right."""
    champion, candidate = (random.random(questions) < share for _ in range(2))
    candidate = candidate | (random.random(questions) < gain)
    return champion.astype(float).tolist(), candidate.astype(float).tolist()


def test_a_candidate_that_is_no_better_passes_no_oftener_than_stated() -> None:
    random = np.random.default_rng(0)
    trials = 600
    promoted = 0
    for _ in range(trials):
        slices = [target(*noisy_pair(random, 30, 0.6), skill=f"feedback/{skill}") for skill in "abc"]
        slices += [guard(*noisy_pair(random, 300, 0.9), skill=skill) for skill in "defgh"]
        promoted += decide(slices, CONFIG).promote
    assert binomtest(promoted, trials, CONFIG.false_promotion_rate, alternative="greater").pvalue > 0.001


def test_votes_at_random_pass_no_oftener_than_stated() -> None:
    random = np.random.default_rng(1)
    trials = 300
    promoted = sum(
        decide([target([0.0] * 20, random.normal(0, 3, 20).tolist(), "feedback/preferences")], CONFIG).promote
        for _ in range(trials)
    )
    assert binomtest(promoted, trials, CONFIG.false_promotion_rate, alternative="greater").pvalue > 0.001


def test_a_gain_of_nine_in_ten_on_ten_prompts_nearly_always_passes() -> None:
    random = np.random.default_rng(2)
    trials = 300
    promoted = 0
    for _ in range(trials):
        corrected = target([0.0] * 10, (random.random(10) < 0.93).astype(float).tolist())
        guards = [guard(*noisy_pair(random, 300, 0.97), skill=skill) for skill in "defgh"]
        promoted += decide([corrected, *guards], CONFIG).promote
    assert promoted / trials > 0.9
