"""Arithmetic on text, evaluated as a syntax tree of numbers and operators: nothing else is allowed."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable

from components.config.params import InputError

MAX_LENGTH = 200
"""Characters of an expression."""
MAX_DIGITS = 40
"""Digits of a whole number, on the way and as the result."""
ALLOWED = "allowed are numbers, + - * / // % ** and parentheses"

Number = int | float
# As people type them.
SPELLINGS = {"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "^": "**"}

OPERATORS: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def calculate(expression: str) -> str:
    """The value of an expression; fractions rounded to four decimals (small ones to four digits).

    Raises: InputError for what is no arithmetic, divides by zero or grows too large.
    """
    text = expression.strip()
    for spelling, python in SPELLINGS.items():
        text = text.replace(spelling, python)
    if not text or len(text) > MAX_LENGTH:
        raise InputError(f"an expression has 1 to {MAX_LENGTH} characters, not {len(text)}")
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise InputError(f"{text!r} is no arithmetic; {ALLOWED}") from None
    return _written(_value(tree, text))


def _value(node: ast.expr, text: str) -> Number:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return _bounded(node.value, text)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _value(node.operand, text)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, text), _value(node.right, text)
        try:
            if isinstance(node.op, ast.Pow):
                return _bounded(_power(left, right, text), text)
            if type(node.op) in OPERATORS:
                return _bounded(OPERATORS[type(node.op)](left, right), text)
        except ZeroDivisionError:
            raise InputError(f"{text} divides by zero") from None
        except OverflowError:
            raise _too_large(text) from None
    raise InputError(f"{ast.unparse(node)!r} is no arithmetic; {ALLOWED}")


def _power(base: Number, exponent: Number, text: str) -> Number:
    if base and abs(exponent) * max(1.0, abs(math.log10(abs(base)))) > MAX_DIGITS * 8:
        raise _too_large(text)
    value: complex = base**exponent
    if isinstance(value, complex):
        raise InputError(f"{text} has no real value")
    return value


def _bounded(value: Number, text: str) -> Number:
    if not math.isfinite(value) or abs(value) >= 10**MAX_DIGITS:
        raise _too_large(text)
    return value


def _too_large(text: str) -> InputError:
    return InputError(f"{text} is too large; results have at most {MAX_DIGITS} digits")


def _written(value: Number) -> str:
    if isinstance(value, int):
        return str(value)
    if value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if 1e-3 <= abs(value) < 1e15:
        return f"{value:.4f}".rstrip("0").rstrip(".")
    return f"{value:.4g}"
