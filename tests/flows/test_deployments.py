"""Deployments on a real Prefect server with a real worker: schedule, event, death, cancellation.

One server and one worker for the file, started and kept as `loopwright up` does; asked over HTTP alone.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from components.config.params import InputError, Refused
from components.feedback.store import AnswerRecord, Store
from components.runtime.supervisor import Supervisor, process_tree
from flows.deployments import overrides_of
from flows.orchestration import flow_run
from flows.orchestration.flow_run import FlowRun, effect, run_flow
from flows.orchestration.prefect_server import client_settings, free_port, heartbeat, home_tag, send_logs
from flows.orchestration.run_stage import DVC
from flows.orchestration.services import platform as services
from tests.conftest import Project, Released, prefect_client

pytestmark = [pytest.mark.platform, pytest.mark.timeout(900)]

ENDS = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
ENOUGH_ITEMS = 3
PARAMETERS = {
    "pipeline": ["scale", "settings", "until"],
    "ingest": ["limit"],
    "improve": ["force", "dry_run"],
    "monitor": ["days"],
}


@dataclass(frozen=True)
class Platform:
    """A project whose schedules are registered on a running server."""

    project: Project
    api: str
    supervisor: Supervisor

    def send(self, method: str, path: str, body: Any = None) -> Any:
        """What the server answers; again where it says 503, as Prefect's client does when its database is busy."""

        def answered() -> httpx.Response | None:
            with prefect_client(self.project.home, self.api) as client:
                answer = client.request(method, f"/{path}", json=body)
            return None if answer.status_code == HTTPStatus.SERVICE_UNAVAILABLE else answer

        answer: httpx.Response = self.until(answered)
        assert answer.is_success, answer.text
        return answer.json() if answer.content else None

    def ask(self, path: str, **body: Any) -> Any:
        return self.send("POST", path, body)

    def deployment(self, flow: str, name: str = "scheduled") -> dict[str, Any]:
        found: dict[str, Any] = self.send("GET", f"deployments/name/{flow}/{name}")
        return found

    def runs(self, flow: str, name: str = "scheduled", *, auto_scheduled: bool | None = None) -> list[dict[str, Any]]:
        """Flow runs of a deployment, by the time they started."""
        asked = {"deployments": {"id": {"any_": [self.deployment(flow, name)["id"]]}}, "sort": "START_TIME_ASC"}
        found = self.ask("flow_runs/filter", **asked)
        return [run for run in found if auto_scheduled is None or run["auto_scheduled"] == auto_scheduled]

    def run(self, flow_run: str) -> dict[str, Any]:
        found: dict[str, Any] = self.send("GET", f"flow_runs/{flow_run}")
        return found

    def start(self, flow: str, **parameters: Any) -> str:
        path = f"deployments/{self.deployment(flow)['id']}/create_flow_run"
        return str(self.ask(path, parameters=parameters)["id"])

    def said(self, flow_run: str) -> list[str]:
        rows = self.ask("logs/filter", logs={"flow_run_id": {"any_": [flow_run]}}, sort="TIMESTAMP_ASC")
        return [row["message"] for row in rows]

    def until(self, true: Callable[[], Any], seconds: float = 300.0) -> Any:
        """What `true` returns once that is something, while the services are kept running."""
        deadline = time.monotonic() + seconds
        while not (found := true()):
            assert time.monotonic() < deadline, f"not within {seconds} s; see {self.project.home / 'logs'}"
            self.supervisor.tick()
            time.sleep(0.2)
        return found

    def ended(self, flow_run: str) -> dict[str, Any]:
        """The state with which a run ends."""
        self.until(lambda: self.run(flow_run)["state"]["type"] in ENDS)
        state: dict[str, Any] = self.run(flow_run)["state"]
        return state

    def pid(self, service: str) -> int:
        process = next(entry.process for entry in self.supervisor.supervised if entry.service.name == service)
        return process.pid if process else 0

    def healthy(self) -> bool:
        return all(entry.state == "healthy" for entry in self.supervisor.supervised)

    def stages(self) -> list[psutil.Process]:
        """Processes of DVC and its stages in this project."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                words = process.cmdline()
                if process.cwd() == str(self.project.root) and any(
                    name in words for name in ("components.runtime.stage", str(DVC))
                ):
                    found.append(process)
        return found


@pytest.fixture(scope="module")
def at(released: Released, database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """A copy of the released project with a state folder of its own: no champion, nothing said yet."""
    root = tmp_path_factory.mktemp("scheduled") / "project"
    shutil.copytree(released.project.root, root, ignore=shutil.ignore_patterns("var"), symlinks=True)
    project = Project(root)
    (project.home / "mlflow").mkdir(parents=True)
    shutil.copy(database / "mlflow/mlflow.db", project.home / "mlflow")
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["feedback"] = {"improve_after": ENOUGH_ITEMS}
    # Without a checkpoint of the clock: one that lies there was saved at the end.
    params["pretrain"]["decoder"] |= {"max_steps": 100_000, "checkpoint_seconds": 10_000}
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        for name in set(os.environ) - set(project.environment):
            patch.delenv(name)
        patch.setenv("PREFECT_WORKER_QUERY_SECONDS", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        for folder in ("prefect", "logs"):
            (project.home / folder).mkdir()
        port = free_port()
        started = services(project.home, {"prefect": port, "mlflow": free_port(), "endpoint": free_port()}, True)
        wanted = [service for service in started if service.name in ("prefect", "worker")]
        supervisor = Supervisor(wanted, project.home / "logs", root, lambda entry: None)
        platform = Platform(project, f"http://127.0.0.1:{port}/api", supervisor)
        try:
            platform.until(platform.healthy)
            yield platform
        finally:
            supervisor.stop(7)


def test_every_deployment_is_registered_and_gets_runs_from_its_schedule(at: Platform) -> None:
    crons = {flow: at.deployment(flow)["schedules"][0]["schedule"]["cron"] for flow in ("pipeline", "ingest")}
    assert crons == {"pipeline": "0 3 * * 0", "ingest": "*/15 * * * *"}
    for flow in ("pipeline", "ingest", "improve", "monitor"):
        assert at.deployment(flow)["global_concurrency_limit"]["limit"] == 1
        # A server with a newer SQLAlchemy looks healthy and never gets here.
        at.until(lambda flow=flow: at.runs(flow, auto_scheduled=True))


def test_deploy_registers_them_on_a_named_server(at: Platform) -> None:
    before = at.deployment("improve")["id"]
    told = at.project.ask("deploy", PREFECT_API_URL=at.api)
    assert {(row["deployment"], row["pool"]) for row in told["deployments"]} == {
        *((f"{flow}/scheduled", "cpu") for flow in ("pipeline", "ingest", "improve", "monitor")),
        *((f"{flow}/gpu", "gpu") for flow in ("pipeline", "improve")),
        ("notify/log", "cpu"),
    }
    assert at.deployment("improve")["id"] == before, "twice is once"
    alone = at.project.loopwright("deploy")
    assert (alone.returncode, alone.stderr.count("\n")) == (1, 1)
    assert "PREFECT_API_URL: not set" in alone.stderr


def test_a_custom_run_has_typed_parameters(at: Platform) -> None:
    schemas = {flow: at.deployment(flow)["parameter_openapi_schema"]["properties"] for flow in PARAMETERS}
    names = {flow: sorted(schema, key=lambda name: schema[name]["position"]) for flow, schema in schemas.items()}
    assert names == PARAMETERS
    assert schemas["pipeline"]["scale"]["anyOf"][0]["enum"] == ["smoke", "laptop", "gpu", "cluster"]
    assert schemas["improve"]["dry_run"]["type"] == "boolean"
    assert all(value["description"] for schema in schemas.values() for value in schema.values())
    path = f"/deployments/{at.deployment('monitor')['id']}/create_flow_run"
    with prefect_client(at.project.home, at.api) as client:
        refused = client.post(path, json={"parameters": {"days": 0}})
    assert refused.status_code == HTTPStatus.CONFLICT, refused.text


def test_a_failure_and_a_refusal_are_reported(at: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = at.ended(at.start("pipeline", until="trian"))
    assert failed["type"] == "FAILED"
    assert "'trian' is no stage of dvc.yaml" in failed["message"]
    monkeypatch.setenv("PREFECT_API_URL", at.api)

    def body(run: FlowRun) -> None:
        raise Refused("agent/2: refused against agent/1: no gain")

    with pytest.raises(Refused):
        run_flow("improve", at.project.home, print, body)
    reports = at.until(lambda: len(found := at.runs("notify", "log")) >= 2 and found)
    messages = [at.ended(run["id"])["message"] for run in reports]
    assert any("pipeline" in message and "'trian' is no stage" in message for message in messages), messages
    assert any(message.endswith("Refused: agent/2: refused against agent/1: no gain") for message in messages), messages
    log = (at.project.home / "logs/worker.log").read_text()
    assert all(message in log for message in messages)


@pytest.mark.parametrize("name", ["project", "serve.mcp_servers"])
def test_a_flow_run_chooses_no_code_and_no_command(name: str) -> None:
    with pytest.raises(InputError, match=f"settings: {name}: names code or commands"):
        overrides_of(None, {name: "x"})


def test_a_schedule_fires_and_the_event_of_its_run_fires_an_improvement(at: Platform) -> None:
    # The deployment's own schedule may have fired before there were votes.
    earlier = {run["id"] for run in at.runs("ingest", auto_scheduled=True) if run["start_time"]}
    store = Store.of(at.project.home)
    for number in range(ENOUGH_ITEMS):
        store.add_request(f"c-{number}", "agent/1", {"messages": [{"role": "user", "content": f"What is {number}?"}]})
        store.add_answer(f"c-{number}", AnswerRecord("I do not know.", "stop", 5, 5, 0.1))
        store.add_feedback(f"c-{number}", "down", f"It is {number}.", user="user:a")
    often = {"schedule": {"interval": 10, "anchor_date": datetime.now(UTC).isoformat()}, "active": True}
    ingest = at.deployment("ingest")["id"]
    made = at.send("POST", f"deployments/{ingest}/schedules", [often])[0]
    # The worker takes what is due in ten seconds at once: the run behind the first is cancelled before that one starts.
    started = at.until(
        lambda: [
            run
            for run in at.runs("ingest", auto_scheduled=True)
            if run["start_time"] and run["state_type"] != "CANCELLED" and run["id"] not in earlier
        ]
    )
    at.send("DELETE", f"deployments/{ingest}/schedules/{made['id']}")
    assert at.ended(started[0]["id"])["type"] == "COMPLETED", at.said(started[0]["id"])
    assert (store.fresh(), store.waiting()) == (0, ENOUGH_ITEMS)
    store.close()
    fired = at.until(lambda: at.runs("improve", auto_scheduled=False))
    state = at.ended(fired[0]["id"])
    assert (state["type"], state["name"]) == ("CANCELLED", "Skipped"), state
    assert "there is no champion to improve" in state["message"]


def test_runs_of_a_killed_worker_are_marked_and_those_that_live_stay(at: Platform) -> None:
    killed = at.start("pipeline")
    at.until(lambda: at.run(killed)["state"]["type"] == "RUNNING")
    facts = {"flow_id": at.deployment("pipeline")["flow_id"], "tags": [home_tag(at.project.home)]}
    lives = at.ask("flow_runs/", **facts, state={"type": "RUNNING"})["id"]
    other = at.ask("flow_runs/", flow_id=facts["flow_id"], state={"type": "RUNNING"})["id"]
    worker = at.pid("worker")
    with heartbeat(at.project.home, lives):
        for member in process_tree(worker):
            with suppress(psutil.NoSuchProcess):
                member.kill()
        state = at.ended(killed)
        at.until(lambda: at.healthy() and at.pid("worker") != worker)
        assert (state["type"], state["message"]) == ("CRASHED", "its process was killed")
        assert at.run(lives)["state"]["type"] == "RUNNING"
    assert at.run(other)["state"]["type"] == "RUNNING", "of another state folder"
    at.until(lambda: not at.stages(), 60)


def test_cancelling_a_run_ends_its_training_and_leaves_a_checkpoint(at: Platform) -> None:
    run = at.start("pipeline")
    checkpoints = at.project.home / "checkpoints/pretrain@decoder"
    at.until(lambda: any(line.startswith("pretrain@decoder  ") for line in at.said(run)))
    assert at.stages()
    assert not list(checkpoints.glob("*/step-*"))
    at.ask(f"flow_runs/{run}/set_state", state={"type": "CANCELLING"})
    assert at.ended(run)["type"] == "CANCELLED"
    at.until(lambda: not at.stages(), 60)
    assert list(checkpoints.glob("*/step-*"))


def test_effects_are_tried_again_and_verdicts_are_not(at: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect import flow
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    monkeypatch.setattr(flow_run, "SECONDS_BETWEEN_TRIES", 0.0)
    tried: list[str] = []

    def register(failure: Exception, failures: int) -> str:
        tried.append(type(failure).__name__)
        if len(tried) <= failures:
            raise failure
        return "registered"

    @flow(name="effects")
    def effects() -> None:
        assert effect(register, ConnectionError("gone"), flow_run.RETRIES) == "registered"
        tried.clear()
        for failure, options in ((InputError("wrong"), {}), (Refused("no"), {}), (OSError("gone"), {"retries": 0})):
            with pytest.raises(type(failure)):
                effect(register, failure, len(tried) + 1, **options)
        assert tried == ["InputError", "Refused", "OSError"]

    secret = client_settings(at.project.home, at.api)["PREFECT_API_AUTH_STRING"]
    with temporary_settings({PREFECT_API_URL: at.api, PREFECT_API_AUTH_STRING: secret}):
        effects()
        send_logs()
