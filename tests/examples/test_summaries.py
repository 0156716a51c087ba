"""A docstring becomes one short plain sentence, or nothing."""

import collections
import functools
import json
import math

import pytest

from examples.stdlib_agent.summaries import MAX_SUMMARY, first_sentence, shortened, summary


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        (json.dumps.__doc__, "Serialize obj to a JSON formatted str."),
        (collections.OrderedDict.__doc__, "Dictionary that remembers insertion order."),
        (math.sin.__doc__, "Return the sine of x (measured in radians)."),
        (functools.partial.__doc__, "New function with partial application of the given arguments and keywords."),
        ("Use :func:`os.walk` or ``glob``,\n  e.g. Here. Never both.", "Use os.walk or glob, e.g. Here."),
        ("f(x) -> int\n\nCount x", "Count x."),
        ("f(x) -> the number of x", "The number of x."),
        ("D.pop(k[,d]) -> v, remove specified key.", "Remove specified key."),
        ("int, int -> Construct a date from a week.\n", "Construct a date from a week."),
        ("L.insert(index, object) -- insert object before index", "Insert object before index."),
        ("Things to know:\n\n - one", "Things to know."),
        ("Heading here\n============\n\ntext", "Heading here."),
    ],
)
def test_first_sentence_without_markup_and_signature(docstring: str, expected: str) -> None:
    assert summary(docstring) == expected


@pytest.mark.parametrize("docstring", ["", "   ", "Word.", ">>> f(1) and more", "Très joli mot.", "word " * 30])
def test_what_is_not_short_and_plain_has_no_summary(docstring: str) -> None:
    assert summary(docstring) == ""


def test_a_long_sentence_is_cut_at_a_word() -> None:
    cut = shortened("word " * 40 + "end.")
    assert len(cut) <= MAX_SUMMARY
    assert cut.endswith("word...")
    assert len(first_sentence("word " * 40)) > MAX_SUMMARY
