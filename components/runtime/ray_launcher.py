"""A stage as a job of a Ray cluster: submitted, or found again by its inputs, followed to its end, and cancelled.

The job (`components/runtime/ray_job.py`) runs from the same folder, on a file system that all machines share.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from components.config.errors import InputError, reason_of
from components.config.loop_settings import RunConfig
from components.config.paths import writing
from components.config.secrets import hidden
from components.runtime.files import replace_file
from components.runtime.launcher import SECONDS_TO_END
from components.runtime.process import RUN_PID, end_on_signals, is_orphan

MISSING = 'params.yaml: run.launcher: ray: ray is not installed; run pip install "loopwright[cluster]"'
REFUSED, STDERR = "refused: ", "stderr: "
"""How lines of a job's log begin that are a refusal or came from stderr: the log mixes both streams."""
_SECONDS_TO_ANSWER = 120.0
"""How long a cluster that was there may be away, as while its head is restarted."""
_TOKENS, _TOKEN_FILE = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"), Path.home() / ".ray" / "auth_token"
"""Where Ray looks for the cluster's token."""
_SECONDS_TO_STOP = 10.0
_OBJECT_STORE_BYTES = 128 * 2**20


def launch(name: str, key: str, settings: RunConfig, root: Path, home: Path) -> int:
    """Run a stage as a Ray job and return its exit code; `key` is the digest of its inputs.

    A job of the same key that still runs is followed instead: its launcher was killed, or ended as an orphan. Any other
    signal cancels the job behind a checkpoint.

    Raises: InputError when Ray is not installed, does not answer, or has too few devices.
    """
    with _cluster(settings.address) as address:
        client, jobs = _jobs(address, _prefix(name, key))
        running = [job for job, has_ended in jobs.items() if not has_ended]
        job = running[0] if running else f"{_prefix(name, key)}{len(jobs)}"  # Ray takes each id once
        file, log, goes_on = home / "stages" / f"{job}.environment.json", _Log(), False
        try:
            if running:
                print(f"{name}  follows the running Ray job {job}", flush=True)
            else:
                _write_environment(file)
                _submit(client, job, [name, str(settings.processes), str(file)], root)
            return _follow(client, job, log)
        except SystemExit as stopped:
            if goes_on := settings.address is not None and is_orphan():
                raise
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)  # more of them change nothing
            with suppress(Exception):  # a Ray of this machine may be ending by the same signal
                client.stop_job(job)
                _follow(client, job, log, patience=_SECONDS_TO_STOP)
            raise stopped from None
        finally:
            if not goes_on:
                file.unlink(missing_ok=True)  # of a job that did not begin; without it none does after all


def use_token() -> None:
    """Before Ray's import: let its client send the cluster's token where this user has one, as `ray start` does."""
    if _TOKEN_FILE.exists() or any(variable in os.environ for variable in _TOKENS):
        os.environ.setdefault("RAY_AUTH_MODE", "token")


@contextmanager
def _cluster(address: str | None) -> Iterator[str]:
    """URL of the dashboard of the cluster at `address`, or of one on this machine alone, which ends with the block."""
    if address:
        use_token()
    try:
        import ray
    except ImportError as error:
        raise InputError(MISSING) from error
    logging.disable(logging.INFO)  # Ray's client tells of each connection
    for variable in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # Ray prefers them to what it is called with
        os.environ.pop(variable, None)
    if address:
        yield address if "://" in address else f"http://{address}"
        return
    os.environ |= {"RAY_kill_child_processes_on_worker_exit": "0"}  # ranks save a checkpoint when it is stopped
    words = {"include_dashboard": True, "log_to_driver": False, "logging_level": "error"}
    try:
        context = ray.init("local", object_store_memory=_OBJECT_STORE_BYTES, **words)
    except Exception as error:
        raise InputError(
            f"params.yaml: run.launcher: ray: no Ray starts on this machine ({reason_of(error)}); set run.address to"
            " the dashboard of a cluster, or run.launcher to torchrun"
        ) from error
    end_on_signals()  # Ray has handlers of its own
    try:
        if not context.dashboard_url:
            raise InputError(MISSING)
        yield f"http://{context.dashboard_url}"
    finally:
        ray.shutdown()


def _jobs(address: str, prefix: str) -> tuple[Any, dict[str, bool]]:
    """The client of a cluster's jobs, and whether each job whose id begins with `prefix` has ended.

    Raises: InputError when no dashboard answers.
    """
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
        jobs = {job.submission_id or "": job.status.is_terminal() for job in client.list_jobs()}
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise InputError(
            f"params.yaml: run.address: {hidden(address)}: no Ray dashboard answers ({reason_of(error)}); start the"
            ' head with "ray start --head --dashboard-host 0.0.0.0", and write http://HOST:8265'
        ) from error
    return client, {job: has_ended for job, has_ended in jobs.items() if job.startswith(prefix)}


def _write_environment(file: Path) -> None:
    """Write this process's environment for a job, in a file: what Ray is told of a job, it shows to everyone."""
    environment = {variable: value for variable, value in os.environ.items() if not variable.startswith("RAY_")}
    environment.pop(RUN_PID, None)
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, lambda opened: opened.write(json.dumps(environment).encode()), 0o600)


def _submit(client: Any, job: str, arguments: list[str], root: Path) -> None:
    """Submit a job, whose driver gets these arguments.

    Raises: InputError when the cluster does not take it.
    """
    command = [sys.executable, "-m", "components.runtime.ray_job", *arguments]
    deadline = time.monotonic() + _SECONDS_TO_ANSWER
    while True:
        try:
            client.submit_job(
                entrypoint=f"cd {shlex.quote(str(root))} && exec {shlex.join(command)}",
                submission_id=job,
                runtime_env={"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(SECONDS_TO_END)}},
            )
        except (OSError, RuntimeError) as error:  # a cluster that was just started has no agent yet
            if time.monotonic() > deadline:
                raise InputError(
                    f"params.yaml: run.address: the Ray cluster takes no job: {reason_of(error)}; where another Ray"
                    " runs on this machine, write its dashboard, such as http://127.0.0.1:8265"
                ) from error
            time.sleep(1.0)
        else:
            return


def _prefix(name: str, key: str) -> str:
    return f"{name.replace('@', '-')}-{key}-"


def _follow(client: Any, job: str, log: _Log, patience: float = _SECONDS_TO_ANSWER) -> int:
    """Pass on a job's lines until it ends, and return its exit code.

    Raises: InputError for what the job refuses, and when the cluster has not answered for `patience` seconds.
    """
    answered = time.monotonic()
    while True:
        try:
            asyncio.run(log.follow(client, job))
            info = client.get_job_info(job)
        except Exception as error:
            if time.monotonic() - answered > patience:
                raise InputError(
                    f"params.yaml: run.address: the Ray cluster does not answer ({reason_of(error)}); the job {job} may"
                    " still run: run again to follow it"
                ) from error
            time.sleep(1.0)
            continue
        answered = time.monotonic()
        if info.status.is_terminal():
            break
    if log.refusal:
        raise InputError(log.refusal)
    if info.status == "STOPPED":
        return 128 + signal.SIGTERM
    if info.driver_exit_code is None:
        print(f"{job}: {reason_of(info.message)}", file=sys.stderr, flush=True)
    return 1 if info.driver_exit_code is None else int(info.driver_exit_code)


class _Log:
    """A job's log, passed on line by line, each once."""

    def __init__(self) -> None:
        self.passed = 0
        """Characters of it that were read."""
        self.unfinished = ""
        """The line that they end with."""
        self.refusal = ""
        self.has_begun = False

    async def follow(self, client: Any, job: str) -> None:
        """Read it from its beginning, as Ray gives it, until the job ends."""
        position = 0
        async for part in client.tail_job_logs(job):
            new = part[max(0, self.passed - position) :]
            position += len(part)
            self.passed = max(self.passed, position)
            *lines, self.unfinished = (self.unfinished + new).split("\n")
            for line in lines:
                self._pass_on(line)

    def _pass_on(self, line: str) -> None:
        if not self.has_begun:
            self.has_begun = line.startswith("Running entrypoint for job ")  # so far the lines are Ray's
        elif line.startswith(REFUSED):
            self.refusal = line.removeprefix(REFUSED)
        elif line.startswith(STDERR):
            print(line.removeprefix(STDERR), file=sys.stderr, flush=True)
        else:
            print(line, flush=True)
