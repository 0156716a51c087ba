"""Questions parted among processes are answered as by one, and a process that dies is no answer."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from components.config.model_settings import EvaluateConfig
from components.config.paths import Paths
from components.evaluation import parallel_rollout as module
from components.evaluation.parallel_rollout import Answering
from components.evaluation.questions import Question, answer_questions, read_questions
from tests.feedback.project import new_run, write_project


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    return write_project(tmp_path_factory.mktemp("answering"))


@pytest.fixture
def helped(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> Answering:
    """With one process that helps, for any number of questions."""
    monkeypatch.setattr(module, "MANY", 1)
    return Answering(paths.start, config(paths), cores=2)


def config(paths: Paths) -> EvaluateConfig:
    return new_run(paths, "evaluate").params.evaluate


def questions(paths: Paths) -> list[Question]:
    return list(read_questions(paths.collected / "talks", 5))


def children() -> list[psutil.Process]:
    return [one for one in psutil.Process().children() if "multiprocessing.spawn" in " ".join(one.cmdline())]


def test_parts_are_answered_as_the_whole_and_nothing_is_left(paths: Paths, helped: Answering) -> None:
    asked, told, threads = questions(paths), [], torch.get_num_threads()
    assert len(asked) % 2, "parts of different length"
    with helped:
        helped.prepare(len(asked))
        rows = helped(asked, lambda done, of, **facts: told.append((done, of)))
        assert helped(asked) == rows
        assert len(children()) == 1
    assert rows == answer_questions(helped.model, helped.agent, asked, config(paths))
    assert told[-1] == (len(asked), len(asked))
    assert (children(), torch.get_num_threads()) == ([], threads)


def test_few_questions_start_no_process(paths: Paths) -> None:
    with Answering(paths.start, config(paths), cores=2) as alone:
        alone.prepare(len(questions(paths)))
        assert len(alone(questions(paths))) == len(questions(paths))
        assert children() == []


def test_a_process_that_dies_is_told_of(paths: Paths, helped: Answering) -> None:
    def killed(done: int, of: int, **_: float) -> None:
        for child in children():
            child.kill()

    with helped:
        helped.prepare(1)
        with pytest.raises(RuntimeError, match="a process that helped to answer has died"):
            helped(questions(paths), killed)


def test_what_goes_wrong_there_is_raised_here(paths: Paths, helped: Answering) -> None:
    first, *others = questions(paths)
    with helped:
        helped.prepare(1)
        with pytest.raises(AttributeError):
            helped([first, None, *others])  # type: ignore[list-item]


def test_it_reads_only_agents(tmp_path: Path, paths: Paths) -> None:
    from components.config.params import InputError

    with pytest.raises(InputError):
        Answering(tmp_path, config(paths))
