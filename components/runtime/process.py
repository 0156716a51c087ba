"""Processes of a run: they end with their parent, and file locks let one process write at a time.

A killed orchestrator must leave no training behind (DVC alone does), and two writers on one output would corrupt it.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import pwd
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from components.config.params import InputError

RUN_PID = "LOOPWRIGHT_RUN_PID"
"""Environment variable with the ids of the processes that a stage ends with: its run, and the worker of that run."""
_PR_SET_PDEATHSIG = 1
_SECONDS_TO_END = 60.0


def request_parent_death_signal() -> None:
    """Let the kernel send SIGTERM when the parent ends; only Linux can, elsewhere nothing happens.

    Safe between fork and exec (`preexec_fn`): one system call.
    """
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def end_with_parent() -> None:
    """End this process when its parent, or a process of RUN_PID, ends."""
    _parents[:] = [os.getppid()]
    request_parent_death_signal()
    if is_orphan():
        sys.exit(128 + signal.SIGTERM)
    # A shell between parent and child hides the parent's exit from the kernel, and macOS has no such signal.
    threading.Thread(target=_watch, name="parent-watch", daemon=True).start()


def run_pids() -> list[int]:
    """The processes of RUN_PID."""
    return [int(pid) for pid in os.environ.get(RUN_PID, "").split()]


def is_orphan() -> bool:
    """Whether a process of RUN_PID has ended, or, where there is none, the parent.

    A signal to the process group of a run that is cancelled ends the parent, DVC, before that run.
    """
    return not all(map(alive, run_pids())) if run_pids() else bool(_parents) and os.getppid() not in _parents


def end_on_signals() -> None:
    """Turn SIGINT and SIGTERM into an orderly exit, so that files and trackers are closed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # A training stage replaces the handler of SIGTERM by one that saves a checkpoint: Ctrl-C does the same.
    signal.signal(signal.SIGINT, lambda *_: signal.raise_signal(signal.SIGTERM))


def accept_interrupts() -> None:
    """Let SIGINT raise KeyboardInterrupt, also where this process was started to ignore it.

    A shell starts the background commands of a script so. The stage ends on Ctrl-C all the same; a run that ignored it
    would report the stage as failed.
    """
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


def start(
    command: Sequence[str], log: BinaryIO, environment: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start a service that writes to `log` and ends with this process, in a session of its own.

    So Ctrl-C in the terminal reaches this process alone, which stops its services in order.
    """
    return subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=request_parent_death_signal,
    )


def stop(process: subprocess.Popen[bytes], seconds: float = 15.0) -> None:
    """Terminate a process, and kill it when it has not ended after `seconds`."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def os_user() -> str:
    """The account that runs this process, by the system's own record: USER and LOGNAME may say anything."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a container's account without an entry
        return f"uid {os.geteuid()}"


def git(root: Path, *words: str) -> str:
    """Run a git command and return its output.

    Raises: InputError with git's own reason, and its remedy where it names one.
    """
    command, environment = ["git", "-C", str(root), *words], {**os.environ, "LC_ALL": "C"}
    try:
        result = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
    except FileNotFoundError:
        raise InputError("git: not found; install git") from None
    if result.returncode == 0:
        return result.stdout.strip()
    lines = [line.strip() for line in result.stderr.splitlines() if line.strip()] or [f"exit {result.returncode}"]
    reason = lines[0].removeprefix("fatal: ")
    if "safe.directory" in lines[-1]:
        raise InputError(f"git: {reason}; if you trust its files, run {lines[-1]!r}")
    if not has_git(root):
        raise InputError('git: this folder is no git clone; run "git init" and commit, or lineage will lack the commit')
    if "unknown revision" in reason:
        raise InputError("git: nothing is committed yet; commit, or lineage will lack the commit")
    raise InputError(f"git: {reason}; lineage will lack the commit until git works")


def has_git(root: Path) -> bool:
    """Whether the folder lies in a git clone, though git may refuse to work there."""
    return any((folder / ".git").exists() for folder in (root, *root.parents))


class _TimeIsUp(BaseException):
    """The timer's signal; no handler of errors catches it."""


@contextmanager
def limited_to(seconds: float, name: str) -> Iterator[None]:
    """Interrupt the block after some seconds; in the main thread alone.

    Raises: InputError.
    """

    def interrupt(*_: object) -> None:
        raise _TimeIsUp

    handler = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
    except _TimeIsUp:
        raise InputError(f"{name}: takes more than {seconds:g} s; check it, or raise --time-limit") from None


@contextmanager
def file_lock(folder: Path, name: str, patience: float = 0.0) -> Iterator[None]:
    """Hold the lock `NAME.lock` in `folder`; it is released when the process ends, however that happens.

    Raises: InputError naming the owner when it is still held after `patience` seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("a+", encoding="utf-8") as file:
        deadline = time.monotonic() + patience
        while not _try_lock(file.fileno()):
            if time.monotonic() >= deadline:
                file.seek(0)
                owner = file.read().strip() or "unknown"
                raise InputError(f"{name}: already running as process {owner}; wait for it, or stop it with kill")
            time.sleep(0.1)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def lock_owner(folder: Path, name: str) -> int | None:
    """The process that holds the lock `NAME.lock`, or None."""
    path = folder / f"{name}.lock"
    if not path.exists():
        return None
    with path.open(encoding="utf-8") as file:
        return None if _try_lock(file.fileno()) else int(file.read() or "0")


def host_id(home: Path) -> str:
    """This machine's name and the state folder's own id: locks and process ids of another one say nothing here.

    Containers and hosts may have the same name, and state folders of the same path. The folder's id outlives restarts,
    unlike those of a boot or of a process namespace: the next start has to know the runs that a power cut ended.
    """
    path = home / "host-id"
    if not path.exists():
        with file_lock(home, path.name, patience=10.0):
            if not path.exists():
                new = path.with_name(f"{path.name}.new")  # files.py, which replaces whole files, needs this module
                new.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
                new.replace(path)
    return f"{socket.gethostname()}-{path.read_text(encoding='utf-8')}"


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _watch() -> None:
    while os.getppid() in _parents and not is_orphan():
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_SECONDS_TO_END)
    os.kill(os.getpid(), signal.SIGKILL)


def alive(pid: int) -> bool:
    """Whether a process with this id runs; 0 is none."""
    if not pid:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False


_parents: list[int] = []
"""The parent of this process when it began to end with it."""
# Loaded here because nothing may be loaded between fork and exec.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
