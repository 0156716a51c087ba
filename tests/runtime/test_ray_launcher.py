"""How the Ray launcher treats a job, with a stand-in for Ray's client; tests/training/test_ray.py has real clusters."""

from __future__ import annotations

import json
import os
import shlex
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from enum import StrEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from components.config.loop_settings import RunConfig
from components.config.params import InputError
from components.runtime import ray_launcher
from components.runtime.process import RUN_PID
from components.runtime.ray_launcher import launch

SETTINGS = RunConfig(launcher="ray", processes=2, address="head:8265", workers=1)
BEGINNING = "INFO Runtime env is setting up.\nRunning entrypoint for job tune-0123-0: cd /\n"


class Status(StrEnum):
    RUNNING, SUCCEEDED, FAILED, STOPPED = "RUNNING", "SUCCEEDED", "FAILED", "STOPPED"

    def is_terminal(self) -> bool:
        return self != Status.RUNNING


class Client:
    """Ray's client of jobs, as far as the launcher calls it; the log of a job comes in parts."""

    jobs: dict[str, Status]
    environment: str
    """What is in the environment's file when the job is submitted."""
    parts: list[str]
    ending: tuple[Status, int | None]
    words: dict[str, Any]
    is_starting = is_interrupted = is_down = False
    failure: BaseException | None
    """What is raised once the cluster has the job."""

    def __init__(self, address: str) -> None:
        assert address == "http://head:8265"

    def list_jobs(self) -> list[SimpleNamespace]:
        if Client.is_down:
            raise RuntimeError("Request failed with status code 502")
        return [SimpleNamespace(submission_id=job, status=status) for job, status in self.jobs.items()]

    def submit_job(self, submission_id: str, **words: Any) -> str:
        if Client.is_starting:
            Client.is_starting = False
            raise RuntimeError("No available agent to submit job, please try again later")
        assert submission_id not in self.jobs
        Client.jobs = {**self.jobs, submission_id: Status.RUNNING}
        Client.words = words
        file = Path(shlex.split(words["entrypoint"])[-1])
        assert not stat.S_IMODE(file.stat().st_mode) & 0o077
        Client.environment = file.read_text()
        if Client.failure is not None:
            raise Client.failure
        return submission_id

    def stop_job(self, job: str) -> None:
        Client.jobs = {**self.jobs, job: Status.STOPPED}

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        assert job in self.jobs
        for number, part in enumerate(self.parts):
            if number == 2 and Client.is_interrupted:
                Client.is_interrupted = False
                raise RuntimeError("WebSocket connection closed unexpectedly")
            yield part

    def get_job_info(self, job: str) -> SimpleNamespace:
        return SimpleNamespace(status=self.ending[0], driver_exit_code=self.ending[1], message="its\nnode died")


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> type[Client]:
    """The client that the launcher makes, for a job that ends well without a line."""
    modules = {
        "ray": {},
        "ray.exceptions": {"RayError": OSError},
        "ray.job_submission": {"JobSubmissionClient": Client},
    }
    for name, members in modules.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr("logging.disable", lambda _: None)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    Client.jobs, Client.parts, Client.ending = {}, [BEGINNING], (Status.SUCCEEDED, 0)
    Client.is_down, Client.failure = False, None
    return Client


def test_without_ray_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r'run.launcher: ray: ray is not installed; run pip install "loopwright\[clu'):
        launch("tune", "0123", SETTINGS, tmp_path, tmp_path)


def test_each_line_is_passed_on_once_to_its_stream(
    client: type[Client], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also when the connection is lost within a line."""
    client.parts, client.is_interrupted = [BEGINNING + "tune  1/2\ntu", "ne  2", "/2\nstderr: warn", "ing\n"], True
    assert launch("tune", "0123", SETTINGS, tmp_path, tmp_path) == 0
    assert capsys.readouterr() == ("tune  1/2\ntune  2/2\n", "warning\n")


def test_a_job_of_the_same_inputs_is_followed_while_it_runs(client: type[Client], tmp_path: Path) -> None:
    client.jobs = {"tune-0123-0": Status.FAILED, "tune-0123-1": Status.RUNNING, "tune-4567-0": Status.RUNNING}
    before = client.jobs
    assert launch("tune", "0123", SETTINGS, tmp_path, tmp_path) == 0
    assert client.jobs == before
    client.jobs, client.is_starting = {"tune-0123-0": Status.FAILED, "tune-0123-1": Status.SUCCEEDED}, True
    assert launch("tune", "0123", SETTINGS, tmp_path, tmp_path) == 0
    assert list(client.jobs) == ["tune-0123-0", "tune-0123-1", "tune-0123-2"], "Ray takes an id once"


def test_no_secret_is_in_what_ray_shows_of_a_job(
    client: type[Client], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "rosebud")
    monkeypatch.setenv(RUN_PID, "1")
    monkeypatch.setenv("RAY_ADDRESS", "elsewhere")
    launch("pretrain@decoder", "0123", SETTINGS, tmp_path, tmp_path)
    assert list(client.jobs) == ["pretrain-decoder-0123-0"]
    assert "rosebud" not in json.dumps(client.words)
    environment = json.loads(client.environment)
    assert environment["MLFLOW_TRACKING_PASSWORD"] == "rosebud"
    assert not {RUN_PID, "RAY_ADDRESS"} & set(environment)


@pytest.mark.parametrize(
    ("ending", "code"),
    [((Status.FAILED, 137), 137), ((Status.FAILED, None), 1), ((Status.STOPPED, None), 128 + signal.SIGTERM)],
)
def test_the_exit_code_is_that_of_the_job(
    ending: tuple[Status, int | None], code: int, client: type[Client], tmp_path: Path
) -> None:
    client.ending = ending
    assert launch("tune", "0123", SETTINGS, tmp_path, tmp_path) == code


def test_what_the_job_refuses_is_refused(client: type[Client], tmp_path: Path) -> None:
    client.parts, client.ending = [BEGINNING, "refused: run.processes: 3: too many\n"], (Status.FAILED, 1)
    with pytest.raises(InputError, match=r"^run.processes: 3: too many$"):
        launch("tune", "0123", SETTINGS, tmp_path, tmp_path)


def environment_files(home: Path) -> list[str]:
    return [path.name for path in (home / "stages").glob("*environment*")]


def test_a_signal_right_after_the_submission_stops_the_job(
    client: type[Client], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    client.failure, client.ending = SystemExit(143), (Status.STOPPED, None)
    with pytest.raises(SystemExit, match="143"):
        launch("tune", "0123", SETTINGS, tmp_path, tmp_path)
    assert client.jobs == {"tune-0123-0": Status.STOPPED}
    assert not environment_files(tmp_path)


def test_the_death_of_the_run_or_its_worker_leaves_the_job(
    client: type[Client], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its environment, which it may not have read yet."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    monkeypatch.setenv(RUN_PID, f"{os.getpid()} {gone.pid}")
    client.failure = SystemExit(143)
    with pytest.raises(SystemExit, match="143"):
        launch("tune", "0123", SETTINGS, tmp_path, tmp_path)
    assert client.jobs == {"tune-0123-0": Status.RUNNING}
    assert environment_files(tmp_path) == ["tune-0123-0.environment.json"]


@pytest.mark.parametrize("failure", [RuntimeError("no agent"), ConnectionError("connection\nrefused")])
def test_a_job_that_is_not_taken_leaves_no_secret(
    failure: Exception, client: type[Client], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.failure = failure
    monkeypatch.setattr(ray_launcher, "_SECONDS_TO_ANSWER", -1.0)
    with pytest.raises(InputError, match=r"^params.yaml: run.address: the Ray cluster takes no job: (no|connection) "):
        launch("tune", "0123", SETTINGS, tmp_path, tmp_path)
    assert client.environment
    assert not environment_files(tmp_path)


def test_the_environment_of_a_followed_job_stays_until_it_ends(client: type[Client], tmp_path: Path) -> None:
    """That of another job of the stage stays: it may be pending."""
    client.jobs = {"tune-0123-0": Status.RUNNING}
    (tmp_path / "stages").mkdir()
    for job in ("tune-0123-0", "tune-4567-0"):
        (tmp_path / "stages" / f"{job}.environment.json").write_text("{}")
    assert launch("tune", "0123", SETTINGS, tmp_path, tmp_path) == 0
    assert environment_files(tmp_path) == ["tune-4567-0.environment.json"]


def test_a_ray_that_does_not_answer_or_start_is_one_line(
    client: type[Client], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.is_down = True
    with pytest.raises(InputError, match=r"^params.yaml: run.address: http://head:8265: no Ray .* 502\)"):
        launch("tune", "0123", SETTINGS, tmp_path, tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise TimeoutError("GCS\ndid not start")

    monkeypatch.setattr(sys.modules["ray"], "init", fail, raising=False)
    with pytest.raises(InputError, match=r"run.launcher: ray: no Ray starts .* \(GCS did not start\); set"):
        launch("tune", "0123", SETTINGS.model_copy(update={"address": None}), tmp_path, tmp_path)
