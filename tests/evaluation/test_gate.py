"""The gate against scipy, by hand, and by thousands of simulated evaluations."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.stats import binomtest, permutation_test

from components.config import JudgeConfig
from components.evaluation.gate import Slice, decide, fewest_questions, first, holm, p_value, report, sign_test

CONFIG = JudgeConfig(max_questions=100, false_promotion_rate=0.01, max_fall=0.01, fall_rate=0.05)


def bits(wins: int, losses: int, ties: int = 0) -> tuple[list[float], list[float]]:
    """Champion's and candidate's scores with so many wins and losses of the candidate."""
    return [0.0] * wins + [1.0] * (losses + ties), [1.0] * wins + [0.0] * losses + [1.0] * ties


def target(name: str, wins: int, losses: int = 0, ties: int = 0) -> Slice:
    return Slice(name, "target", *bits(wins, losses, ties))


def guard(name: str, wins: int = 0, losses: int = 0, ties: int = 100) -> Slice:
    return Slice(name, "guard", *bits(wins, losses, ties))


@pytest.mark.parametrize(("wins", "pairs"), [(0, 5), (5, 5), (7, 9), (30, 50), (400, 750)])
def test_the_sign_test_is_the_exact_binomial_one(wins: int, pairs: int) -> None:
    assert sign_test(wins, pairs) == pytest.approx(binomtest(wins, pairs, alternative="greater").pvalue)


@pytest.mark.parametrize("side", ["greater", "less"])
@pytest.mark.parametrize("count", [3, 9, 12])
def test_the_sign_flip_test_of_few_pairs_is_exact(count: int, side: str) -> None:
    values = np.random.default_rng(count).normal(0.3, 1, count)
    theirs = permutation_test(
        (values,), np.mean, permutation_type="samples", alternative=side, n_resamples=np.inf, vectorized=True, axis=0
    )
    assert p_value(values, side) == pytest.approx(theirs.pvalue)  # type: ignore[arg-type]


def test_the_sign_flip_test_of_many_pairs_is_near_scipys_and_never_nothing() -> None:
    values = np.random.default_rng(1).normal(0.25, 1, 60)
    theirs = permutation_test(
        (values,), np.mean, permutation_type="samples", alternative="greater", n_resamples=50_000, axis=0, rng=3
    )
    assert p_value(values, "greater") == pytest.approx(theirs.pvalue, abs=4 * math.sqrt(0.03 / 20_000))
    assert p_value(values, "greater") == p_value(values, "greater")
    assert p_value(np.full(60, 0.1), "greater") == 1 / 20_001


def test_equal_answers_say_nothing() -> None:
    assert p_value([], "greater") == p_value([0, 0], "less") == 1


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1, 1]
    assert holm([]) == []


def test_a_gain_without_a_fall_is_promoted_with_its_skill_and_size() -> None:
    verdict = decide([target("feedback/bases", 10), guard("lookup", losses=1, ties=200)], CONFIG)
    assert verdict.promote
    assert verdict.reason.startswith("feedback/bases rose 100.0 points (0.0% to 100.0% on 10: 10 won, 0 lost)")
    assert [found.verdict for found in verdict.findings] == ["gained", "no real change"]
    assert verdict.findings[0].p_gain == 2**-10


def test_a_real_fall_elsewhere_refuses_whatever_was_gained() -> None:
    verdict = decide([target("feedback/bases", 30), guard("lookup", losses=6, ties=200)], CONFIG)
    assert not verdict.promote
    assert verdict.reason.startswith("lookup fell 2.9 points")


def test_a_small_fall_is_borne_by_a_guard_and_not_by_a_target() -> None:
    small = {"wins": 0, "losses": 6, "ties": 994}
    assert decide([target("feedback/bases", 30), guard("lookup", **small)], CONFIG).promote
    verdict = decide([target("feedback/bases", 30), target("votes/lookup", **small)], CONFIG)
    assert not verdict.promote
    assert "votes/lookup fell 0.6 points" in verdict.reason


def test_a_fall_within_noise_is_no_fall() -> None:
    assert decide([target("feedback/bases", 30), guard("lookup", wins=3, losses=8, ties=89)], CONFIG).promote


def test_a_gain_that_is_real_and_tiny_is_no_reason() -> None:
    assert not decide([target("feedback/bases", 40, ties=9960)], CONFIG).promote


def test_the_more_skills_the_clearer_the_gain_must_be() -> None:
    gained = target("feedback/bases", 8, ties=2)
    assert decide([gained], CONFIG).promote
    others = [target(f"feedback/skill_{number}", 5, 5) for number in range(3)]
    verdict = decide([gained, *others], CONFIG)
    assert not verdict.promote
    assert verdict.findings[0].p_gain_corrected == pytest.approx(4 * 2**-8)


def test_a_skill_too_small_to_pass_costs_the_others_nothing() -> None:
    verdict = decide([target("feedback/bases", 7), *(target(f"feedback/{name}", 1) for name in "abc")], CONFIG)
    assert verdict.promote
    assert [found.verdict for found in verdict.findings] == ["gained", "too few", "too few", "too few"]


def test_too_few_questions_are_told_how_many_it_takes() -> None:
    verdict = decide([target("feedback/bases", 3), guard("lookup")], CONFIG)
    assert not verdict.promote
    said = "3 held-out questions of feedback/bases can never reach p <= 0.01; collect at least 7"
    assert verdict.reason == said
    assert sign_test(7, 7) <= 0.01 < sign_test(6, 6)
    assert fewest_questions(0.0625) == 4


def test_without_held_out_feedback_nothing_is_promoted() -> None:
    verdict = decide([guard("lookup", wins=50)], CONFIG)
    assert not verdict.promote
    assert verdict.reason.startswith("no held-out feedback to judge by")


def test_a_champion_that_must_go_is_followed_unless_something_falls() -> None:
    assert decide([guard("lookup", 3, 3)], CONFIG, "replace").promote
    assert decide([target("feedback/bases", 1, 1)], CONFIG, "replace").promote
    assert not decide([guard("lookup", losses=20)], CONFIG, "replace").promote
    assert not decide([], CONFIG, "replace").promote


def test_without_feedback_any_skill_may_gain_and_none_may_fall() -> None:
    equal = [guard(name) for name in ("lookup", "bases")]
    assert not decide(equal, CONFIG, "any_gain").promote
    assert decide([*equal, guard("search", wins=12, losses=1)], CONFIG, "any_gain").promote
    assert not decide([guard("search", wins=12), guard("lookup", losses=9)], CONFIG, "any_gain").promote


def test_the_first_model_needs_no_champion() -> None:
    assert first(CONFIG).promote


def test_unequal_sides_are_a_defect() -> None:
    with pytest.raises(ValueError, match="x: 2 scores of the champion, 1 of the candidate"):
        decide([Slice("x", "guard", [0, 1], [1])], CONFIG)


def test_the_report_shows_each_skill_and_survives_json() -> None:
    verdict = decide([target("feedback/bases", 10), guard("lookup", losses=1, ties=200)], CONFIG)
    text = report(verdict)
    assert "**Promoted**: feedback/bases rose 100.0 points" in text
    assert "| feedback/bases | target | 10 | 0.0% | 100.0% | +100.0 | 10 | 0 | 0.00098 | 0.00098 | 1 | gained |" in text
    assert "At most 1.0% of candidates" in text
    assert report(json.loads(json.dumps(verdict.to_json()))) == text


def simulated(
    random: np.random.Generator, sizes: Sequence[int], gains: Sequence[float], real_valued: bool = False
) -> list[Slice]:
    """Targets of these sizes, and two guards; candidate and champion have noise of their own."""
    parts = []
    guards = [(300, 0.0), (300, 0.0)]
    for number, (size, gain) in enumerate([*zip(sizes, gains, strict=True), *guards]):
        role = "target" if number < len(sizes) else "guard"
        skill = np.full(size, 0.6)
        if real_valued and role == "target":
            champion, candidate = (np.clip(skill + random.normal(0, 0.15, size), 0, 1) for _ in range(2))
            candidate = np.clip(candidate + gain, 0, 1)
        else:
            champion = (random.random(size) < skill).astype(float)
            candidate = (random.random(size) < skill + gain).astype(float)
        parts.append(Slice(f"skill_{number}", role, champion.tolist(), candidate.tolist()))  # type: ignore[arg-type]
    return parts


@pytest.mark.parametrize("real_valued", [False, True])
def test_a_candidate_that_is_no_better_passes_no_more_often_than_stated(real_valued: bool) -> None:
    config = CONFIG.model_copy(update={"false_promotion_rate": 0.05})
    random = np.random.default_rng(7)
    runs, sizes = (300, [12, 14, 13]) if real_valued else (1500, [40, 60, 25, 80])
    verdicts = [decide(simulated(random, sizes, [0.0] * len(sizes), real_valued), config) for _ in range(runs)]
    # Promotion also needs that nothing falls; the stated rate is of any gain at all being called real.
    false = sum(any(found.verdict == "gained" for found in verdict.findings) for verdict in verdicts)
    assert sum(verdict.promote for verdict in verdicts) <= false
    assert false / runs <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)


def test_a_real_gain_passes_often_and_guards_cost_little() -> None:
    random = np.random.default_rng(8)
    runs = 400
    verdicts = [decide(simulated(random, [60, 60], [0.35, 0.0]), CONFIG) for _ in range(runs)]
    called = sum(verdict.findings[0].verdict == "gained" for verdict in verdicts)
    fell = sum(any(found.verdict == "fell" for found in verdict.findings) for verdict in verdicts)
    assert called / runs >= 0.9
    # One target and two guards with a chance of at most fall_rate each.
    assert fell / runs <= 3 * CONFIG.fall_rate + 0.03


def test_a_candidate_that_learned_noise_is_refused() -> None:
    random = np.random.default_rng(9)
    for _ in range(20):
        # Held-out corrections are noise: each side is right by luck alone, and the skill beside has suffered.
        champion, candidate = ((random.random(20) < 0.05).astype(float).tolist() for _ in range(2))
        noise = Slice("feedback/bases", "target", champion, candidate)
        assert not decide([noise, guard("bases", 5, 40), guard("lookup", 2, 2)], CONFIG).promote
