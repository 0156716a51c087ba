"""Shards of a stage: each becomes files and a line of a manifest, so that a killed stage goes on where it was.

    STATE/KEY/        the files of a shard
    STATE/KEY.json    its line, once it is finished: its key, digests of inputs and outputs, its result

STATE is the stage's folder of checkpoints, which outlives DVC's removal of outs. Results are functions of the shard
alone, and in its order: executors and numbers of workers change no byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import active_children, get_context
from pathlib import Path
from shutil import copyfileobj
from typing import Any, Protocol

from components.config.errors import InputError, reason_of
from components.config.loop_settings import RunConfig
from components.config.secrets import hidden
from components.runtime.files import remove, sync, write_text
from components.runtime.process import end_on_signals, end_with_parent
from components.runtime.ray_launcher import MISSING, use_token
from components.runtime.stage import StageRun, digest

RAYON_THREADS = "RAYON_NUM_THREADS"
"""Environment variable: the threads of tokenizers' batch encoding."""
_COPY_BYTES = 1 << 20
_REMEDY = "finished shards stay; run it again, with fewer run.workers if memory was short"

Result = dict[str, Any]
"""Counts and the like, as JSON."""
Work = Callable[..., Result]
"""A function of a module: given the folder for its files and a shard's arguments, it writes them."""


class Job(Protocol):
    """A unit of work as it goes to a worker: data of modules, which are pickled."""

    def run(self) -> dict[str, Any]:
        """Do the work; its line of the manifest."""


@dataclass(frozen=True)
class Shard:
    """One unit of work."""

    key: str
    """Its name, unique in the stage; of a folder."""
    work: Work
    inputs: Sequence[Path]
    """Files and folders that it reads."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `work`, as JSON: with the inputs, everything that its output depends on."""


@dataclass(frozen=True)
class Output:
    """What a shard became."""

    folder: Path
    result: Result


@dataclass(frozen=True)
class _Job:
    """A shard to do, as it goes to a worker."""

    shard: Shard
    folder: Path
    inputs: str
    """Digest of inputs and arguments."""

    @property
    def line(self) -> Path:
        """The file of its line."""
        return self.folder.with_name(f"{self.folder.name}.json")

    def run(self) -> dict[str, Any]:
        """Do the work; its line, written when its files are on disk: the stage may be gone by then."""
        remove(self.folder)
        self.folder.mkdir(parents=True)
        result = self.shard.work(self.folder, **self.shard.arguments)
        sync(*(path for path in self.folder.rglob("*") if path.is_file()), self.folder)
        line = {"key": self.shard.key, "inputs": self.inputs, "outputs": digest(self.folder), "result": result}
        write_text(self.line, json.dumps(line))
        return line

    def finished(self) -> dict[str, Any] | None:
        """Its line, where it was finished with the same inputs, and its files are as they were left."""
        try:
            line: dict[str, Any] = json.loads(self.line.read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        is_whole = line["inputs"] == self.inputs and self.folder.is_dir() and line["outputs"] == digest(self.folder)
        return line if is_whole else None


def run_shards(run: StageRun, shards: Sequence[Shard], done: int = 0, total: int = 0) -> list[Output]:
    """Do what is not finished, on `run.workers` processes; the outputs in the order of the shards.

    Progress counts from `done`, of `total` shards where there are more than these.

    Raises: InputError of a shard, or when a worker is killed; what is finished stays.
    """
    content = cache(digest)
    jobs = {shard.key: _Job(shard, run.state / shard.key, _inputs(shard, content)) for shard in shards}
    lines = {key: line for key, job in jobs.items() if (line := job.finished())}
    unfinished = [job for key, job in jobs.items() if key not in lines]
    done, total = done + len(lines), total or len(shards)
    for line in execute(run.name, unfinished, run.params.run):
        lines[line["key"]] = line
        done += 1
        run.progress(done, total, shard=line["key"])
    return [Output(job.folder, lines[key]["result"]) for key, job in jobs.items()]


def concatenate(target: Path, parts: Iterable[Path]) -> None:
    """Write a file that has the bytes of others, one behind the other."""
    with target.open("wb") as out:
        for part in parts:
            with part.open("rb") as file:
                copyfileobj(file, out, _COPY_BYTES)


def _inputs(shard: Shard, content: Callable[[Path], str]) -> str:
    work = f"{shard.work.__module__}.{shard.work.__qualname__}"
    text = json.dumps([work, shard.arguments, {str(path): content(path) for path in shard.inputs}], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def execute(name: str, jobs: Sequence[Job], settings: RunConfig) -> Iterator[dict[str, Any]]:
    """The line of each job, as it is finished; `name` is that of the whole, for errors.

    Raises: InputError of a job, when a worker is killed, or when `settings` name no cluster that takes shards.
    """
    workers = min(settings.workers, len(jobs))
    if workers < 2:
        return map(_run, jobs)
    if settings.launcher == "ray":
        return _on_ray(name, jobs, workers, settings.address)
    return _in_processes(name, jobs, workers)


def _run(job: Job) -> dict[str, Any]:
    return job.run()


def _in_processes(name: str, jobs: Sequence[Job], workers: int) -> Iterator[dict[str, Any]]:
    threads = max(1, (os.cpu_count() or 1) // workers)
    children_before = active_children()
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (threads,))
    try:
        for future in as_completed([pool.submit(_run, job) for job in jobs]):
            yield future.result()
    except BrokenProcessPool:
        raise InputError(f"{name}: a worker process was killed; {_REMEDY}") from None
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(active_children()) - set(children_before):
            process.terminate()
        raise
    finally:
        pool.shutdown()


def _start_worker(threads: int) -> None:
    """Let a worker end with the stage, and its libraries use its share of the cores."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the stage gets it too, and ends this process
    os.environ[RAYON_THREADS] = str(threads)


def _on_ray(name: str, jobs: Sequence[Job], workers: int, address: str | None) -> Iterator[dict[str, Any]]:
    """As tasks of a Ray cluster whose hosts share the project's folder and the state folder."""
    use_token()
    try:
        import ray
        from ray.exceptions import RayError, RayTaskError
    except ModuleNotFoundError:
        raise InputError(MISSING) from None
    if not ray.is_initialized():
        _connect_to_ray(address)
    task = ray.remote(max_retries=0)(_run)
    waiting, running = iter(jobs), [task.remote(job) for job in jobs[:workers]]
    for _ in jobs[:workers]:
        next(waiting)
    try:
        while running:
            (finished, *_), running = ray.wait(running)
            running += [task.remote(job) for job in [next(waiting, None)] if job is not None]
            yield ray.get(finished)
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, InputError) else error from None
    except RayError as error:  # of a worker, its memory or its host
        raise InputError(f"{name}: a worker process was lost (Ray's {type(error).__name__}); {_REMEDY}") from None


def _connect_to_ray(address: str | None) -> None:
    """To the cluster that RAY_ADDRESS names, else to the one at `address`, the Ray that was started last on this host,
    or a new one.

    Raises: InputError when it does not answer, or when `address` is a dashboard, which takes no tasks.
    """
    import ray
    from ray.exceptions import RayError

    variable = os.environ.get("RAY_ADDRESS")  # which Ray prefers to the address that it is called with
    if address and not variable and not address.startswith("ray://"):
        raise InputError(
            f"params.yaml: run.address: {hidden(address)}: a dashboard takes trainings, no shards; set RAY_ADDRESS to"
            " HOST:6379 (or to local for a Ray of this machine), or run.address to ray://HOST:10001, which takes both"
        )
    try:
        ray.init(address, log_to_driver=False, logging_level="error")
    except (OSError, RuntimeError, ValueError, RayError) as error:
        setting = f"params.yaml: run.address: {hidden(address)}" if address else "run.launcher: ray"
        named = f"RAY_ADDRESS: {variable}" if variable else setting
        remedy = 'start one with "ray start --head", or set RAY_ADDRESS to HOST:6379, or to local for one of this stage'
        raise InputError(f"{named}: no Ray cluster answers ({reason_of(error)}); {remedy}") from None
    end_on_signals()  # Ray has handlers of its own
