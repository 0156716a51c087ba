"""Drift: the rate of false alarms by simulation."""

import numpy as np
import pytest

from components.feedback.drift import compare, lengths, psi


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
