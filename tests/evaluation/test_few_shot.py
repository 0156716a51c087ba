"""Few-shot prompts: solved examples of the same kind before the question; prompts too long count as wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.config.paths import Paths
from components.evaluation.few_shot import few_shot
from components.evaluation.parallel_rollout import ParallelRollout
from components.evaluation.questions import Question, read_questions
from tests.feedback.project import new_run, write_project


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    return write_project(tmp_path_factory.mktemp("shots"))


@pytest.fixture(scope="module")
def rollout(paths: Paths) -> ParallelRollout:
    return ParallelRollout(paths.start, new_run(paths, "evaluate").params.evaluate)


def folder(paths: Paths) -> Path:
    return paths.collected / "talks"


def test_without_examples_it_is_the_plain_question(paths: Paths, rollout: ParallelRollout) -> None:
    config = new_run(paths, "evaluate", evaluate__shots=[0], evaluate__shot_questions=5).params.evaluate
    questions = list(read_questions(folder(paths), 5))
    figures = few_shot(rollout.agent, rollout, [folder(paths)], questions, config, seed=0)
    plain = rollout(questions)
    assert set(figures) == {question.suite for question in questions}
    for suite, measured in figures.items():
        rows = [row for row in plain if row["suite"] == suite]
        assert measured == {
            "questions": len(rows),
            "0": round(sum(row["correct"] for row in rows) / len(rows), 4),
            "too_long": 0,
        }


def test_examples_are_solved_alike_and_the_question_stays_last(paths: Paths, rollout: ParallelRollout) -> None:
    config = new_run(paths, "evaluate", evaluate__shots=[2], evaluate__shot_questions=3).params.evaluate
    asked: list[Question] = []

    def answered(questions: list[Question], *rest: object) -> list[dict[str, bool]]:
        asked.extend(questions)
        return [{"correct": True} for _ in questions]

    questions = list(read_questions(folder(paths), 3))
    few_shot(rollout.agent, answered, [folder(paths)], questions, config, seed=0)
    for plain, shown in zip(questions, asked, strict=True):
        assert shown.messages[-1] == plain.messages[-1]
        roles = [message["role"] for message in shown.messages[: -len(plain.messages)]]
        alone = (
            ["user", "assistant", "tool", "assistant"] if plain.suite.startswith("lookup") else ["user", "assistant"]
        )
        assert roles == alone * 2
        contents = {message["content"] for message in shown.messages[: -len(plain.messages)]}
        assert plain.expected not in contents  # held out means held out


def test_what_does_not_fit_is_wrong_and_counted(paths: Paths, rollout: ParallelRollout) -> None:
    config = new_run(paths, "evaluate", evaluate__shots=[0, 18], evaluate__shot_questions=2).params.evaluate
    questions = [each for each in read_questions(folder(paths), 2) if each.suite.startswith("lookup")]
    figures = few_shot(rollout.agent, rollout, [folder(paths)], questions, config, seed=0)
    assert figures["lookup/held_out"]["too_long"] == 2
    assert figures["lookup/held_out"]["18"] == 0.0
