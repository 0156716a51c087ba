"""A finished training is never repeated: killed at any instant until DVC has stored its result, it ends without a step.

LOOPWRIGHT_KILLS sets how often it is killed.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from components.config.paths import Paths
from components.runtime.stage import digest
from components.tracking.mlflow_client import UPLOADER
from flows.orchestration.dvc_repo import configure

SOURCE = Path(__file__).parents[2]
NAME, STEPS = "pretrain@decoder", 8
KILLS = int(os.environ.get("LOOPWRIGHT_KILLS", "4"))
# As `loopwright run` does, without Prefect.
RUN = """
import sys
from pathlib import Path
from flows.orchestration.dvc_repo import stage_states
from flows.orchestration.run_stage import reproduce

stage_states(Path.cwd())
print(reproduce(sys.argv[1], Path.cwd(), False, lambda line: print(line, flush=True)).outcome)
"""


@pytest.fixture
def repository(project: Paths, tiny_settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Paths:
    """A project with one stage that trains, under DVC."""
    monkeypatch.delenv("LOOPWRIGHT_HOME", raising=False)
    for package in ("components", "flows"):
        shutil.copytree(SOURCE / package, project.root / package, ignore=shutil.ignore_patterns("__pycache__"))
    (project.root / ".dvc").mkdir()
    for name in (".dvc/config", ".dvcignore"):
        shutil.copy(SOURCE / name, project.root / name)
    stage = yaml.safe_load((SOURCE / "dvc.yaml").read_text())["stages"]["pretrain"]
    stage = {**stage, "matrix": {"family": ["decoder"]}}
    (project.root / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"pretrain": stage}}))
    params = yaml.safe_load(project.params.read_text())
    for dotted, value in (tiny_settings | {"pretrain.decoder.max_steps": STEPS}).items():
        *sections, key = dotted.split(".")
        place = params
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    project.params.write_text(yaml.safe_dump(params))
    return project


class Run:
    """One run of the stage, as a process that can be killed with all that it started."""

    def __init__(self, paths: Paths, by_hand: bool = False) -> None:
        self.lines: list[str] = []
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self._process = subprocess.Popen(
            [sys.executable, *(["-m", "dvc", "repro"] if by_hand else ["-c", RUN]), NAME],
            cwd=paths.root,
            # This process counts as the one that uploads event logs: the stage needs no MLflow.
            env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", UPLOADER: str(os.getpid())},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def read(self) -> float:
        """Read lines until the last step is reported, or to the end; returns the seconds that this took."""
        assert self._process.stdout is not None
        started = time.monotonic()
        for line in self._process.stdout:
            self.lines.append(line.rstrip())
            if line.startswith((f"{NAME}  {STEPS}/{STEPS}", f"{NAME}  resumed at step {STEPS}")):
                break
        return time.monotonic() - started

    def finish(self) -> bool:
        """Read to the end; whether it succeeded."""
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            self.lines += [line.rstrip() for line in lines]
        return self._process.wait() == 0

    def kill(self, seconds: float) -> bool:
        """Kill it after some seconds; whether it had ended before."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        started = []
        with suppress(psutil.NoSuchProcess):
            started = psutil.Process(self._process.pid).children(recursive=True)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self.read()
        assert self._process.stdout is not None
        self._process.stdout.close()
        has_ended = self._process.wait() == 0
        # DVC may take longer to die, and holds its locks until then.
        assert not psutil.wait_procs(started, timeout=60)[1]
        return has_ended

    @property
    def steps(self) -> list[str]:
        """The lines that report a step."""
        return [line for line in self.lines if re.match(rf"{NAME}  \d+/", line)]


@pytest.mark.timeout(600 + 60 * KILLS)
def test_a_trained_stage_that_is_killed_before_its_commit_ends_without_a_step(repository: Paths) -> None:
    run = Run(repository)
    run.read()
    started = time.monotonic()
    assert run.finish(), "\n".join(run.lines[-30:])
    window, expected = time.monotonic() - started, files(repository)
    assert not list((repository.home / "checkpoints" / NAME).iterdir()), "dvc.lock holds the result"
    is_trained, random_delay = True, random.Random(0)
    for _ in range(KILLS):
        if is_trained and (repository.root / "dvc.lock").exists():
            forget(repository)
            is_trained = False
        run = Run(repository)
        run.read()
        assert not (is_trained and run.steps), run.lines
        run.kill(random_delay.uniform(0, 1.2 * window))
        is_trained = True
    run = Run(repository)
    assert run.finish(), "\n".join(run.lines[-30:])
    assert run.lines[-1] == "up to date" or not run.steps
    assert files(repository) == expected, run.lines


def test_nor_does_dvc_repro_by_hand_train_again(repository: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", "restored behind the test")
    configure(repository.root)
    run = Run(repository, by_hand=True)
    run.read()
    assert not run.kill(0)
    assert len(run.steps) == STEPS
    run = Run(repository, by_hand=True)
    assert run.finish(), "\n".join(run.lines[-30:])
    assert f"{NAME}  resumed at step {STEPS}" in run.lines
    assert not run.steps
    assert (repository.root / "dvc.lock").exists()


def files(paths: Paths) -> dict[str, str]:
    """Digest of each file of the trained model."""
    base = paths.base("decoder")
    return {str(path.relative_to(base)): digest(path) for path in sorted(base.rglob("*")) if path.is_file()}


def forget(paths: Paths) -> None:
    """Let the stage never have run."""
    (paths.root / "dvc.lock").unlink()
    for folder in (paths.root / ".dvc/cache", paths.home, paths.base("decoder")):
        shutil.rmtree(folder)
