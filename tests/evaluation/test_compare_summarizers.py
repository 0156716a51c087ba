"""The summarizer's metrics by suite, ROUGE and chrF by hand, and the gate on paired scores."""

from __future__ import annotations

import pytest

from components.config.params import Params, load_params
from components.datasets.formats import Row
from components.evaluation.compare_summarizers import judge_summaries, measure, nearest_targets, overlap
from components.evaluation.held_out import flat_metrics
from tests.feedback.project import SOURCE

WORDS = ("return", "the", "json", "text", "of", "an", "object", "read", "lines", "from", "a", "file", "and", "close")


def rows(count: int, suite: str = "symbols") -> list[Row]:
    targets = [" ".join(WORDS[(number * 3 + place) % len(WORDS)] for place in range(6)) for number in range(count)]
    return [{"id": str(n), "suite": suite, "source": f"def f{n}(): pass", "target": t} for n, t in enumerate(targets)]


@pytest.fixture(scope="module")
def params() -> Params:
    return load_params(SOURCE / "params.yaml")


def test_figures_stand_by_suite_beside_the_baselines() -> None:
    pairs = [*rows(4), *rows(3, "modules")]
    targets = [row["target"] for row in pairs]
    texts = {"": targets, "baseline_": ["nothing alike"] * 7, "greedy_": targets}
    figures = measure(pairs, texts)
    assert figures["score"] == 1.0
    assert (figures["suites"]["symbols"]["texts"], figures["suites"]["modules"]["texts"]) == (4, 3)
    assert figures["suites"]["symbols"]["exact_match"] == 1.0
    assert not figures["suites"]["symbols"]["baseline_is_better"]
    assert measure(pairs, {"": texts["baseline_"], "baseline_": targets})["suites"]["modules"]["baseline_is_better"]
    flat = flat_metrics(figures, "rougeL")
    assert (flat["score"], flat["symbols/score"], flat["modules/baseline_rouge1"]) == (1.0, 1.0, 0.0)


def test_the_gate_lets_the_better_pass_and_neither_an_equal_nor_a_worse_one(params: Params) -> None:
    pairs = rows(60)
    targets = [row["target"] for row in pairs]
    half = [" ".join(text.split()[:3]) for text in targets]
    assert judge_summaries(pairs, targets, half, params).promote
    assert not judge_summaries(pairs, half, half, params).promote
    assert not judge_summaries(pairs, half, targets, params).promote


def test_equal_texts_are_one_and_unlike_texts_zero() -> None:
    same = overlap(["return the json text"], ["return the json text"])
    assert (same.rouge1, same.rouge2, same.rougeL) == (1.0, 1.0, 1.0)
    assert same.chrf == pytest.approx(1.0)
    other = overlap(["zzz"], ["return the json text"])
    assert (other.rouge1, other.rouge2, other.rougeL, other.chrf) == (0.0, 0.0, 0.0, 0.0)


def test_rouge_of_a_case_by_hand() -> None:
    # Text: a b c d; reference: a c d e b. Words in common 4; pairs in common: (c d); longest common subsequence: a c d.
    scores = overlap(["alpha beta gamma delta"], ["alpha gamma delta epsilon beta"])
    assert scores.rouge1 == pytest.approx(2 * (4 / 4) * (4 / 5) / (4 / 4 + 4 / 5))
    assert scores.rouge2 == pytest.approx(2 * (1 / 3) * (1 / 4) / (1 / 3 + 1 / 4))
    assert scores.rougeL == pytest.approx(2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5))
    assert scores.each == (scores.rougeL,)


def test_texts_without_references_are_refused() -> None:
    with pytest.raises(ValueError, match="texts: 2 with 1 references"):
        overlap(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="texts: 0 with 0 references"):
        overlap([], [])


def test_the_baseline_is_the_target_of_the_nearest_source() -> None:
    sources = ["def load(path): open file read json", "def area(radius): pi times radius", "def join(parts): separator"]
    scores = nearest_targets(sources, ["Load.", "Area.", "Join."], ["radius of a circle and pi", "read a json file"])
    assert scores == ["Area.", "Load."]
