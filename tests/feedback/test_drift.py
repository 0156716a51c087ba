"""Drift: thresholds at their boundaries, and the rate of false alarms by simulation."""

import numpy as np
import pytest

from components.feedback.drift import compare, first_words, lengths, psi, rating_change


def test_equal_shares_have_no_index() -> None:
    assert psi([100, 300], [100, 300]) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("size", [5, 50, 500])
def test_prompts_like_those_of_the_reference_alarm_less_than_once_in_a_hundred_looks(size: int) -> None:
    shares = np.array([0.5, 0.3, 0.15, 0.05])
    random = np.random.default_rng(size)
    reference = [int(count) for count in shares * 10_000]
    alarms = sum(compare("x", reference, random.multinomial(size, shares).tolist()).drifted for _ in range(300))
    assert alarms <= 3


def test_prompts_of_another_length_alarm() -> None:
    short, long = ["what is json"] * 500, ["tell me at length " * 9] * 50
    assert compare("length", lengths(short), lengths(long)).drifted


@pytest.mark.parametrize(
    ("current", "index", "drifted"),
    [
        ([7100, 2900], 0.188, False),  # no accident, but not large
        ([7200, 2800], 0.208, True),
        ([144, 56], 0.206, True),
        ([15, 5], 0.247, False),  # large, but one sample of so few in twenty is by chance
        ([20, 0], 1.768, True),
        ([0, 0], 0.0, False),
    ],
)
def test_a_shift_alarms_above_a_fifth_where_it_is_no_accident(current: list[int], index: float, drifted: bool) -> None:
    measure = compare("x", [5_000_000, 5_000_000], current)
    assert measure.value == pytest.approx(index, abs=0.001)
    assert (measure.drifted, measure.samples) == (drifted, sum(current))


@pytest.mark.parametrize(
    ("now", "p", "drifted"),
    [((10, 10), 0.461, False), ((4, 16), 0.00126, False), ((3, 17), 0.00036, True), ((20, 0), 0.000156, True)],
)
def test_votes_alarm_at_one_in_a_thousand(now: tuple[int, int], p: float, drifted: bool) -> None:
    measure = rating_change((60, 40), now)
    assert measure.value == pytest.approx(p, rel=0.02)
    assert (measure.drifted, measure.samples) == (drifted, sum(now))


def test_lengths_are_counted_in_words() -> None:
    prompts = ["", "one two", "one two three", " ".join("x" * 25), " ".join("x" * 26)]
    assert lengths(prompts) == [2, 1, 0, 0, 0, 0, 1, 1]


def test_first_words_beyond_those_of_the_reference_share_a_bin() -> None:
    assert first_words(["What is a?", "what is b?", "Where is c?"], ["what?", "who?", "?"]) == ([2, 1, 0], [1, 0, 2])
    rare = [f"word{number}" for number in range(40)]
    known, seen = first_words([*rare, *rare[:30]], rare)
    assert (known, seen) == ([2] * 30 + [10], [1] * 30 + [10])
