"""The scheduled deployments: which flow runs when, by which event, and how many at a time.

The functions with `@flow` below are what a worker calls; each joins the work itself to the flow run it is in.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy, State
from prefect.client.schemas.schedules import CronSchedule
from prefect.events import DeploymentEventTrigger
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Completed
from prefect.types.entrypoint import EntrypointType

from components.config.params import InputError, Refused
from components.config.paths import Paths, find_root
from components.runtime.process import end_with_parent, lock_owner
from components.runtime.service_registry import record_success
from components.tracking.event_log import warn_on_failure
from flows.feedback import ENOUGH, RESOURCE
from flows.feedback import ingest as run_ingestion
from flows.orchestration.flow_run import while_unavailable
from flows.orchestration.prefect_server import home_tag
from flows.orchestration.services import has_champion
from flows.pipeline import RunOptions, run_pipeline

POOL = "loopwright"
_JOB_TEMPLATE = {
    # Where the worker runs: a moved or copied project must not work in its old folder.
    "job_configuration": {"working_dir": ".", "stream_output": True},
    # A flow run chooses nothing: with Prefect's own template, it names a command and an environment for the worker.
    "variables": {"type": "object", "properties": {}, "additionalProperties": False},
}


@dataclass(frozen=True)
class Schedule:
    """The cron schedule of a flow, and the event that triggers it besides."""

    flow: Any
    cron: str
    event: str = ""


@flow(name="pipeline", validate_parameters=False)
def pipeline() -> Any:
    """Bring every stage up to date, then release."""
    return _run_exclusively("pipeline", lambda root, echo: run_pipeline(RunOptions(root, echo=echo)))


@flow(name="ingest", validate_parameters=False)
def ingest() -> Any:
    """Ingest user feedback."""
    end_with_parent()
    echo = get_run_logger().info
    while_unavailable(lambda: run_ingestion(find_root(), echo), echo)
    record_success(Paths(find_root()).home, "ingest")


@flow(name="improve", validate_parameters=False)
def improve() -> Any:
    """Train on user feedback once; skipped, not failed, while there is no champion."""
    if not has_champion(Paths(find_root()).home):
        return Cancelled(name="Skipped", message='there is no champion to improve; "loopwright run" makes one')
    from flows.improve import improve as run_improvement

    return _run_exclusively("improve", lambda root, echo: run_improvement(root, echo=echo))


@flow(name="monitor", validate_parameters=False)
def monitor() -> Any:
    """Check prompts and votes for drift."""
    end_with_parent()
    from flows.monitor import monitor as run_monitor

    echo = get_run_logger().info
    while_unavailable(lambda: run_monitor(find_root(), echo), echo)
    record_success(Paths(find_root()).home, "monitor")
    _prune(find_root())


SCHEDULES = (
    Schedule(pipeline, "0 3 * * 0"),
    Schedule(ingest, "*/15 * * * *"),
    Schedule(improve, "0 5 * * 1", ENOUGH),
    Schedule(monitor, "0 6 * * *"),
)


def register(root: Path) -> list[dict[str, str]]:
    """Register the work pool and the deployments on the server that PREFECT_API_URL names."""
    # One at a time for those that train: `_run_exclusively` sees to it between the two of them.
    limit = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW)
    with get_client(sync_client=True) as client:
        try:
            client.read_work_pool(POOL)
            client.update_work_pool(POOL, WorkPoolUpdate(base_job_template=_JOB_TEMPLATE))
        except ObjectNotFound:
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=_JOB_TEMPLATE))
        for entry in SCHEDULES:
            triggers = []
            if entry.event:
                match: dict[str, str | list[str]] = {"prefect.resource.id": RESOURCE}
                triggers = [DeploymentEventTrigger(name=entry.event, expect={entry.event}, match=match)]
            deployment = entry.flow.to_deployment(
                name="scheduled",
                schedule=CronSchedule(cron=entry.cron),
                triggers=triggers,
                concurrency_limit=limit,
                tags=[home_tag(Paths(root).home)],
                work_pool_name=POOL,
                entrypoint_type=EntrypointType.MODULE_PATH,
            )
            deployment.apply()
    return [
        {"deployment": f"{entry.flow.name}/scheduled", "cron": entry.cron, "event": entry.event} for entry in SCHEDULES
    ]


def _prune(root: Path) -> None:
    """Apply the retention policy after what made the stores grow; the work itself is done, whatever this fails at."""
    from flows.retention import prune

    with warn_on_failure("retention"):
        for removal in prune(Paths(root)):
            if removal.count:
                get_run_logger().info("pruned %s %s, %.1f MB", removal.count, removal.kind, removal.size / 1e6)


def _run_exclusively(name: str, body: Any) -> State[Any] | None:
    """Run a flow that trains and writes `data/`; skipped, not failed, while another such run goes on."""
    end_with_parent()
    root = find_root()
    if pid := lock_owner(Paths(root).home / "stages", "run"):
        return Cancelled(name="Skipped", message=f"process {pid} is training; the next schedule tries again")
    try:
        echo = get_run_logger().info
        while_unavailable(lambda: body(root, echo), echo)
        record_success(Paths(root).home, name)
        _prune(root)
    except Refused as error:
        record_success(Paths(root).home, name)  # a refusal is an outcome
        return Completed(name="Refused", message=str(error))
    except InputError as error:
        if str(error).startswith((f"{name}: already running", "run: already running")):
            return Cancelled(name="Skipped", message=str(error))
        raise
    return None
