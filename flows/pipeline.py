"""The pipeline: Prefect tasks built from dvc.yaml, one per stage, each brought up to date in turn.

DVC decides in this process which stages are out of date (flows/orchestration/dvc_repo.py); each runs in a process of
its own (run_stage.py there), unless DVC's remote has its result of another host (dvc_remote.py there). The release of
the models follows (flows/release.py).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

from components.config.params import InputError, Refused, load_params
from components.config.paths import Paths
from components.feedback.store import leased_in
from components.runtime.process import file_lock, git
from components.runtime.stage import PROGRESS
from components.tracking.event_log import warn_on_failure
from flows.orchestration.base_models import fetch_base_models
from flows.orchestration.dvc_remote import RemoteResults, push_pending, push_to_remote
from flows.orchestration.dvc_repo import StageState, stage_states
from flows.orchestration.flow_run import FlowRun, run_flow
from flows.orchestration.run_stage import StageResult, reproduce, stage_target
from flows.release import Release, Releases, release, release_states

_SECONDS_BETWEEN_ARTIFACTS = 2.0
_LINE_WIDTH = 100


@dataclass
class RunReport:
    """The outcome of a run."""

    stages: list[StageResult] = field(default_factory=list)
    releases: list[Release] = field(default_factory=list)
    """The champion of each model that the stages train; none with `--until`."""
    refusals: list[str] = field(default_factory=list)
    """The gate's reasons for the models that it refused."""
    flow_run: str | None = None
    """Prefect's id; None when there was nothing to do."""
    seconds: float = 0.0


class ReleaseRefused(Refused):
    """The gate refused some of the models; the others were released."""

    def __init__(self, report: RunReport) -> None:
        super().__init__("; ".join(report.refusals))
        self.report = report


@dataclass(frozen=True)
class RunOptions:
    """Options of a run."""

    root: Path
    until: str | None = None
    """Stop after this stage, without a release."""
    force: bool = False
    """Run every stage, although up to date, and without earlier checkpoints."""
    echo: Callable[[str], None] = print
    """Called with each line for the terminal."""

    @property
    def paths(self) -> Paths:
        return Paths(self.root)


def run_pipeline(options: RunOptions) -> RunReport:
    """Bring every stage up to date as one Prefect flow run, then release the models.

    Raises: InputError, also while a host that shares the database runs it; StageFailed, ReleaseRefused.
    """
    from components.datasets.importers import undo_killed

    report, started = RunReport(), time.monotonic()
    try:
        git(options.root, "rev-parse", "HEAD")
    except InputError as error:
        options.echo(str(error))
    try:
        home = options.paths.home
        with file_lock(home / "stages", "run"), leased_in(home, "run", ends_process=True):
            undo_killed(options.paths.added, home / "stages")
            fetch_base_models(options.paths, options.echo)
            states = stage_states(options.root, options.force, options.until)
            if any(state.is_due for state in states) or not _all_released(options, report):
                scale, body = (
                    load_params(options.paths.params).scale,
                    partial(_update_and_release, options, states, report),
                )
                parameters = {"scale": scale, "until": options.until, "force": options.force}
                run_flow("pipeline", home, options.echo, body, **parameters)
            else:
                report.stages = [StageResult(state.name, "up to date", 0.0) for state in states]
                push_pending(options.root, options.echo)
                _end(report)
    finally:
        report.seconds = time.monotonic() - started
    return report


def _end(report: RunReport) -> None:
    """Raises: ReleaseRefused where a model was refused."""
    if report.refusals:
        raise ReleaseRefused(report)


def _all_released(options: RunOptions, report: RunReport) -> bool:
    """Whether no model waits for its release; the report then names their champions and refusals."""
    releases = Releases() if options.until else release_states(options.paths)
    if not releases.pending:
        report.releases, report.refusals = releases.champions, releases.refusals
    return not releases.pending


def _update_and_release(options: RunOptions, states: list[StageState], report: RunReport, run: FlowRun) -> None:
    bring_up_to_date(options, states, report, run)
    if options.until is None:
        releases = release(options.paths, options.echo, run.id)
        report.releases, report.refusals = releases.champions, releases.refusals
        with warn_on_failure("Prefect artifact release"):
            _show_releases(report)
        push_to_remote(options.root, options.echo)
        _end(report)


def _show_releases(report: RunReport) -> None:
    """Create a table of the models' releases in Prefect."""
    from prefect.artifacts import create_table_artifact

    rows = [
        {"champion": release.version, "outcome": release.outcome, "score": release.score, "bento": release.bento}
        for release in report.releases
    ]
    rows += [{"champion": "", "outcome": refusal, "score": None, "bento": ""} for refusal in report.refusals]
    create_table_artifact(table=rows, key="release", description="Outcome of each model's release")


def bring_up_to_date(options: RunOptions, states: list[StageState], report: RunReport, run: FlowRun) -> None:
    """Inside a flow run: the stages one after another; the first that fails ends it with its own message."""
    from prefect.artifacts import create_table_artifact

    report.flow_run = run.id
    ended: dict[str, Any] = {}
    results = RemoteResults(options.root, options.echo)
    try:
        for state in states:
            stage = _stage_task(options, state, report, results)
            upstream = [ended[name] for name in state.needs if name in ended]
            ended[state.name] = stage(return_state=True, wait_for=upstream)
            if not ended[state.name].is_completed():
                raise ended[state.name].result(raise_on_failure=False)
            run.note({f"stage.{state.name}": report.stages[-1].outcome})
    finally:
        rows = [{"stage": row.name, "outcome": row.outcome, "seconds": round(row.seconds, 1)} for row in report.stages]
        with warn_on_failure("Prefect artifact stages"):
            create_table_artifact(table=rows, key="stages", description="Outcome of each stage")


def _stage_task(options: RunOptions, state: StageState, report: RunReport, results: RemoteResults) -> Any:
    """The Prefect task of one stage, under the stage's name."""
    from prefect import task
    from prefect.cache_policies import NO_CACHE
    from prefect.states import Completed

    def bring_up_to_date() -> Any:
        result = StageResult(state.name, "up to date", 0.0)
        if state.is_due:
            options.echo(f"{state.name}: {state.describe(_LINE_WIDTH - len(state.name))}")
            result = _update(state.name, options, results)
        report.stages.append(result)
        options.echo(f"{state.name}: {result.outcome} ({result.seconds:.1f} s)")
        return Completed(name=result.outcome.capitalize(), message=f"{result.outcome} in {result.seconds:.1f} s")

    return task(name=state.name, task_run_name=state.name, cache_policy=NO_CACHE)(bring_up_to_date)


def _update(name: str, options: RunOptions, results: RemoteResults) -> StageResult:
    """Bring a stage up to date: by its result in DVC's remote, or by running it, and then its result is pushed."""
    target, started = stage_target(options.root, name), time.monotonic()
    is_fetched = not options.force and results.fetch(target)
    result = reproduce(name, options.root, options.force, _StageOutput(name, options.echo))
    if result.outcome == "ran":
        results.push(target)
    elif is_fetched:
        result = replace(result, outcome="restored from remote", seconds=time.monotonic() - started)
    return result


class _StageOutput:
    """Receives a stage's output: the terminal and Prefect's log get each line, a progress artifact the counts."""

    def __init__(self, stage: str, echo: Callable[[str], None]) -> None:
        from prefect import get_run_logger
        from prefect.artifacts import create_progress_artifact

        self._echo = echo
        self._log = get_run_logger()
        self._artifact: UUID | None = None
        with warn_on_failure(f"Prefect artifact of {stage}"):
            artifact = create_progress_artifact(0.0, key=f"{re.sub('[_@]', '-', stage)}-progress", description=stage)
            assert isinstance(artifact, UUID)
            self._artifact = artifact
        self._next_update = 0.0

    def __call__(self, line: str) -> None:
        self._echo(line)
        self._log.info("%s", line)
        progress = PROGRESS.fullmatch(line)
        if self._artifact is None or progress is None:
            return
        if time.monotonic() >= self._next_update or progress["done"] == progress["total"]:
            from prefect.artifacts import update_progress_artifact

            percent = 100 * int(progress["done"]) / max(1, int(progress["total"]))
            with warn_on_failure("Prefect progress artifact"):
                update_progress_artifact(self._artifact, progress=percent, description=progress["figures"] or "")
            self._next_update = time.monotonic() + _SECONDS_BETWEEN_ARTIFACTS
