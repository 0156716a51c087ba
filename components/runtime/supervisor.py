"""Keep processes running: start, ask for health, restart with growing pauses, end with all their children.

One thread, one loop: `Supervisor.tick` looks at each service once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil

from components.runtime.process import start

LOG_BYTES = 20_000_000
"""A log that is longer is put aside as NAME.log.1 when its service starts."""
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0
QUICK_DEATH_SECONDS = 60.0
"""A service that lived longer starts again with the first pause."""
SECONDS_BETWEEN_ASKS = 10.0
UNANSWERED_ASKS = 6
"""So many in a row, and a healthy service counts as hung: it is killed, and starts again. Generous, for training
takes every core."""
QUICK_DEATHS = 5
"""So many quick deaths in a row, and it is given up."""

State = Literal["waiting", "starting", "healthy", "hung", "pausing", "given up"]


@dataclass(frozen=True)
class Service:
    """A process to keep running."""

    name: str
    command: Sequence[str]
    address: str
    """Shown to people; empty when it has none."""
    health: Callable[[], bool]
    environment: Mapping[str, str] = field(default_factory=dict)
    may_start: Callable[[], bool] = lambda: True
    """Not started before this is true."""
    waits_for: str = ""
    """What `may_start` waits for, for people."""
    lives: Callable[[], bool] = lambda: True
    """Asked now and then of a healthy service; may take two seconds."""


@dataclass
class SupervisedService:
    """A service and how it fares."""

    service: Service
    log: Path
    state: State = "waiting"
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    deaths: int = 0
    """Quick ones in a row."""
    next_start: float = 0.0
    told_waiting: bool = False
    next_ask: float = 0.0
    unanswered: int = 0


class Supervisor:
    """Keeps services running until `stop`."""

    def __init__(
        self, services: Sequence[Service], logs: Path, root: Path, tell: Callable[[SupervisedService], None]
    ) -> None:
        self.kept = [SupervisedService(service, logs / f"{service.name}.log") for service in services]
        self._root, self._tell = root, tell
        logs.mkdir(parents=True, exist_ok=True)

    def tick(self) -> None:
        """Look at each service once: start it, see its health, notice its death."""
        for kept in self.kept:
            if kept.process is not None and kept.process.poll() is not None:
                self._died(kept)
            elif kept.process is not None and kept.state == "starting" and kept.service.health():
                kept.unanswered = 0
                self._change(kept, "healthy")
            elif kept.state == "healthy" and time.monotonic() >= kept.next_ask:
                self._ask(kept)
            elif kept.process is None and kept.state != "given up" and time.monotonic() >= kept.next_start:
                self._start(kept)

    def stop(self, seconds: float) -> None:
        """End every service and its children: asked first, killed after `seconds`."""
        families = [family(kept.process.pid) for kept in self.kept if kept.process is not None]
        for kept in self.kept:
            if kept.process is not None:
                with suppress(ProcessLookupError):
                    kept.process.terminate()
        _end([member for members in families for member in members], seconds)
        for kept in self.kept:
            if kept.process is not None:
                kept.process.wait()

    def _start(self, kept: SupervisedService) -> None:
        if not kept.service.may_start():
            if not kept.told_waiting:
                kept.told_waiting = True
                self._change(kept, "waiting")
            return
        if kept.log.exists() and kept.log.stat().st_size > LOG_BYTES:
            kept.log.replace(kept.log.with_suffix(".log.1"))
        with kept.log.open("ab") as file:
            kept.process = start(kept.service.command, file, kept.service.environment, self._root)
        kept.started = time.monotonic()
        kept.state, kept.told_waiting = "starting", False

    def _ask(self, kept: SupervisedService) -> None:
        kept.unanswered = 0 if kept.service.lives() else kept.unanswered + 1
        kept.next_ask = time.monotonic() + SECONDS_BETWEEN_ASKS
        if kept.unanswered >= UNANSWERED_ASKS:
            self._change(kept, "hung")
            _kill_session(kept)

    def _died(self, kept: SupervisedService) -> None:
        # The rest of its session must not hold its port, nor train on.
        _kill_session(kept)
        quick = time.monotonic() - kept.started < QUICK_DEATH_SECONDS
        kept.deaths = kept.deaths + 1 if quick else 1
        kept.next_start = time.monotonic() + min(FIRST_PAUSE_SECONDS * 2 ** (kept.deaths - 1), LONGEST_PAUSE_SECONDS)
        self._change(kept, "given up" if kept.deaths >= QUICK_DEATHS else "pausing")
        kept.process = None

    def _change(self, kept: SupervisedService, state: State) -> None:
        kept.state = state
        self._tell(kept)


def family(pid: int) -> list[psutil.Process]:
    """A process and everything below it."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _kill_session(kept: SupervisedService) -> None:
    assert kept.process is not None
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(kept.process.pid, signal.SIGKILL)


def _end(members: list[psutil.Process], seconds: float) -> None:
    _, left = psutil.wait_procs(members, seconds)
    for member in left:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(left, 2)
