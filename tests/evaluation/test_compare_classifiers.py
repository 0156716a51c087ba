"""A classifier is measured as by scikit-learn, beside its baseline, and compared text by text with a champion."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn import metrics

from components.config.params import InputError, Params, load_params
from components.config.paths import Paths
from components.evaluation import assess as module
from components.evaluation.assess import assess, draw_confusion, draw_f1
from components.evaluation.compare_classifiers import (
    Predictions,
    expected_calibration_error,
    judge_classifier,
    judge_predictions,
    measure,
    reliability,
)
from components.evaluation.held_out import flat_metrics, held_out_digest, read_held_out, suites
from components.evaluation.suite_plot import draw_suites
from components.runtime.stage import StageRun

SOURCE = Path(__file__).parents[2]
WORDS = {"fruit": ["apple", "pear", "plum"], "metal": ["iron", "zinc", "tin"], "animal": ["cow", "dog", "cat"]}
SUITES = ("areas/held_out_symbols", "areas/held_out_modules")


def rows(count: int, suites: tuple[str | None, ...]) -> list[dict[str, Any]]:
    random = np.random.default_rng(count)
    labels = [list(WORDS)[place % 3] for place in range(count)]
    texts = [" ".join(random.choice(WORDS[label], 3)) for label in labels]
    return [
        {"id": str(place), "text": text, "label": label, "suite": suites[place % len(suites)]}
        for place, (text, label) in enumerate(zip(texts, labels, strict=True))
    ]


@pytest.fixture
def collected(tmp_path: Path) -> Path:
    folder = tmp_path / "data/collected/stdlib-areas"
    folder.mkdir(parents=True)
    for split, held in (("train", rows(30, (None,))), ("test", rows(48, SUITES))):
        columns = {name: pa.array([row[name] for row in held], pa.string()) for name in held[0]}
        pq.write_table(pa.table(columns), folder / f"{split}-00000.parquet")
    return folder.parent


@pytest.fixture
def params() -> Params:
    return load_params(SOURCE / "params.yaml", {"scale": "smoke", "classifier.dataset": "stdlib-areas"})


class RecordingTracker:
    """What a stage logs to its tracker."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.figures: list[str] = []

    def params(self, values: Mapping[str, Any]) -> None: ...

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        self.values.update(values)

    def dataset(self, name: str, digest: str, source: str, context: str) -> None: ...

    def table(self, name: str, columns: Mapping[str, list[Any]]) -> None: ...

    def artifact(self, path: Path) -> None: ...

    def figure(self, figure: Any, name: str) -> None:
        figure.draw_without_rendering()
        self.figures.append(name)

    @contextmanager
    def child(self, name: str) -> Iterator[RecordingTracker]:
        yield self


PRICES = ("$", "$$", "$$$", "$x^{2$", "a_b", r"\frac{", "<&>", "\n")


def test_labels_are_drawn_as_they_are() -> None:
    """matplotlib reads text between two dollar signs as mathematics, and refuses most of it."""
    labels = {name: {"f1": 0.5, "baseline_f1": None} for name in PRICES}
    figures = (draw_confusion(np.eye(len(PRICES), dtype=np.int64), PRICES), draw_f1(labels))
    for figure in figures:
        figure.draw_without_rendering()
        assert {*PRICES} <= {label.get_text() for label in figure.axes[0].get_yticklabels()}
    bounds = dict.fromkeys(PRICES, (0.4, 0.6))
    draw_suites(dict.fromkeys(PRICES, 0.5), bounds, {"champion": [0.4] * len(PRICES)}).draw_without_rendering()


def test_thousands_of_labels_fit_a_figure() -> None:
    figure = draw_f1({str(number): {"f1": 0.5, "baseline_f1": None} for number in range(3_000)})
    assert figure.get_figheight() * figure.dpi < 2**16, "more is refused by matplotlib"


def test_ece_is_that_of_the_paper_by_hand() -> None:
    """Two bins: (0.8, 0.867] holds two predictions, one correct; (0.933, 1] two, both correct."""
    confidences = np.array([0.82, 0.86, 0.95, 1.0])
    correct = np.array([True, False, True, True])
    assert [(each.texts, each.accuracy) for each in reliability(confidences, correct)] == [(2, 0.5), (2, 1.0)]
    expected = (2 * abs(0.5 - 0.84) + 2 * abs(1.0 - 0.975)) / 4
    assert expected_calibration_error(confidences, correct) == pytest.approx(expected)


def test_predictions_are_binned_by_fifteenths() -> None:
    edges = np.arange(1, 16) / 15
    confidences = np.concatenate([edges - 0.01, edges - 0.05])
    assert [each.texts for each in reliability(confidences, confidences > 0.5)] == [2] * 15
    assert [each.texts for each in reliability(np.array([0.0, 0.06, 0.07]), np.array([True, True, True]))] == [2, 1]


def test_figures_are_those_of_scikit_learn() -> None:
    random = np.random.default_rng(0)
    names = list("abcd")
    labels = [names[number] for number in random.integers(0, 4, 200)]
    texts = [{"label": label, "text": "", "suite": None} for label in labels]
    predictions, base = (
        Predictions([names[number] for number in random.integers(0, 4, 200)], random.random(200)) for _ in range(2)
    )
    figures = measure(texts, predictions, base, names)
    suite = figures["suites"]["test"]
    assert suite["accuracy"] == pytest.approx(metrics.accuracy_score(labels, predictions.labels), abs=1e-4)
    for prefix, each in (("", predictions), ("baseline_", base)):
        scores = metrics.f1_score(labels, each.labels, average=None)
        assert suite[f"{prefix}macro_f1"] == pytest.approx(scores.mean(), abs=1e-4)
        assert [label[f"{prefix}f1"] for label in figures["labels"].values()] == pytest.approx(scores, abs=1e-4)
    assert suite["baseline_is_better"] == (suite["baseline_macro_f1"] > suite["macro_f1"])
    assert sum(label["texts"] for label in figures["labels"].values()) == 200


def assessed_paths(root: Path, classifier_folder: Path) -> Paths:
    """A project whose fine-tuned classifier is that folder."""
    paths = Paths(root)
    paths.classifier.parent.mkdir(parents=True)
    paths.classifier.symlink_to(classifier_folder)
    paths.metrics.mkdir(parents=True)
    return paths


def test_the_stage_measures_each_suite_beside_the_baseline(
    collected: Path, classifier_folder: Path, params: Params, tmp_path: Path
) -> None:
    paths = assessed_paths(tmp_path, classifier_folder)
    tracker = RecordingTracker()
    assess(StageRun("assess@classifier", params, paths, tmp_path / "state", tracker))
    figures = json.loads((paths.metrics / "assess@classifier.json").read_text())
    assert set(figures["suites"]) == set(SUITES)
    for suite in figures["suites"].values():
        assert (suite["texts"], suite["accuracy"], suite["baseline_accuracy"]) == (24, 1.0, 1.0)
        assert 0 <= suite["ece"] < 0.2
        assert not suite["baseline_is_better"]
    assert (figures["score"], figures["truncated"]) == (1.0, 0)
    assert figures["held_out_digest"] == held_out_digest("classifier", collected, params)
    assert tracker.figures == ["confusion_matrix.png", "reliability.png", "f1_per_label.png"]
    assert tracker.values == flat_metrics(figures, "macro_f1")
    saved = pq.read_table(paths.assessment("classifier") / "predictions.parquet").to_pylist()
    assert [row["predicted"] for row in saved] == [row["label"] for row in saved]
    lines = (paths.metrics / "assess@classifier_f1.csv").read_text().splitlines()
    assert lines[0] == "label,f1,baseline_f1,texts"
    assert lines[1:] == ["fruit,1.0,1.0,16", "metal,1.0,1.0,16", "animal,1.0,1.0,16"]


def test_a_plot_that_fails_does_not_fail_the_stage(
    collected: Path,
    classifier_folder: Path,
    params: Params,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(*arguments: Any) -> Any:
        raise RuntimeError("no font\nfound")

    monkeypatch.setattr(module, "draw_confusion", fails)
    paths, tracker = Paths(tmp_path), RecordingTracker()
    paths.classifier.parent.mkdir(parents=True)
    paths.classifier.symlink_to(classifier_folder)
    paths.metrics.mkdir(parents=True)
    assess(StageRun("assess@classifier", params, paths, tmp_path / "state", tracker))
    assert "confusion_matrix.png: not written: no font found; going on without\n" in capsys.readouterr().err
    assert tracker.figures == ["reliability.png", "f1_per_label.png"]
    assert {file.name for file in paths.metrics.iterdir()} == {"assess@classifier.json", "assess@classifier_f1.csv"}


def test_a_dataset_without_held_out_texts_is_refused(collected: Path, params: Params, tmp_path: Path) -> None:
    (collected / "stdlib-areas/test-00000.parquet").unlink()
    with pytest.raises(InputError, match=r"classifier\.dataset: no held-out texts in it; add rows"):
        assess(StageRun("assess@classifier", params, Paths(tmp_path), tmp_path / "state", RecordingTracker()))


def test_a_better_classifier_is_promoted_and_a_worse_one_refused(
    collected: Path, classifier_folder: Path, classifier_maker: Callable[..., Path], params: Params, tmp_path: Path
) -> None:
    wrong = classifier_maker(tmp_path / "wrong", turned=1)
    decision = judge_classifier(classifier_folder, wrong, collected, params)
    assert decision.promote
    assert "areas/held_out_symbols from 0.000 to 1.000 (24 won, 0 lost)" in decision.reason
    assert "the TF-IDF baseline is no better: 1.000 against 1.000" in decision.reason
    decision = judge_classifier(wrong, classifier_folder, collected, params)
    assert not decision.promote
    assert decision.reason.startswith("regresses: ")
    assert decision.reason.endswith("the TF-IDF baseline is better: 1.000 against 0.000 of all texts right")
    assert not judge_classifier(classifier_folder, classifier_folder, collected, params).promote


def test_saved_predictions_are_not_computed_again(
    collected: Path, classifier_folder: Path, params: Params, tmp_path: Path
) -> None:
    paths = assessed_paths(tmp_path, classifier_folder)
    assess(StageRun("assess@classifier", params, paths, tmp_path / "state", RecordingTracker()))
    saved, nowhere = paths.assessment("classifier"), tmp_path / "nowhere"
    decision = judge_classifier(nowhere, nowhere, collected, params, saved, saved)
    assert decision.reason.startswith("no significant gain")
    other = load_params(SOURCE / "params.yaml", {"scale": "smoke", "assess.max_texts": 7})
    with pytest.raises(InputError, match="nowhere"):
        judge_classifier(nowhere, nowhere, collected, other, saved, saved)


def test_a_real_gain_over_all_texts_together_promotes(params: Params) -> None:
    """Each suite alone has too few texts to tell."""
    texts = [{"label": "a", "text": "", "suite": f"s{number % 3}"} for number in range(24)]
    champion = ["b"] * 12 + ["a"] * 12
    decision = judge_predictions(texts, ["a"] * 24, champion, ["a"] * 24, params)
    assert decision.promote
    assert "overall from 0.500 to 1.000 (12 won, 0 lost)" in decision.reason
    assert not judge_predictions(texts, champion, champion, champion, params).promote


def test_texts_are_taken_suite_by_suite(collected: Path, params: Params) -> None:
    few = params.model_copy(update={"assess": params.assess.model_copy(update={"max_texts": 5})})
    texts = read_held_out("classifier", collected, few)
    assert {suite: len(indices) for suite, indices in suites(texts).items()} == dict.fromkeys(SUITES, 5)
