"""Questions split among processes are answered as by one, and a process that dies is an error."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from components.config.loop_settings import EvaluateConfig
from components.config.paths import Paths
from components.evaluation import parallel_rollout as module
from components.evaluation.parallel_rollout import ParallelRollout
from components.evaluation.questions import Question, answer_questions, read_questions
from tests.feedback.project import new_run, write_project


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    return write_project(tmp_path_factory.mktemp("rollout"))


@pytest.fixture
def rollout(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> ParallelRollout:
    """With one worker process, for any number of questions."""
    monkeypatch.setattr(module, "MIN_QUESTIONS", 1)
    return ParallelRollout(paths.start, config(paths), cores=2)


def config(paths: Paths) -> EvaluateConfig:
    return new_run(paths, "evaluate").params.evaluate


def questions(paths: Paths) -> list[Question]:
    return list(read_questions(paths.collected / "talks", 5))


def children() -> list[psutil.Process]:
    return [each for each in psutil.Process().children() if "multiprocessing.spawn" in " ".join(each.cmdline())]


def test_parts_are_answered_as_the_whole_and_workers_end(paths: Paths, rollout: ParallelRollout) -> None:
    asked, reported, threads = questions(paths), [], torch.get_num_threads()
    assert len(asked) % 2, "parts of different length"
    with rollout:
        rollout.prepare(len(asked))
        rows = rollout(asked, lambda done, of, **values: reported.append((done, of)))
        assert rollout(asked) == rows
        assert len(children()) == 1
    assert rows == answer_questions(rollout.model, rollout.agent, asked, config(paths))
    assert reported[-1] == (len(asked), len(asked))
    assert (children(), torch.get_num_threads()) == ([], threads)


def test_few_questions_start_no_process(paths: Paths) -> None:
    with ParallelRollout(paths.start, config(paths), cores=2) as rollout:
        rollout.prepare(len(questions(paths)))
        assert len(rollout(questions(paths))) == len(questions(paths))
        assert children() == []


def test_a_process_that_dies_is_an_error(paths: Paths, rollout: ParallelRollout) -> None:
    def killed(done: int, of: int, **_: float) -> None:
        for child in children():
            child.kill()

    with rollout:
        rollout.prepare(1)
        with pytest.raises(RuntimeError, match="a worker process of the evaluation has died"):
            rollout(questions(paths), killed)


def test_an_error_of_a_worker_is_raised(paths: Paths, rollout: ParallelRollout) -> None:
    first, *others = questions(paths)
    with rollout:
        rollout.prepare(1)
        with pytest.raises(AttributeError):
            rollout([first, None, *others])  # type: ignore[list-item]


def test_a_folder_that_is_no_agent_is_refused(tmp_path: Path, paths: Paths) -> None:
    from components.config.params import InputError

    with pytest.raises(InputError):
        ParallelRollout(tmp_path, config(paths))
