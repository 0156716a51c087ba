"""Arithmetic is exact, bounded and nothing else."""

import pytest

from components.config.params import InputError
from examples.stdlib_agent.arithmetic import MAX_DIGITS, calculate


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("37*12", "444"),
        (" 2 ** 10 ", "1024"),
        ("2^10", "1024"),
        ("6 × 7 ÷ 2 − 1", "20"),
        ("(3+4)*5", "35"),
        ("-7 // 2", "-4"),
        ("7 % 3", "1"),
        ("7/2", "3.5"),
        ("1/3", "0.3333"),
        ("1/30000", "3.333e-05"),
        ("8/2", "4"),
        ("12345.678+1", "12346.678"),
        ("+5--3", "8"),
        ("9" * MAX_DIGITS, "9" * MAX_DIGITS),
    ],
)
def test_values(expression: str, value: str) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os')",
        "a+1",
        "1 if 2 else 3",
        "[1]",
        "True+1",
        "'a'*3",
        "1j",
        "1;2",
        "f(1)",
        "(1).real",
        "1<2",
        "1 and 2",
    ],
)
def test_nothing_but_arithmetic(expression: str) -> None:
    with pytest.raises(InputError, match="is no arithmetic; allowed are numbers"):
        calculate(expression)


@pytest.mark.parametrize(
    "expression", ["9**9**9", "2**-999999999", "9" * 41, "1e300*1e300", "10.0**400", "10**39*10**39"]
)
def test_results_and_steps_are_bounded(expression: str) -> None:
    with pytest.raises(InputError, match=f"too large; results have at most {MAX_DIGITS} digits"):
        calculate(expression)


@pytest.mark.parametrize("expression", ["", "1+" * 150 + "1", "   "])
def test_length_is_bounded(expression: str) -> None:
    with pytest.raises(InputError, match="an expression has 1 to 200 characters"):
        calculate(expression)


@pytest.mark.parametrize("expression", ["(" * 99 + "1" + ")" * 99, "-" * 190 + "1"])
def test_depth_does_not_break_it(expression: str) -> None:
    assert calculate(expression) in ("1", "-1")


def test_divisions_by_zero_and_imaginary_results_are_named() -> None:
    for operator in ("/", "//", "%"):
        with pytest.raises(InputError, match="divides by zero"):
            calculate(f"3 {operator} 0")
    with pytest.raises(InputError, match="divides by zero"):
        calculate("0**-1")
    with pytest.raises(InputError, match="has no real value"):
        calculate("(-8)**0.5")
