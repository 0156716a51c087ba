"""Arithmetic questions: an expression, and how a person writes it in signs or in words."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from components.datasets.formats import in_test_split
from examples.stdlib_agent.phrasings import template_groups
from examples.stdlib_agent.wordings import Wordings

SIGNS = ("+", "+", "+", "-", "-", "-", "*", "*", "*", "*", "/", "/", "%", "//", "**")
SPACED = ("{}", " {} ", " {} ")


@dataclass(frozen=True)
class Sum:
    """One expression as the tool is to get it, and as the question has it."""

    expression: str
    slots: dict[str, str]
    """What fills the wording."""
    order: str = ""
    """The whole wording, such as `divide {a} by {b}`; empty for an expression within a question."""


class Sums:
    """Expressions with numbers that training sees, or with ones that it never does."""

    def __init__(self, held_out_share: float, seed: int) -> None:
        self.held_out_share = held_out_share
        self.seed = seed
        self._words = [
            (expression, Wordings(words, None)) for expression, words in template_groups("operations").items()
        ]
        self._orders = [(expression, Wordings(words, None)) for expression, words in template_groups("orders").items()]

    def is_held_out(self, expression: str) -> bool:
        """Whether training never sees these numbers together, in whatever order and with whatever operators."""
        numbers = sorted(re.findall(r"[\d.]+", expression))
        return in_test_split(" ".join(numbers), self.held_out_share, self.seed)

    def draw(self, rng: random.Random, held_out: bool = False, orders: bool = True) -> Sum:
        """An expression of numbers that training sees together, or never does; no order without `orders`."""
        while True:
            drawn = self._draw(rng)
            if self.is_held_out(drawn.expression) is held_out and (orders or not drawn.order):
                return drawn

    def _draw(self, rng: random.Random) -> Sum:
        style = rng.random()
        if style < 0.5:
            return _in_signs(rng)
        pattern, wordings = rng.choice(self._words if style < 0.87 else self._orders)
        a, b = _operands(rng, pattern.replace("{a}", "").replace("{b}", ""))
        numbers = {"a": b, "b": a} if pattern == "{b}-{a}" else {"a": a, "b": b}
        words, expression = wordings.pick(rng), pattern.format(**numbers)
        if style < 0.87:
            return Sum(expression, {"e": words.format(**numbers)})
        return Sum(expression, numbers, order=words)


def _in_signs(rng: random.Random) -> Sum:
    count = rng.choice((2, 2, 2, 2, 3, 3, 4))
    sign = rng.choice(SIGNS)
    first, second = _operands(rng, sign)
    parts = [first, sign, second]
    for _ in range(count - 2):
        sign = rng.choice("++--**")
        operand = _number(rng, rng.choice((1, 1, 2, 2, 3)))
        parts = ["(", *parts, ")"] if rng.random() < 0.35 else parts
        parts = [operand, sign, *parts] if parts[0] == "(" and rng.random() < 0.5 else [*parts, sign, operand]
    spaced = rng.choice(SPACED)
    times = rng.choice(("*", "*", "*", "*", "x", "×")) if spaced != "{}" else "*"
    shown = (spaced.format(times if part == "*" else part) if part[0] in "+-*/%" else part for part in parts)
    return Sum("".join(parts), {"e": "".join(shown)})


def _operands(rng: random.Random, sign: str) -> tuple[str, str]:
    """Two numbers of one to four digits that suit the operator."""
    digits = (1, 1, 2, 2, 2, 3, 3, 4)
    if sign.startswith("**"):
        return _number(rng, rng.choice((1, 1, 2))), str(rng.randrange(2, 7))
    first, second = _number(rng, rng.choice(digits)), _number(rng, rng.choice(digits))
    if sign.startswith(("/", "%")):
        second = _number(rng, rng.choice((1, 1, 2, 2, 3)))
        if sign == "/" and rng.random() < 0.7:
            first = str(int(second) * int(_number(rng, rng.choice((1, 2, 2)))))
        return first, second
    if sign in ("+", "-", "*") and rng.random() < 0.06:
        first = f"{first}.{rng.randrange(1, 10)}"
    return first, second


def _number(rng: random.Random, digits: int) -> str:
    return str(rng.randrange(10 ** (digits - 1) + (digits == 1), 10**digits))
