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

DISTRIBUTED = ("pretrain", "tune", "finetune@summarizer", "align")
"""Stages, or items of their matrix, that train on several processes."""
RANK, WORLD_SIZE = "RANK", "WORLD_SIZE"
FORCE = "LOOPWRIGHT_FORCE"
"""Environment variable: start without the checkpoints of an earlier run with the same inputs."""
MAX_RESTARTS = 3
"""How often the ranks start again from their last checkpoint after one was killed."""
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
    return name in DISTRIBUTED or name.partition("@")[0] in DISTRIBUTED


def refuse_ranks(name: str) -> None:
    """Refuse several processes for a stage that is one.

    Raises: InputError.
    """
    size = int(os.environ.get(WORLD_SIZE, "1"))
    if size > 1 and not is_distributed(name):
        raise InputError(f"{name}: runs as one process, not {size}; start it without torchrun")


def launch(name: str, processes: int) -> int:
    """Run a stage on processes of this machine and return its exit code: that of the rank that failed first.

    After a kill of one all start again from their last checkpoint, `MAX_RESTARTS` times. torchrun's own restarts would
    repeat a refusal.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    parse, run = (cast(Callable[..., Any], function) for function in (torchrun.parse_args, torchrun.run))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks say it themselves
    words = ["--standalone", "--nproc-per-node", str(processes), "--shutdown-timeout", str(SECONDS_TO_END)]
    words += ["-m", "components.runtime.stage", name]
    for restart in range(MAX_RESTARTS + 1):
        try:
            run(parse(words))
        except SignalException as error:
            return 128 + int(error.sigval)
        except ChildFailedError as error:
            os.environ.pop(FORCE, None)  # the checkpoints are this run's now
            number, code = _first_failure(error)
            is_last = code >= 0 or restart == MAX_RESTARTS
            if code < 0 or number:
                ending = f"signal {-code}" if code < 0 else f"exit code {code}"
                again = "" if is_last else f"; {processes} start again from the last checkpoint"
                print(
                    f"{name}: process {number} of {processes} ended with {ending}{again}", file=sys.stderr, flush=True
                )
            if is_last:
                return code if code >= 0 else 128 - code
        else:
            break
    return 0


def _first_failure(error: Any) -> tuple[int, int]:
    """Number and exit code of the rank that failed first, of those in torchrun's error.

    torchrun ends the others, whose codes are there too; its times are whole seconds, so a kill goes first.
    """

    def order(item: Any) -> tuple[int, bool, int]:
        failure = item[1]
        return failure.timestamp, failure.exitcode >= 0 or failure.exitcode == -signal.SIGTERM, item[0]

    number, failure = min(error.failures.items(), key=order)
    return number, failure.exitcode


def report_behind_rank_0(message: str) -> None:
    """Print what a rank other than 0 refuses, unless rank 0 refuses too: torchrun then ends this process first."""
    time.sleep(_SECONDS_FOR_RANK_0)
    print(f"process {rank()}: {message}", file=sys.stderr, flush=True)
