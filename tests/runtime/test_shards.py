"""Shards: the same bytes from any number of workers, and after a kill at most one shard a worker is done again."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from components.config.loop_settings import RunConfig
from components.config.params import InputError, load_params
from components.config.paths import Paths
from components.runtime import shards as shard_runs
from components.runtime.shards import Job, Output, Result, Shard, run_shards
from components.runtime.stage import StageRun, digest
from flows.orchestration.prefect_server import free_port

ROOT = Path(__file__).parents[2]


class Silent:
    """A tracker that keeps nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def upper(out: Path, file: str, log: str, ends_by: str = "") -> Result:
    """Write a file in upper case; `ends_by`: killed, or refused, where there is no such file yet."""
    with Path(log).open("a") as lines:
        lines.write(f"{Path(file).name}\n")
    if ends_by and not Path(ends_by).exists():
        Path(ends_by).touch()
        if ends_by.endswith("killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        raise InputError(f"{file}: refused")
    text = Path(file).read_text().upper()
    (out / "text").write_text(text)
    return {"characters": len(text)}


def run_of(folder: Path, workers: int, launcher: str = "local", address: str | None = None) -> StageRun:
    values = {"scale": "smoke", "run.workers": workers, "run.launcher": launcher, "run.address": address}
    params = load_params(ROOT / "params.yaml", values)
    return StageRun("prepare@decoder", params, Paths(folder), folder / "state", Silent())


def shards(folder: Path, ends: str = "", **arguments: Any) -> list[Shard]:
    folder.mkdir(exist_ok=True)
    made = []
    for number in range(6):
        file = folder / f"{number}.txt"
        file.write_text(f"text {number}" * (number + 1))
        how = {"ends_by": str(folder / ends)} if ends and number == 3 else {}
        values = {"file": str(file), "log": str(folder / "log"), **how, **arguments}
        made.append(Shard(f"text-{number}", upper, [file], values))
    return made


def result(outputs: list[Output]) -> list[tuple[str, int, str]]:
    return [(each.folder.name, each.result["characters"], (each.folder / "text").read_text()) for each in outputs]


def log(folder: Path) -> Counter[str]:
    return Counter((folder / "log").read_text().split())


def test_any_number_of_workers_gives_the_same_bytes_in_the_same_order(tmp_path: Path) -> None:
    outputs = [
        result(run_shards(run_of(folder, workers), shards(folder)))
        for workers, folder in ((1, tmp_path / "one"), (2, tmp_path / "two"))
    ]
    assert outputs[0] == outputs[1] == [(f"text-{n}", 6 * (n + 1), f"TEXT {n}" * (n + 1)) for n in range(6)]


def test_a_killed_worker_is_reported_and_its_shard_done_again(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^prepare@decoder: a worker process was killed; finished shards stay; run"):
        run_shards(run_of(tmp_path, 2), shards(tmp_path, "killed"))
    finished = {path.stem for path in (tmp_path / "state").glob("*.json")}
    outputs = run_shards(run_of(tmp_path, 2), shards(tmp_path, "killed"))
    assert result(outputs) == [(f"text-{n}", 6 * (n + 1), f"TEXT {n}" * (n + 1)) for n in range(6)]
    again = {name.removesuffix(".txt") for name, times in log(tmp_path).items() if times > 1}
    assert "3" in again
    assert len(again) <= 2, "at most one a worker"
    assert not {f"text-{number}" for number in again} & finished


def test_a_shard_whose_result_the_stage_never_read_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker, or the stage itself, was killed before: nobody else has written that the shard is finished."""

    def lose_results(name: str, jobs: Sequence[Job], settings: RunConfig) -> Iterator[dict[str, Any]]:
        for job in jobs:
            job.run()
        return iter(())

    with monkeypatch.context() as patch:
        patch.setattr(shard_runs, "execute", lose_results)
        with pytest.raises(KeyError):
            run_shards(run_of(tmp_path, 1), shards(tmp_path))
    outputs = run_shards(run_of(tmp_path, 1), shards(tmp_path))
    assert result(outputs) == [(f"text-{n}", 6 * (n + 1), f"TEXT {n}" * (n + 1)) for n in range(6)]
    assert set(log(tmp_path).values()) == {1}


def test_what_is_finished_is_not_done_again(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="refused"):
        run_shards(run_of(tmp_path, 1), shards(tmp_path, "refused"))
    assert sum(log(tmp_path).values()) == 4
    run_shards(run_of(tmp_path, 1), shards(tmp_path, "refused"))
    assert log(tmp_path) == {**{f"{n}.txt": 1 for n in range(6)}, "3.txt": 2}
    run_shards(run_of(tmp_path, 1), shards(tmp_path, "refused"))
    assert sum(log(tmp_path).values()) == 7


def test_a_torn_line_a_damaged_file_and_another_input_are_done_again(tmp_path: Path) -> None:
    run = run_of(tmp_path, 1)
    first = digest(run_shards(run, shards(tmp_path))[0].folder)
    line = run.state / "text-5.json"
    line.write_bytes(line.read_bytes()[:-9])
    (run.state / "text-1/text").write_text("TORN")
    work = shards(tmp_path)
    (tmp_path / "2.txt").write_text("other")
    outputs = run_shards(run, work)
    assert {name: times for name, times in log(tmp_path).items() if times > 1} == {"1.txt": 2, "2.txt": 2, "5.txt": 2}
    assert [each.result["characters"] for each in outputs] == [6, 12, 5, 24, 30, 36]
    assert json.loads(line.read_bytes())["key"] == "text-5"
    assert digest(outputs[0].folder) == first


class RayError(Exception):
    """The base of what Ray raises."""


class RayTaskError(RayError):
    """An exception of a task."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause


class WorkerCrashedError(RayError):
    """What Ray raises where a worker was killed."""


class Ray(ModuleType):
    """Ray, as far as shards call it: tasks run here, as they are waited for, the newest first."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)
        self.address: str | None = None
        self.refuses: Exception | None = None
        self.loses: Exception | None = None

    def is_initialized(self) -> bool:
        return False

    def init(self, address: str | None, **options: Any) -> None:
        self.address = address
        assert options == {"log_to_driver": False, "logging_level": "error"}
        if self.refuses:
            raise self.refuses
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def remote(self, max_retries: int) -> Callable[..., Any]:
        assert max_retries == 0
        return lambda function: SimpleNamespace(remote=lambda job: lambda: function(job))

    def wait(self, tasks: list[Any]) -> tuple[list[Any], list[Any]]:
        assert len(tasks) <= 2, "no more than run.workers"
        return tasks[-1:], tasks[:-1]

    def get(self, task: Callable[[], Any]) -> Any:
        if self.loses:
            raise self.loses
        try:
            return task()
        except Exception as error:
            raise RayTaskError(error) from error


@pytest.fixture
def handlers() -> Iterator[None]:
    """Handlers of signals are those of before, after a test that connects to Ray."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch, handlers: None) -> Ray:
    ray = Ray()
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.exceptions", ray.exceptions)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    return ray


def test_tasks_of_ray_give_the_same_and_sigterm_still_ends_the_stage(ray: Ray, tmp_path: Path) -> None:
    outputs = result(run_shards(run_of(tmp_path, 2, "ray"), shards(tmp_path)))
    assert outputs == [(f"text-{n}", 6 * (n + 1), f"TEXT {n}" * (n + 1)) for n in range(6)]
    with pytest.raises(SystemExit) as stopped:
        signal.raise_signal(signal.SIGTERM)
    assert stopped.value.code == 128 + signal.SIGTERM


def test_what_ray_loses_or_a_shard_refuses_is_one_line(ray: Ray, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"3\.txt: refused$"):
        run_shards(run_of(tmp_path, 2, "ray"), shards(tmp_path, "refused"))
    ray.loses = WorkerCrashedError("The worker died unexpectedly.\nSee its log.")
    lost = r"^prepare@decoder: a worker process was lost \(Ray's WorkerCrashedError\); finished shards stay; run"
    with pytest.raises(InputError, match=lost):
        run_shards(run_of(tmp_path, 2, "ray"), shards(tmp_path))
    ray.refuses = ConnectionError("Failed to connect\nto it")
    refused = r"^RAY_ADDRESS: head:6379: no Ray cluster answers \(Failed to connect to it\); start one with"
    with pytest.raises(InputError, match=refused):
        run_shards(run_of(tmp_path, 2, "ray"), shards(tmp_path))


def test_shards_go_to_the_cluster_of_run_address_and_never_past_a_dashboard(
    ray: Ray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_shards(run_of(tmp_path, 2, "ray", "http://head:8265"), shards(tmp_path))  # those of RAY_ADDRESS
    monkeypatch.delenv("RAY_ADDRESS")
    for dashboard in ("http://head:8265", "head:8265"):
        refused = rf"^params.yaml: run.address: {dashboard}: a dashboard takes trainings, no shards; set RAY_ADDRESS to"
        with pytest.raises(InputError, match=refused):
            run_shards(run_of(tmp_path / "none", 2, "ray", dashboard), shards(tmp_path))
    run_shards(run_of(tmp_path / "cluster", 2, "ray", "ray://head:10001"), shards(tmp_path))
    assert ray.address == "ray://head:10001"
    ray.refuses = ConnectionError("Failed to connect")
    with pytest.raises(InputError, match=r"^params.yaml: run.address: ray://head:10001: no Ray cluster answers"):
        run_shards(run_of(tmp_path / "again", 2, "ray", "ray://head:10001"), shards(tmp_path))


HEAD = """
import ray, subprocess, sys
head = ray.init("local", num_cpus=2, object_store_memory=2**27)
client = "--address", head.address_info["gcs_address"], "--host", "127.0.0.1", "--port", sys.argv[1], "--mode", "legacy"
with subprocess.Popen([sys.executable, "-m", "ray.util.client.server", *client]) as server:
    print("ready", flush=True)
    sys.stdin.read()
    server.terminate()
"""


@pytest.fixture
def real_ray(monkeypatch: pytest.MonkeyPatch, handlers: None) -> Iterator[None]:
    """Ray itself, in this process without tokens: it reads how at its import."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    import ray

    yield
    ray.shutdown()


@pytest.mark.cluster
@pytest.mark.skipif(find_spec("ray") is None, reason="the extra cluster is not installed")
@pytest.mark.timeout(300)
def test_shards_go_to_a_real_cluster_at_run_address(tmp_path: Path, real_ray: None) -> None:
    port = str(free_port())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", HEAD, port]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as head:
        assert head.stdout is not None
        assert head.stdout.readline() == b"ready\n"
        outputs = result(run_shards(run_of(tmp_path, 2, "ray", f"ray://127.0.0.1:{port}"), shards(tmp_path)))
        head.communicate()
    assert outputs == [(f"text-{n}", 6 * (n + 1), f"TEXT {n}" * (n + 1)) for n in range(6)]


@pytest.mark.cluster
@pytest.mark.skipif(find_spec("ray") is None, reason="the extra cluster is not installed")
@pytest.mark.timeout(300)
def test_a_killed_worker_of_ray_is_reported_and_its_shard_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real_ray: None
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    with pytest.raises(InputError, match=r"lost \(Ray's WorkerCrashedError\); finished shards stay"):
        run_shards(run_of(tmp_path, 2, "ray"), shards(tmp_path, "killed"))
    outputs = result(run_shards(run_of(tmp_path, 2, "ray"), shards(tmp_path, "killed")))
    assert outputs == [(f"text-{n}", 6 * (n + 1), f"TEXT {n}" * (n + 1)) for n in range(6)]
