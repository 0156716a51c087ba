"""Every store on a server: PostgreSQL with a password, an S3 API with keys, MLflow over HTTP with accounts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from components.config.errors import InputError, Unavailable
from components.runtime.params_file import write_params
from components.runtime.stage import PIPELINES
from components.tracking import downloads, mlflow_requests
from components.tracking.event_log import PARENT_RUN
from components.tracking.mlflow_client import EXPERIMENT, UPLOADER, connect
from components.tracking.mlflow_requests import TIME_LIMIT, TRANSFER_SECONDS, transfer
from components.tracking.registry import ModelVersion, Registry
from flows.orchestration import flow_run
from flows.orchestration.services import has_champion
from serving.models.alias_watcher import AliasWatcher
from serving.models.versions import Registered
from tests.conftest import Project, Released, clone
from tests.servers import PASSWORD, USER, FaultyProxy, mlflow_server, new_database, prefect_server, s3_server
from tests.tracking import test_registry
from tests.tracking.test_mlflow_client import (  # noqa: F401 - these run here against a server
    test_a_line_that_mlflow_refuses_does_not_hold_up_the_rest,
    test_everything_a_stage_says_is_in_mlflow,
    test_names_resolve_by_alias_version_or_champion,
    test_runs_of_a_killed_orchestrator_are_closed,
    test_trials_of_a_stage_are_runs_within_its_run,
    test_unknown_names_say_what_there_is,
)
from tests.tracking.test_registry import test_demotion_restores_every_alias_and_happens_once  # noqa: F401

pytestmark = [pytest.mark.servers, pytest.mark.timeout(900)]
Register = Callable[..., ModelVersion]


@dataclass(frozen=True)
class Servers:
    """An MLflow server behind a proxy, on PostgreSQL and S3."""

    mlflow: FaultyProxy
    postgres: str
    s3: dict[str, str]

    @property
    def clients(self) -> dict[str, str]:
        """The environment of commands that use these servers."""
        signed_in = {"MLFLOW_TRACKING_USERNAME": USER, "MLFLOW_TRACKING_PASSWORD": PASSWORD}
        return {"MLFLOW_TRACKING_URI": self.mlflow.address, **signed_in}

    def stored(self, bucket: str, prefix: str = "") -> list[str]:
        """The names of the objects in a bucket."""
        import boto3

        keys = {"aws_access_key_id": USER, "aws_secret_access_key": PASSWORD}
        client = boto3.client("s3", "us-east-1", endpoint_url=self.s3["AWS_ENDPOINT_URL"], **keys)
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        names = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        client.close()
        return names


@pytest.fixture(scope="module")
def servers(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("servers")
    with s3_server() as s3, mlflow_server(folder, postgres, s3) as address:
        proxy = FaultyProxy(address)
        yield Servers(proxy, postgres, s3)
        proxy.close()


@pytest.fixture
def home(servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty state folder, whose registry is on the server and empty too."""
    for variable in (PARENT_RUN, UPLOADER):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in servers.clients.items():
        monkeypatch.setenv(variable, value)
    client = connect(tmp_path)
    for model in client.search_registered_models():
        client.delete_registered_model(model.name)
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    client.rename_experiment(experiment, uuid.uuid4().hex)
    client.delete_experiment(experiment)
    connect(tmp_path)
    servers.mlflow.requests.clear()
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions without our code, whose 200 files take seconds to send and fetch; the loop below has them."""
    monkeypatch.setattr(
        "components.tracking.registry.save_pyfunc",
        lambda folder, path: shutil.copytree(folder, path / "data" / folder.name),
    )


@pytest.fixture
def registered(light: None, registered: Register) -> Register:
    return registered


@pytest.mark.parametrize("left", [1, 5])
def test_a_kill_between_two_writes_reads_as_before_or_after(
    registry: Registry, registered: Register, left: int
) -> None:
    test_registry.test_kill_between_any_two_writes_reads_as_before_or_after(registry, registered, left)
    assert set(registry.aliases("agent").values()) == {1, 2}, "on the server too one is champion, the other previous"


def test_artifacts_go_through_the_server_into_the_object_store(
    servers: Servers, registry: Registry, registered: Register
) -> None:
    version = registered(0.5)
    assert registry.client.get_run(version.run_id).info.artifact_uri.startswith("mlflow-artifacts:")
    stored = servers.stored("mlflow", f"{_experiment(registry)}/{version.run_id}/")
    assert [name for name in stored if name.endswith("/agent/data/agent/model.safetensors")]
    assert not (registry.home / "mlflow/artifacts").exists()


def _experiment(registry: Registry) -> str:
    return str(registry.client.get_experiment_by_name(EXPERIMENT).experiment_id)


def test_a_wrong_password_is_told_in_one_line(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "another")
    with pytest.raises(
        InputError, match=r"MLFLOW_TRACKING_URI: .*refused: .*401.*; check MLFLOW_TRACKING_USERNAME and"
    ):
        connect(home)
    assert not isinstance(_raised(lambda: connect(home)), Unavailable), "trying again does not help"


def _raised(call: Callable[[], Any]) -> Exception | None:
    try:
        call()
    except Exception as error:  # noqa: BLE001
        return error
    return None


def test_the_platform_sees_a_champion_behind_a_password(registry: Registry, registered: Register) -> None:
    assert not has_champion(registry.home)
    registry.promote(registered(0.5))
    assert has_champion(registry.home)


def test_a_lost_response_makes_no_second_version(servers: Servers, registry: Registry, registered: Register) -> None:
    """MLflow's client sends a request again whose response is lost, and the server carries it out twice."""
    servers.mlflow.faults.append((b"/model-versions/create", 0))
    version = registered(0.5)
    sent = [line for line in servers.mlflow.requests if b"/model-versions/create" in line]
    assert len(sent) == 2
    assert [str(row) for row in registry.versions("agent")] == [str(version)]
    assert version.folder.is_dir()


def test_a_slow_upload_has_time_and_a_silent_server_has_not(
    servers: Servers, registry: Registry, registered: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered(0.5)
    monkeypatch.setattr(mlflow_requests, "REQUEST_SECONDS", "1")
    monkeypatch.setenv(TIME_LIMIT, "1")
    servers.mlflow.holds.append((b"PUT /api/2.0/mlflow-artifacts", 2.5))
    assert str(registered(0.6)) == "agent/2"
    assert not servers.mlflow.holds
    servers.mlflow.holds += [(b"/registered-models/get", 2.5)] * 2
    with pytest.raises(Unavailable, match="ReadTimeout"):
        registry.aliases("agent")


def test_an_outage_at_a_flows_end_is_waited_for(
    servers: Servers, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    with flow_run._tracked("pipeline", registry.home, lines.append) as note:
        run_id = os.environ[PARENT_RUN]
        servers.mlflow.faults += [(b"/runs/set-tag", 0)] * 2  # MLflow's client sends a request twice
        note({"stage.tune": "ran"})
        servers.mlflow.faults += [(b"/runs/update", 0)] * 2
    run = registry.client.get_run(run_id)
    assert (run.info.status, run.data.tags["stage.tune"]) == ("FINISHED", "ran")
    assert [line.rpartition("; ")[2] for line in lines] == ["tries again in 1 s"] * 2
    assert all(line.startswith(f"MLFLOW_TRACKING_URI: {servers.mlflow.address}: ") for line in lines)


def test_work_that_is_done_does_not_fail_where_mlflow_stays_away(
    servers: Servers, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow_run, "SECONDS_UNAVAILABLE", 0.0)

    def work(error: Exception | None) -> None:
        with flow_run._tracked("pipeline", registry.home, print):
            servers.mlflow.faults += [(b"/runs/update", 0)] * 2
            if error:
                raise error

    work(None)
    with pytest.raises(InputError, match="wrong"):
        work(InputError("wrong"))
    assert not servers.mlflow.faults


def test_the_limit_returns_after_the_last_transfer_and_a_users_own_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TIME_LIMIT, "5")
    with transfer():
        with transfer():
            pass
        assert os.environ[TIME_LIMIT] == TRANSFER_SECONDS
    assert os.environ[TIME_LIMIT] == "5"
    monkeypatch.setenv(TIME_LIMIT, "30")
    with transfer():
        assert os.environ[TIME_LIMIT] == "30"
    assert os.environ[TIME_LIMIT] == "30"


@pytest.fixture
def elsewhere(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """The same registry as another machine sees it, which has no copy of any version."""
    monkeypatch.setattr(downloads, "PAUSE_SECONDS", 0.0)
    (tmp_path / "elsewhere").mkdir()
    return Registry(tmp_path / "elsewhere")


DOWNLOAD = b"GET /api/2.0/mlflow-artifacts/artifacts/"


def test_a_download_that_breaks_off_is_tried_again(servers: Servers, elsewhere: Registry, registered: Register) -> None:
    version = registered(0.5)
    servers.mlflow.faults += [(b"/data/agent/config.json", 200), (b"/data/agent/config.json", 200)]
    folder = elsewhere.resolve("agent/1").folder
    assert (folder / "config.json").read_bytes() == (version.folder / "config.json").read_bytes()
    assert not servers.mlflow.faults
    assert {path.name for path in folder.parents[2].iterdir()} == {"1", "1.lock"}


def test_a_copy_with_other_weights_is_downloaded_again(elsewhere: Registry, registered: Register) -> None:
    """As of another server's version of that name, or of a damaged disk."""
    registered(0.5)
    weights = elsewhere.resolve("agent/1").folder / "model.safetensors"
    weights.write_bytes(b"others")
    assert elsewhere.resolve("agent/1").folder == weights.parent
    assert weights.read_bytes() == b""


def test_processes_of_a_machine_share_one_download(servers: Servers, elsewhere: Registry, registered: Register) -> None:
    registered(0.5)
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(Registry(elsewhere.home).resolve("agent/1").folder))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 4
    assert len(set(folders)) == 1
    fetched = [line for line in servers.mlflow.requests if DOWNLOAD in line and b"/config.json" in line]
    assert len(fetched) == 1


def test_a_failed_download_does_not_ban_a_version(
    servers: Servers, registry: Registry, elsewhere: Registry, classifier_folder: Path, light: None
) -> None:
    from serving.engine.classifier_worker import ClassifierWorker
    from serving.observability.metrics import Metrics

    def release() -> None:
        registry.promote(registry.register(classifier_folder, "classifier", {}, {}, None))

    metrics = Metrics()
    watcher = AliasWatcher(
        "classifier@champion",
        Registered(elsewhere),
        lambda folder, name: ClassifierWorker.load(folder, name, metrics),
        None,
    )
    release()
    watcher.update()
    release()
    servers.mlflow.faults += [(b"/data/classifier/model.safetensors", 2000)] * downloads.ATTEMPTS
    with pytest.raises(Unavailable, match=r"classifier/2: cannot be downloaded: .*; it is tried again"):
        watcher.update()
    assert watcher.engine is not None
    assert (watcher.engine.name, watcher.rejected) == ("classifier/1", 0)
    watcher.update()
    assert (watcher.engine.name, watcher.rejected) == ("classifier/2", 0)
    assert registry.aliases("classifier") == {"champion": 2, "previous": 1}
    watcher.close()


def test_a_databases_artifacts_go_where_they_should(
    servers: Servers, tmp_path: Path, light: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a server, MLflow would write them into the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", new_database(servers.postgres, f"direct_{uuid.uuid4().hex[:8]}"))
    monkeypatch.setenv("MLFLOW_DEFAULT_ARTIFACT_ROOT", "s3://mlflow/direct")
    for variable, value in servers.s3.items():
        monkeypatch.setenv(variable, value)
    home = tmp_path / "home"
    home.mkdir()
    client = connect(home)
    assert client.get_experiment_by_name(EXPERIMENT).artifact_location == "s3://mlflow/direct"
    folder = tmp_path / "agent"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    registry = Registry(home)
    version = registry.register(folder, "agent", {}, {}, None)
    registry.promote(version)
    assert version.folder == home / "mlflow/downloads/agent/1/data/agent"
    assert [name for name in servers.stored("mlflow", "direct/") if name.endswith("/data/agent/config.json")]
    assert not list(tmp_path.glob("mlruns/*"))


@pytest.fixture
def project(
    released: Released, servers: Servers, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Project, dict[str, str]]]:
    """A clone with what the released project has in git and in DVC's cache, and the environment of its commands."""
    project = clone(tmp_path / "project")
    shutil.copy(released.project.root / "params.yaml", project.root)
    for pipeline in PIPELINES:
        lock = Path(pipeline).with_suffix(".lock")
        if (released.project.root / lock).is_file():
            shutil.copy(released.project.root / lock, project.root / lock)
    shutil.copytree(released.project.root / "data/metrics", project.root / "data/metrics", dirs_exist_ok=True)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.com"]
    for words in (["add", "--all"], ["commit", "--quiet", "--message", "The release"]):
        subprocess.run([*git, *words], cwd=project.root, check=True)
    shutil.copytree(released.project.root / ".dvc/cache", project.root / ".dvc/cache", copy_function=os.link)
    with prefect_server(tmp_path_factory.mktemp("prefect"), servers.postgres) as prefect:
        database = new_database(servers.postgres, "store")
        yield project, {**servers.clients, **servers.s3, **prefect, "LOOPWRIGHT_DATABASE_URL": database}


@contextmanager
def endpoint(project: Project, environment: dict[str, str]) -> Iterator[httpx.Client]:
    command, variables = project.command("serve", "--port", "0", "--json"), {**project.environment, **environment}
    with subprocess.Popen(command, cwd=project.root, env=variables, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            with httpx.Client(base_url=json.loads(server.stdout.readline())["url"], timeout=60) as client:
                yield client
        finally:
            server.send_signal(signal.SIGINT)


SHORT_ALIGN = {"align.max_steps": 100, "align.learning_rate": 0.01, "align.muon_learning_rate": 0.02}
"""So that a model of scale smoke has words for the smoke question, and not the empty answer that endpoints refuse."""


@pytest.mark.skipif("LOOPWRIGHT_TEST_LOOP" not in os.environ, reason="takes minutes; set LOOPWRIGHT_TEST_LOOP=1")
@pytest.mark.platform
@pytest.mark.timeout(1800)
def test_the_loop_with_nothing_embedded(project: tuple[Project, dict[str, str]], servers: Servers) -> None:
    """From the data in the object store to a champion that is promoted and rolled back, by command and over HTTP."""
    here, environment = project
    ask = partial(here.ask, **environment)

    def dvc(*words: str) -> None:
        reached = {**here.environment, **environment, "NO_PROXY": "127.0.0.1"}
        done = subprocess.run([sys.executable, "-m", "dvc", *words], cwd=here.root, env=reached, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()

    dvc("remote", "add", "--local", "--default", "server", "s3://dvc/project")
    dvc("push")
    shutil.rmtree(here.root / ".dvc/cache")
    dvc("pull", "--allow-missing")  # what the first improvement will make
    report = ask("run")
    assert {stage["outcome"] for stage in report["stages"]} == {"up to date"}, "nothing is trained again"
    assert (report["releases"][0]["version"], report["releases"][0]["outcome"]) == ("agent/1", "promoted")
    with endpoint(here, environment) as client:
        for number in range(8):
            body = {
                "messages": [{"role": "user", "content": f"Hello {number}"}],
                "max_tokens": 8,
            }
            answer = client.post("/v1/chat/completions", json=body).raise_for_status().json()
            assert answer["model"] == "agent/1"
            vote = {"completion_id": answer["id"], "rating": "down", "correction": "Welcome, friend."}
            client.post("/v1/feedback", json=vote).raise_for_status()
        assert ask("feedback", "ingest")["accepted"] == 8
        for folder in ("data", ".dvc/cache"):  # as on another host, whose disk is empty
            subprocess.run(["git", "clean", "-fdxq", folder], cwd=here.root, check=True)
        write_params(here.root / "params.yaml", SHORT_ALIGN, lambda line: None)
        improved = here.loopwright("improve", "--json", **environment)
        assert improved.returncode == 3, improved.stderr  # of so few steps and votes
        ask("registry", "promote", "agent", "2")
        await_model(client, "agent/2")
        assert ask("registry", "rollback", "agent")["champion"] == "agent/1"
        await_model(client, "agent/1")
        traced = ask("trace", answer["id"])["version"]
        assert (traced["name"], traced["version"]) == ("agent", "1")
    embedded = ("mlflow/mlflow.db", "mlflow/artifacts", "prefect/prefect.db", "feedback.db")
    assert not [name for name in embedded if (here.home / name).exists()]


def await_model(client: httpx.Client, wanted: str) -> None:
    deadline = time.monotonic() + 60
    while (seen := client.get("/v1/models").json()["data"][0]["id"]) != wanted:
        assert time.monotonic() < deadline, f"{seen} instead of {wanted}"
        time.sleep(0.1)
