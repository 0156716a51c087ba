"""Suites about pictures: captions count by CIDEr-D, in figures and gate; sets without suites are one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from components.config.paths import Paths
from components.datasets.formats import DatasetWriter, Row
from components.evaluation.captions import cider_d
from components.evaluation.compare_agents import AgentFolder, judge_folders
from components.evaluation.evaluate import flat_metrics, write_answers
from components.evaluation.questions import captions_in, correctness, read_questions
from components.media.messages import IMAGE
from components.media.pictures import Picture
from tests.feedback.project import SETTINGS, new_run, write_model, write_project

QUESTION = f"{IMAGE}\nDescribe it."
COLORS, ANIMALS = ("red", "blue", "green", "teal"), ("cat", "dog", "cow")
RIGHT = [f"a small {color} {animal} in the upper left" for color in COLORS for animal in ANIMALS]
CLOSE = [caption.replace("small", "tiny") for caption in RIGHT]
FAR = [caption.replace("small", "tiny").replace("upper left", "corner") for caption in RIGHT]


def answers(captions: list[str], question: str = QUESTION, suite: str = "captions/shown") -> list[Row]:
    calls = {"expected_calls": "[]", "calls": "[]", "right_calls": True}
    return [
        {"suite": suite, "question": question, "expected": right, "answer": answer, "correct": answer == right, **calls}
        for right, answer in zip(RIGHT, captions, strict=True)
    ]


def test_a_caption_in_other_words_counts_by_cider_d() -> None:
    table = answers([RIGHT[0], *CLOSE[1:]])
    scores, expected = correctness(table), cider_d([RIGHT[0], *CLOSE[1:]], [[caption] for caption in RIGHT])
    assert scores == pytest.approx([each / 10 for each in expected])
    assert scores[0] == 1.0
    assert all(0 < score < 1 for score in scores[1:])
    assert captions_in(table).keys() == {"captions/shown"}


def test_answers_to_text_and_short_ones_are_right_or_wrong() -> None:
    assert correctness(answers(CLOSE, "Describe a cat.")) == [0.0] * 12
    words = [{**row, "expected": "red"} for row in answers(CLOSE, suite="colors/shown")]
    assert correctness([*words, *answers(RIGHT)]) == [0.0] * 12 + [1.0] * 12


def write_pictures(folder: Path, suite: str | None) -> None:
    with DatasetWriter(folder, "shots", "images") as writer:
        for number, caption in enumerate(RIGHT):
            content = Picture(np.full((4, 4, 3), number, np.uint8)).png()
            messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": caption}]
            row: dict[str, Any] = {"id": str(number), "images": [content], "messages": messages, "suite": suite}
            writer.write("test", row)


def test_the_gate_compares_captions_of_which_none_is_exactly_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_project(tmp_path)
    write_pictures(paths.collected / "shots", "captions/shown")
    monkeypatch.setitem(SETTINGS, "tune.dataset", "shots")
    params = new_run(paths, "judge").params
    write_model(paths, paths.champion)
    shutil.copytree(paths.champion, paths.candidate)
    for folder, captions in ((paths.champion, FAR), (paths.candidate, CLOSE)):
        write_answers(folder, answers(captions), paths.collected, params, params.judge.max_questions)
    candidate, champion = (AgentFolder(folder, folder) for folder in (paths.candidate, paths.champion))
    comparison = judge_folders(candidate, champion, paths.collected, None, params, "any_gain")
    (finding,) = comparison.decision.findings
    assert (finding.skill, finding.outcome, finding.wins) == ("captions", "better", 12)
    assert comparison.decision.promote
    assert comparison.score == pytest.approx(np.mean(correctness(answers(CLOSE))))
    assert not judge_folders(champion, candidate, paths.collected, None, params, "replace").decision.promote


def test_added_pictures_without_suites_are_one_suite(tmp_path: Path) -> None:
    folder = Paths(tmp_path).collected / "shots"
    write_pictures(folder, None)
    questions = list(read_questions(folder, 100))
    assert [question.suite for question in questions] == ["shots/held_out"] * 12


def test_figures_of_baselines_stand_beside_the_models() -> None:
    captions = {"cider_d": 7.5, "bleu": 0.6, "baseline": {"cider_d": 3.0, "bleu": 0.2}}
    assert flat_metrics({"score": 0.5, "suites": {"captions/shown": captions}}) == {
        "score": 0.5,
        "captions/shown/cider_d": 7.5,
        "captions/shown/bleu": 0.6,
        "captions/shown/baseline_cider_d": 3.0,
        "captions/shown/baseline_bleu": 0.2,
    }
