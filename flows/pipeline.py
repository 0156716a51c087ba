"""The pipeline: Prefect tasks built from dvc.yaml, one per stage, each brought up to date in turn.

DVC says in this process what is out of date and why; what runs, runs in a process of its own
(flows/orchestration/run_stage.py). The models' release follows (flows/release.py).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

from components.config.params import InputError, Refused, load_params
from components.config.paths import Paths
from components.runtime.process import file_lock, git
from components.runtime.stage import PROGRESS, warn_on_failure
from flows.orchestration.base_models import fetch_base_models
from flows.orchestration.dvc_repo import StageState, stage_states
from flows.orchestration.flow_run import FlowRun, run_flow
from flows.orchestration.run_stage import StageResult, reproduce
from flows.release import Release, Releases, look_at_releases, release

_SECONDS_BETWEEN_ARTIFACTS = 2.0
_LINE_WIDTH = 100


@dataclass
class Report:
    """What a run did."""

    stages: list[StageResult] = field(default_factory=list)
    releases: list[Release] = field(default_factory=list)
    """The champion of each model that the stages make; none when the run stopped at an earlier stage."""
    refusals: list[str] = field(default_factory=list)
    """What the gate said of the models that it refused."""
    flow_run: str | None = None
    """Prefect's id; None when nothing was to do."""
    seconds: float = 0.0


class ReleaseRefused(Refused):
    """The gate refused some of the models; the others were released."""

    def __init__(self, report: Report) -> None:
        super().__init__("; ".join(report.refusals))
        self.report = report


@dataclass(frozen=True)
class RunOptions:
    """What is asked of a run."""

    root: Path
    until: str | None = None
    """Stop after this stage, without a release."""
    force: bool = False
    """Run every stage, although up to date, and without earlier checkpoints."""
    echo: Callable[[str], None] = print
    """Told each line for the terminal."""

    @property
    def paths(self) -> Paths:
        return Paths(self.root)


def run_pipeline(order: RunOptions) -> Report:
    """Bring every stage up to date as one Prefect flow run, then release the models.

    Raises: InputError, StageFailed, ReleaseRefused.
    """
    report, started = Report(), time.monotonic()
    try:
        git(order.root, "rev-parse", "HEAD")
    except InputError as error:
        order.echo(str(error))
    try:
        with file_lock(order.paths.home / "stages", "run"):
            fetch_base_models(order.paths, order.echo)
            states = stage_states(order.root, order.force, order.until)
            if any(state.is_due for state in states) or not _all_released(order, report):
                _run_as_flow(order, states, report)
            else:
                report.stages = [StageResult(state.name, "up to date", 0.0) for state in states]
                _end(report)
    finally:
        report.seconds = time.monotonic() - started
    return report


def _run_as_flow(order: RunOptions, states: list[StageState], report: Report) -> None:
    scale = load_params(order.paths.params).scale
    body = partial(_bring_and_release, order, states, report)
    run_flow("pipeline", order.paths.home, order.echo, body, scale=scale, until=order.until, force=order.force)


def _end(report: Report) -> None:
    """Raises: ReleaseRefused where a model was refused."""
    if report.refusals:
        raise ReleaseRefused(report)


def _all_released(order: RunOptions, report: Report) -> bool:
    """Whether no model waits for its release; the report then says what became of them."""
    found = Releases() if order.until else look_at_releases(order.paths)
    if not found.pending:
        report.releases, report.refusals = found.champions, found.refusals
    return not found.pending


def _bring_and_release(order: RunOptions, states: list[StageState], report: Report, run: FlowRun) -> None:
    bring_up_to_date(order, states, report, run)
    if order.until is None:
        found = release(order.paths, order.echo, run.id)
        report.releases, report.refusals = found.champions, found.refusals
        _end(report)


def bring_up_to_date(order: RunOptions, states: list[StageState], report: Report, run: FlowRun) -> None:
    """Inside a flow run: the stages one after another; the first that fails ends it with its own message."""
    from prefect.artifacts import create_table_artifact

    report.flow_run = run.id
    ended: dict[str, Any] = {}
    try:
        for state in states:
            stage = _stage_task(order, state, report)
            waited = [ended[name] for name in state.needs if name in ended]
            ended[state.name] = stage(return_state=True, wait_for=waited)
            if not ended[state.name].is_completed():
                raise ended[state.name].result(raise_on_failure=False)
            run.note({f"stage.{state.name}": report.stages[-1].outcome})
    finally:
        rows = [{"stage": row.name, "outcome": row.outcome, "seconds": round(row.seconds, 1)} for row in report.stages]
        with warn_on_failure("Prefect artifact stages"):
            create_table_artifact(table=rows, key="stages", description="How each stage came to be up to date")


def _stage_task(order: RunOptions, state: StageState, report: Report) -> Any:
    """The Prefect task of one stage, under the stage's name."""
    from prefect import task
    from prefect.cache_policies import NO_CACHE
    from prefect.states import Completed

    def bring_up_to_date() -> Any:
        result = StageResult(state.name, "up to date", 0.0)
        if state.is_due:
            order.echo(f"{state.name}: {state.describe(_LINE_WIDTH - len(state.name))}")
            result = reproduce(state.name, order.root, order.force, _StageOutput(state.name, order.echo))
        report.stages.append(result)
        order.echo(f"{state.name}: {result.outcome} ({result.seconds:.1f} s)")
        return Completed(name=result.outcome.capitalize(), message=f"{result.outcome} in {result.seconds:.1f} s")

    return task(name=state.name, task_run_name=state.name, cache_policy=NO_CACHE)(bring_up_to_date)


class _StageOutput:
    """Hears what a stage says: the terminal and Prefect's log get each line, a progress artifact the counts."""

    def __init__(self, stage: str, echo: Callable[[str], None]) -> None:
        from prefect import get_run_logger
        from prefect.artifacts import create_progress_artifact

        self._echo = echo
        self._log = get_run_logger()
        self._artifact: UUID | None = None
        with warn_on_failure(f"Prefect artifact of {stage}"):
            made = create_progress_artifact(0.0, key=f"{re.sub('[_@]', '-', stage)}-progress", description=stage)
            assert isinstance(made, UUID)
            self._artifact = made
        self._next_update = 0.0

    def __call__(self, line: str) -> None:
        self._echo(line)
        self._log.info("%s", line)
        said = PROGRESS.fullmatch(line)
        if said and (time.monotonic() >= self._next_update or said["done"] == said["total"]):
            self._update(100 * int(said["done"]) / max(1, int(said["total"])), said["facts"] or "")
            self._next_update = time.monotonic() + _SECONDS_BETWEEN_ARTIFACTS

    def _update(self, percent: float, facts: str) -> None:
        from prefect.artifacts import update_progress_artifact

        if self._artifact is not None:
            with warn_on_failure("Prefect progress artifact"):
                update_progress_artifact(self._artifact, progress=percent, description=facts)
