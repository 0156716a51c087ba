"""The flows of prefect.yaml: what a worker calls, with the parameters that "Custom run" on Prefect's page asks for.

Each joins the work itself to the flow run it is in, and ends in a state whose message says what came out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Cancelled, Completed
from pydantic import PositiveInt

from components.config.params import InputError
from components.config.paths import Paths, find_root
from components.feedback.store import record_success
from components.runtime.params_file import write_params
from components.runtime.process import end_with_parent, lock_owner
from components.tracking.event_log import warn_on_failure
from flows.feedback import ingest as run_ingestion
from flows.orchestration.flow_run import Echo, while_unavailable
from flows.orchestration.run_stage import is_refusal
from flows.pipeline import RunOptions, run_pipeline

NOT_SET_BY_A_RUN = ("project", "project_path", "serve")
"""Sections that name code or commands to run: who may start a flow run may not choose them."""

Scale = Literal["smoke", "laptop", "gpu", "cluster"]
Settings = dict[str, Any]


@flow(name="pipeline")
def pipeline(scale: Scale | None = None, settings: Settings | None = None, until: str | None = None) -> Any:
    """Bring every stage up to date, then release.

    Args:
        scale: Written to params.yaml; without a value, what it has.
        settings: Written to params.yaml, such as {"tune.learning_rate": 0.001}.
        until: Stop after this stage of dvc.yaml, without a release.
    """

    def body(root: Path, echo: Echo) -> str:
        write_params(Paths(root).params, overrides_of(scale, settings), echo)
        report = run_pipeline(RunOptions(root, until, echo=echo))
        ran = [stage.name for stage in report.stages if stage.outcome != "up to date"]
        champions = [f"{release.version} ({release.outcome})" for release in report.releases]
        return "; ".join([f"{len(ran)} of {len(report.stages)} stages ran", *champions])

    return _run_exclusively("" if until else "pipeline", body)


def overrides_of(scale: str | None, settings: Settings | None) -> Settings:
    """`section.key` → value of what a flow run writes into params.yaml.

    Raises: InputError for what names code or commands.
    """
    for name in settings or ():
        if name.partition(".")[0] in NOT_SET_BY_A_RUN:
            raise InputError(
                f"settings: {name}: names code or commands, which no flow run chooses; use"
                f' "loopwright run --set {name}=..."'
            )
    return ({"scale": scale} if scale else {}) | (settings or {})


@flow(name="ingest")
def ingest(limit: PositiveInt | None = None) -> Any:
    """Ingest user feedback.

    Args:
        limit: Most votes of this run; without a value, feedback.max_items.
    """
    end_with_parent()
    echo = get_run_logger().info
    report = while_unavailable(lambda: run_ingestion(find_root(), echo, limit), echo)
    while_unavailable(lambda: record_success(Paths(find_root()).home, "ingest"), echo)
    quarantined = sum(report.quarantined.values())
    counts = f"{report.accepted} accepted, {quarantined} quarantined, {report.waiting} wait to be trained on"
    return Completed(message=counts if report.partition else f"no new votes, {report.waiting} wait to be trained on")


@flow(name="improve")
def improve(force: bool = False, dry_run: bool = False) -> Any:
    """Train on user feedback once; skipped, not failed, while there is no champion.

    Args:
        force: Also without new feedback, and every stage from the start.
        dry_run: State what it would train on, and change nothing.
    """
    from flows.improve import NoChampion
    from flows.improve import improve as run_improvement

    def body(root: Path, echo: Echo) -> str:
        improvement = run_improvement(root, force, echo, dry_run)
        return f"{improvement.outcome}: {improvement.reason}; the champion is {improvement.champion}"

    try:
        return _run_exclusively("" if dry_run else "improve", body)
    except NoChampion as error:
        return Cancelled(name="Skipped", message=str(error))


@flow(name="monitor")
def monitor(days: PositiveInt = 1) -> Any:
    """Check prompts and votes for drift.

    Args:
        days: The last days, whose prompts and votes are compared with earlier ones.
    """
    end_with_parent()
    from flows.monitor import monitor as run_monitor

    echo = get_run_logger().info
    measures = while_unavailable(lambda: run_monitor(find_root(), echo, days), echo)
    while_unavailable(lambda: record_success(Paths(find_root()).home, "monitor"), echo)
    _prune(find_root())
    drifted = [measure.name for measure in measures if measure.drifted]
    if drifted:
        return Completed(name="Drifted", message=f"drifted: {', '.join(drifted)}")
    return Completed(message=f"{len(measures)} measures, none drifted")


@flow(name="notify")
async def notify(subject: str, body: str = "", block: str = "") -> Any:
    """Log what an automation reports, and send it by a notification block where one is named.

    Args:
        subject: What happened, in a few words.
        body: The reason.
        block: A notification block, such as slack-webhook/NAME; without a value, it is only logged.
    """
    end_with_parent()
    line = f"{subject}: {body}"
    get_run_logger().warning("%s", line)
    print(line, file=sys.stderr, flush=True)  # to the worker's log, beside Prefect's
    if not block:
        return Completed(name="Logged", message=line)
    import prefect.blocks.notifications  # noqa: F401 - the blocks that Prefect has
    from prefect.blocks.abstract import NotificationBlock

    loaded: Any = await NotificationBlock.aload(block)
    await loaded.notify(body, subject)
    return Completed(name="Sent", message=f"{line} (by {block})")


def _prune(root: Path) -> None:
    """Apply the retention policy after what made the stores grow; the work itself is done, whatever this fails at."""
    from flows.retention import prune

    with warn_on_failure("retention"):
        for removal in prune(Paths(root)):
            if removal.count:
                get_run_logger().info("pruned %s %s, %.1f MB", removal.count, removal.kind, removal.size / 1e6)


def _run_exclusively(name: str, body: Callable[[Path, Echo], str]) -> Any:
    """The state in which a flow that trains and writes `data/` ends; skipped while another such run goes on.

    `body` returns the state's message. `name` is recorded as a success, if it is one; empty: part of the work is none.
    """
    end_with_parent()
    root = find_root()
    home = Paths(root).home
    if pid := lock_owner(home / "stages", "run"):
        return Cancelled(name="Skipped", message=f"process {pid} is training; the next schedule tries again")
    try:
        echo = get_run_logger().info
        message = while_unavailable(lambda: body(root, echo), echo)
    except Exception as error:
        if str(error).startswith((f"{name}: already running", "run: already running")):
            return Cancelled(name="Skipped", message=str(error))
        if not is_refusal(error):
            raise
        state: State[Any] = Completed(name="Refused", message=str(error))  # a refusal is an outcome
    else:
        state = Completed(message=message)
        _prune(root)
    if name:
        while_unavailable(lambda: record_success(home, name), echo)
    return state
