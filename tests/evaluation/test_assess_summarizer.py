"""The summarizer's assessment: figures beside the baseline's, and a paired gate that lets no equal pass."""

from __future__ import annotations

import pytest

from components.config.params import Params, load_params
from components.datasets.formats import Row
from components.evaluation.assess_summarizer import flat_metrics, judge_texts, measure
from tests.feedback.project import SOURCE

WORDS = ("return", "the", "json", "text", "of", "an", "object", "read", "lines", "from", "a", "file", "and", "close")


def rows(count: int, suite: str = "symbols") -> list[Row]:
    targets = [" ".join(WORDS[(number * 3 + place) % len(WORDS)] for place in range(6)) for number in range(count)]
    return [{"id": str(n), "suite": suite, "source": f"def f{n}(): pass", "target": t} for n, t in enumerate(targets)]


@pytest.fixture(scope="module")
def params() -> Params:
    return load_params(SOURCE / "params.yaml")


def test_figures_stand_by_suite_beside_the_baselines() -> None:
    asked = [*rows(4), *rows(3, "modules")]
    wanted = [row["target"] for row in asked]
    texts = {"": wanted, "baseline_": ["nothing alike"] * 7, "greedy_": wanted}
    figures = measure(asked, texts)
    assert figures["score"] == 1.0
    assert (figures["suites"]["symbols"]["texts"], figures["suites"]["modules"]["texts"]) == (4, 3)
    assert figures["suites"]["symbols"]["exact_match"] == 1.0
    assert not figures["suites"]["symbols"]["baseline_is_better"]
    assert measure(asked, {"": texts["baseline_"], "baseline_": wanted})["suites"]["modules"]["baseline_is_better"]
    flat = flat_metrics(figures)
    assert (flat["score"], flat["symbols/score"], flat["modules/baseline_rouge1"]) == (1.0, 1.0, 0.0)


def test_the_gate_lets_the_better_pass_and_neither_an_equal_nor_a_worse_one(params: Params) -> None:
    asked = rows(60)
    wanted = [row["target"] for row in asked]
    half = [" ".join(text.split()[:3]) for text in wanted]
    assert judge_texts(asked, wanted, half, params).promote
    assert not judge_texts(asked, half, half, params).promote
    assert not judge_texts(asked, half, wanted, params).promote
