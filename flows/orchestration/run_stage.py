"""Bring one stage of dvc.yaml up to date, in a process of its own that ends with this one.

DVC decides: the stage runs, or its outputs come back from the run cache, or nothing is to do.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from components.config.params import Refused
from components.config.paths import Paths
from components.runtime.checkpoint_folders import remove_committed
from components.runtime.launcher import FORCE
from components.runtime.process import RUN_PID, accept_interrupts, request_parent_death_signal, run_pids
from components.runtime.stage import IMPROVEMENT, read_stages
from components.tracking.mlflow_client import UPLOADER

Outcome = Literal["ran", "restored from remote", "restored from cache", "up to date"]
DVC = Path(__file__).with_name("dvc_command.py")
_SECONDS_TO_END = 90.0
_SECONDS_TO_INTERRUPT = 2.0
"""In which DVC, while no stage runs, ends by the terminal's own Ctrl-C; a second one would disturb it."""
_DVC_MESSAGES = (
    "Running stage '",
    "> python -m components.runtime.stage",
    "Stage '",
    "Generating lock file",
    "Updating lock file",
    "To track the changes with git",
    "\tgit add",
    "To enable auto staging",
    "\tdvc config core.autostage",
    "Use `dvc push`",
    # Killed runs leave entries in its lock file, which it removes.
    "WARNING: Process '",
    "Data and pipelines are up to date",
)
"""Beginnings of DVC's own messages around a stage, which are not shown."""


class StageFailed(Exception):
    """A stage ended without its outputs; `exit_code` is 1 for wrong input and bugs, 3 for a refusal."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def is_refusal(error: BaseException) -> bool:
    """Whether data validation or the promotion gate ended what was done, in this process or in that of a stage."""
    return isinstance(error, Refused) or (isinstance(error, StageFailed) and error.exit_code == 3)


@dataclass(frozen=True)
class StageResult:
    """The outcome of a stage."""

    name: str
    outcome: Outcome
    seconds: float


def stage_target(root: Path, name: str) -> str:
    """How DVC's commands name a stage."""
    return f"{IMPROVEMENT}:{name}" if name in read_stages(root, IMPROVEMENT) else name


def reproduce(name: str, root: Path, force: bool, echo: Callable[[str], None]) -> StageResult:
    """Run `dvc repro --single-item NAME`; `echo` is called with each line of the stage's output.

    Raises: StageFailed with the stage's own message; KeyboardInterrupt, once the stage has ended.
    """
    report = Paths(root).home / "stages" / f"{name}.json"
    target = stage_target(root, name)
    report.unlink(missing_ok=True)
    accept_interrupts()
    started = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-P", str(DVC), "repro", "--single-item", *(["--force"] if force else []), target],
        cwd=root,
        env=_environment(force),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        # Not a new session: Ctrl-C in the terminal, and a worker that cancels, reach the stage too.
        preexec_fn=request_parent_death_signal,
    ) as process:
        try:
            messages = _read_output(process, echo)
        except BaseException:
            _end(process)
            raise
    if process.returncode:
        raise _failure(name, report, messages)
    outcome = _outcome(target, messages)
    remove_committed(Paths(root), name if outcome == "ran" else "")
    return StageResult(name, outcome, time.monotonic() - started)


def _environment(force: bool) -> dict[str, str]:
    pid = str(os.getpid())
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    # A login shell's start-up files must not choose another Python.
    return {
        **os.environ,
        "PATH": path,
        "SHELL": "/bin/sh",
        "PYTHONUNBUFFERED": "1",
        # With the worker's, where one executes this run: by them a stage tells their death from a cancellation.
        RUN_PID: " ".join([pid, *map(str, run_pids())]),
        UPLOADER: pid,
        **({FORCE: "1"} if force else {}),
    }


def _read_output(process: subprocess.Popen[str], echo: Callable[[str], None]) -> list[str]:
    """Pass the stage's lines to `echo`; return those of DVC."""
    assert process.stdout is not None
    dvc: list[str] = []
    for line in process.stdout:
        line = line.rstrip("\n")
        if line.startswith((*_DVC_MESSAGES, "ERROR: ")):
            dvc.append(line)
        elif line.strip():
            echo(line)
    process.wait()
    return dvc


def _outcome(name: str, messages: list[str]) -> Outcome:
    if f"Running stage '{name}':" in messages:
        return "ran"
    return "restored from cache" if any("is cached" in line for line in messages) else "up to date"


def _failure(name: str, report: Path, messages: list[str]) -> StageFailed:
    if report.exists():
        ended = json.loads(report.read_text(encoding="utf-8"))
        if ended["exit_code"]:
            return StageFailed(ended["message"], ended["exit_code"])
    errors = [line.removeprefix("ERROR: ") for line in messages if line.startswith("ERROR: ")]
    return StageFailed(f"{name}: {'; '.join(errors) or 'dvc repro failed'}", 1)


def _end(process: subprocess.Popen[str]) -> None:
    """End the stage, which saves a checkpoint first where it trains; DVC ends when its stage has.

    DVC gets no SIGTERM: killed while it writes its lock file, it leaves one that no later DVC can read.
    """
    started, stage, interrupted = time.monotonic(), set[psutil.Process](), False
    while process.poll() is None and (waited := time.monotonic() - started) < _SECONDS_TO_END:
        with suppress(psutil.Error):  # gone, or just going
            for member in set(psutil.Process(process.pid).children(recursive=True)) - stage:
                stage.add(member)
                _signal(member, signal.SIGTERM)
        if not stage and not interrupted and waited > _SECONDS_TO_INTERRUPT:
            process.send_signal(signal.SIGINT)
            interrupted = True
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
    _, left = psutil.wait_procs(stage, max(0.0, started + _SECONDS_TO_END - time.monotonic()))
    for member in left:
        _signal(member, signal.SIGKILL)
    process.kill()
    process.wait()


def _signal(member: psutil.Process, number: signal.Signals) -> None:
    with suppress(psutil.Error):
        member.send_signal(number)
