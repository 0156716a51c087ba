"""Keep processes running: start, check health, restart with exponential backoff, end with all their children.

One thread, one loop: `Supervisor.tick` checks each service once.
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
"""A longer log is rotated to NAME.log.1 when its service starts."""
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 300.0
STABLE_SECONDS = 60.0
"""After this long, an exit is no crash loop: the next restart waits for the first pause again."""
STOP_SECONDS = 7.0
SECONDS_BETWEEN_CHECKS = 10.0
MAX_FAILED_CHECKS = 6
"""Failed liveness checks in a row after which a service counts as hung and is restarted. Generous, for training takes
every core."""
MAX_CRASHES = 5
"""Quick exits in a row from which on it counts as a crash loop: what it needs may be away, so restarts go on."""

State = Literal["waiting", "starting", "healthy", "hung", "backing off", "crash loop"]


@dataclass(frozen=True)
class Service:
    """A process to keep running."""

    name: str
    command: Sequence[str]
    address: str
    """Shown to the user; empty when it has none."""
    health: Callable[[], bool]
    hint: str = ""
    """Shown behind the address."""
    environment: Mapping[str, str] = field(default_factory=dict)
    may_start: Callable[[], bool] = lambda: True
    """The service starts only when this returns true."""
    waits_for: str = ""
    """What `may_start` waits for, as shown to the user."""
    lives: Callable[[], bool] = lambda: True
    """Liveness check of a healthy service; may take two seconds."""
    stop_seconds: float = STOP_SECONDS
    """How long it may take to end."""


@dataclass
class SupervisedService:
    """A service, its process and its state."""

    service: Service
    log: Path
    state: State = "waiting"
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    crashes: int = 0
    """Quick exits in a row."""
    next_start: float = 0.0
    reported_waiting: bool = False
    next_check: float = 0.0
    failed_checks: int = 0


class Supervisor:
    """Keeps services running until `stop`."""

    def __init__(
        self, services: Sequence[Service], logs: Path, root: Path, tell: Callable[[SupervisedService], None]
    ) -> None:
        self.supervised = [SupervisedService(service, logs / f"{service.name}.log") for service in services]
        self._root, self._tell = root, tell
        logs.mkdir(parents=True, exist_ok=True)

    def tick(self) -> None:
        """Check each service once: start it, check its health, handle its exit."""
        for entry in self.supervised:
            if entry.process is not None and entry.process.poll() is not None:
                self._handle_exit(entry)
            elif entry.process is not None and entry.state == "starting" and entry.service.health():
                entry.failed_checks = 0
                self._change(entry, "healthy")
            elif entry.state == "healthy" and time.monotonic() >= entry.next_check:
                self._check_liveness(entry)
            elif entry.process is None and time.monotonic() >= entry.next_start:
                self._start(entry)

    def stop(self, seconds: float | None = None) -> None:
        """Terminate every service and its children; kill what is left after `seconds`, or after its `stop_seconds`."""
        running = [(entry, entry.process) for entry in self.supervised if entry.process is not None]
        running.sort(key=lambda each: each[0].service.stop_seconds)
        trees = [process_tree(process.pid) for _, process in running]
        for _, process in running:
            with suppress(ProcessLookupError):
                process.terminate()
        started = time.monotonic()
        for (entry, process), members in zip(running, trees, strict=True):
            allowed = entry.service.stop_seconds if seconds is None else seconds
            _end(members, max(0.0, allowed - (time.monotonic() - started)))
            process.wait()

    def _start(self, entry: SupervisedService) -> None:
        if not entry.service.may_start():
            if not entry.reported_waiting:
                entry.reported_waiting = True
                self._change(entry, "waiting")
            return
        entry.started = time.monotonic()
        try:
            if entry.log.exists() and entry.log.stat().st_size > LOG_BYTES:
                entry.log.replace(entry.log.with_suffix(".log.1"))
            with entry.log.open("ab") as file:
                entry.process = start(entry.service.command, file, entry.service.environment, self._root)
        except OSError as error:  # no process, or no file, is to be had now
            self._back_off(entry, f"cannot be started: {error}")
            return
        entry.state, entry.reported_waiting = "starting", False

    def _check_liveness(self, entry: SupervisedService) -> None:
        entry.failed_checks = 0 if entry.service.lives() else entry.failed_checks + 1
        entry.next_check = time.monotonic() + SECONDS_BETWEEN_CHECKS
        if entry.failed_checks >= MAX_FAILED_CHECKS:
            self._change(entry, "hung")
            _kill_session(entry)

    def _handle_exit(self, entry: SupervisedService) -> None:
        # Its children must not hold its port, nor go on training.
        _kill_session(entry)
        assert entry.process is not None
        code, entry.process = entry.process.returncode, None
        self._back_off(entry, f"exited with {code}")

    def _back_off(self, entry: SupervisedService, reason: str) -> None:
        """Let the service start again after a pause."""
        quick = time.monotonic() - entry.started < STABLE_SECONDS
        entry.crashes = entry.crashes + 1 if quick else 1
        pause = min(FIRST_PAUSE_SECONDS * 2.0 ** min(entry.crashes - 1, 30), LONGEST_PAUSE_SECONDS)
        entry.next_start = time.monotonic() + pause
        with suppress(OSError), entry.log.open("a", encoding="utf-8") as file:  # a full disk ends no supervision
            file.write(f"loopwright up: {reason}; restarts in {pause:.0f} s\n")
        self._change(entry, "crash loop" if entry.crashes >= MAX_CRASHES else "backing off")

    def _change(self, entry: SupervisedService, state: State) -> None:
        entry.state = state
        self._tell(entry)


def process_tree(pid: int) -> list[psutil.Process]:
    """A process and all its descendants."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _kill_session(entry: SupervisedService) -> None:
    assert entry.process is not None
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(entry.process.pid, signal.SIGKILL)


def _end(members: list[psutil.Process], seconds: float) -> None:
    _, left = psutil.wait_procs(members, seconds)
    for member in left:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(left, 2)
