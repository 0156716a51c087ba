"""A stage on several processes: torchrun or Ray starts them, and rank 0 alone locks, reports, tracks and writes.

torchrun's environment is the interface: a process that has it, as under `torchrun -m components.runtime.stage NAME`, is
one rank. The launcher only starts torchrun and passes on how it ended; `components/runtime/ray_launcher.py` is Ray's.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from components.config.loop_settings import RunConfig
from components.config.params import InputError, load_params
from components.runtime.checkpoint_folders import finished_checkpoints

DISTRIBUTED = ("pretrain", "tune", "finetune", "align")
"""Stages that train on several processes."""
RANK, WORLD_SIZE = "RANK", "WORLD_SIZE"
FORCE = "LOOPWRIGHT_FORCE"
"""Environment variable: start without the checkpoints of an earlier run with the same inputs."""
MAX_RESTARTS = 3
"""How often the ranks start again from the same checkpoint after one was killed."""
PREEMPTED = 128 + signal.SIGTERM
"""Exit code of ranks that one's SIGTERM stopped behind a checkpoint. Where the launcher got none, it is a failure."""
_SECONDS_FOR_RANK_0 = 60.0
SECONDS_TO_END = 90
"""For a step and its checkpoint after a signal, as the orchestrator allows; torchrun's own are 30."""


def rank() -> int:
    """This process's number among those of torchrun; 0 without."""
    return int(os.environ.get(RANK, "0"))


def launcher_settings(name: str, root: Path) -> RunConfig | None:
    """How this process has to start a stage's ranks; None where it runs the stage itself."""
    if WORLD_SIZE in os.environ or not is_distributed(name):
        return None
    try:
        settings = load_params(root / "params.yaml").run
    except InputError:
        return None  # which the stage says itself
    is_one = settings.launcher == "local" or (settings.launcher == "torchrun" and settings.processes == 1)
    return None if is_one else settings


def is_distributed(name: str) -> bool:
    return name.partition("@")[0] in DISTRIBUTED


def refuse_ranks(name: str) -> None:
    """Refuse several processes for a stage that is one.

    Raises: InputError.
    """
    size = int(os.environ.get(WORLD_SIZE, "1"))
    if size > 1 and not is_distributed(name):
        raise InputError(f"{name}: runs as one process, not {size}; start it without torchrun")


class Restarts:
    """Counts how often the ranks of a stage were killed without progress."""

    def __init__(self, name: str, home: Path) -> None:
        self.name, self.home, self.count = name, home, 0
        self._checkpoints = finished_checkpoints(name, home)

    def allowed(self) -> bool:
        """Count one more; whether the ranks may start again. One behind a new checkpoint counts as the first."""
        before, self._checkpoints = self._checkpoints, finished_checkpoints(self.name, self.home)
        self.count = 1 if self._checkpoints - before else self.count + 1
        return self.count <= MAX_RESTARTS


def launch(name: str, processes: int, home: Path) -> int:
    """Run a stage on processes of this machine and return its exit code: that of the rank that failed first.

    After a kill of one all start again from their last checkpoint, as often as `Restarts` allows. torchrun's own
    restarts would repeat a refusal.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    parse, run = (cast(Callable[..., Any], function) for function in (torchrun.parse_args, torchrun.run))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks say it themselves
    words = ["--standalone", "--nproc-per-node", str(processes), "--shutdown-timeout", str(SECONDS_TO_END)]
    words += ["-m", "components.runtime.stage", name]
    restarts = Restarts(name, home)
    try:
        while True:
            try:
                run(parse(words))
            except ChildFailedError as error:
                os.environ.pop(FORCE, None)  # the checkpoints are this run's now
                number, code = _first_failure(error)
                is_last = not is_kill(code) or not restarts.allowed()
                if code < 0 or number or not is_last:
                    again = "" if is_last else f"; {processes} start again from the last checkpoint"
                    ending = f"process {number} of {processes} ended with {describe(code)}{again}"
                    print(f"{name}: {ending}", file=sys.stderr, flush=True)
                if is_last:
                    return code if code >= 0 else 128 - code
            else:
                return 0
    except SignalException as error:  # torchrun's handler raises it between two starts, too
        return 128 + int(error.sigval)


def is_kill(code: int) -> bool:
    """Whether an exit code is that of a rank which a signal ended; any other exit code would come again."""
    return code < 0 or code == PREEMPTED


def describe(code: int) -> str:
    """How a rank ended, as its exit code says."""
    number = signal.SIGTERM if code == PREEMPTED else -code
    return f"signal {number}" if is_kill(code) else f"exit code {code}"


def _first_failure(error: Any) -> tuple[int, int]:
    """Number and exit code of the rank that failed first, of those in torchrun's error.

    torchrun ends the others by SIGTERM, and puts their codes behind; its times are whole seconds, so a kill goes first.
    """

    def order(failed: tuple[int, Any]) -> tuple[int, bool]:
        code = failed[1].exitcode
        return failed[1].timestamp, code >= 0 or code == -signal.SIGTERM

    number, failure = min(error.failures.items(), key=order)
    return number, failure.exitcode


def report_behind_rank_0(message: str) -> None:
    """Print what a rank other than 0 refuses, unless rank 0 refuses too: torchrun then ends this process first."""
    time.sleep(_SECONDS_FOR_RANK_0)
    print(f"process {rank()}: {message}", file=sys.stderr, flush=True)
