"""ROUGE and chrF on cases worked out by hand."""

import pytest

from components.evaluation.baseline import nearest_targets
from components.evaluation.overlap import overlap


def test_equal_texts_are_one_and_unlike_texts_zero() -> None:
    same = overlap(["return the json text"], ["return the json text"])
    assert (same.rouge1, same.rouge2, same.rougeL) == (1.0, 1.0, 1.0)
    assert same.chrf == pytest.approx(1.0)
    other = overlap(["zzz"], ["return the json text"])
    assert (other.rouge1, other.rouge2, other.rougeL, other.chrf) == (0.0, 0.0, 0.0, 0.0)


def test_rouge_of_a_case_by_hand() -> None:
    # Said: a b c d; wanted: a c d e b. Words in common 4; pairs in common: (c d); longest common subsequence: a c d.
    found = overlap(["alpha beta gamma delta"], ["alpha gamma delta epsilon beta"])
    assert found.rouge1 == pytest.approx(2 * (4 / 4) * (4 / 5) / (4 / 4 + 4 / 5))
    assert found.rouge2 == pytest.approx(2 * (1 / 3) * (1 / 4) / (1 / 3 + 1 / 4))
    assert found.rougeL == pytest.approx(2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))
    assert found.each == (found.rougeL,)


def test_as_many_texts_as_references_are_wanted() -> None:
    with pytest.raises(ValueError, match="texts: 2 with 1 references"):
        overlap(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="texts: 0 with 0 references"):
        overlap([], [])


def test_the_nearest_source_lends_its_target() -> None:
    sources = ["def load(path): open file read json", "def area(radius): pi times radius", "def join(parts): separator"]
    found = nearest_targets(sources, ["Load.", "Area.", "Join."], ["radius of a circle and pi", "read a json file"])
    assert found == ["Area.", "Load."]
