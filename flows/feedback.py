"""Ingestion: what people said becomes data, exactly once, versioned like any other.

Each step can be cut off anywhere: what was recorded is not done again, what was not is new to the next run, and a
version that was left undone is caught up.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from components.config.params import InputError, Params, load_params
from components.config.paths import Paths
from components.datasets.formats import Row
from components.feedback.ingest import WITHDRAWN, IngestResult, revocations_are_written, write_revocations
from components.feedback.ingest import ingest as take_in
from components.feedback.store import Store, has_store
from components.runtime.process import file_lock
from components.tracking.event_log import warn_on_failure
from flows.orchestration.dvc_repo import version_data
from flows.orchestration.flow_run import Echo, FlowRun, effect, run_flow

ENOUGH = "loopwright.feedback.enough"
"""The event that asks for an improvement."""
RESOURCE = "loopwright.feedback"
_UNVERSIONED = "feedback.unversioned"
"""A file in the state folder: data/feedback has changed since DVC last saw it."""
_PATIENCE_SECONDS = 60.0
"""How long DVC's lock is waited for: a stage may just be saving its outs."""


@dataclass
class Report:
    """What an ingestion did."""

    partition: str | None = None
    """Null when nothing was new."""
    accepted: int = 0
    quarantined: dict[str, int] = field(default_factory=dict)
    """By reason."""
    fresh: int = 0
    """Votes left for the next ingestion."""
    waiting: int = 0
    """Accepted items that no model learned from yet."""
    forgotten: int = 0
    """Requests without feedback that were deleted for their age."""
    version: str | None = None
    """DVC's hash of data/feedback; null when it did not change."""
    flow_run: str | None = None
    """Prefect's id; null when nothing was to do."""
    seconds: float = 0.0


def ingest(root: Path, echo: Echo = print) -> Report:
    """Take in what people said since the last time.

    Raises: InputError while another ingestion goes on; StoreUnavailable; Refused by the suite `feedback`.
    """
    started = time.monotonic()
    paths, report = Paths(root), Report()
    if not has_store(paths.home):
        return report
    store = Store.of(paths.home)
    try:
        with file_lock(paths.home / "stages", "ingest"):
            job = _Job(paths, load_params(paths.params), store, echo, report)
            if job.is_needed():
                run_flow("ingest", paths.home, echo, job.run)
            job.forget()
        report.fresh, report.waiting = store.fresh(), store.waiting()
    finally:
        store.close()
    report.seconds = time.monotonic() - started
    return report


@dataclass
class _Job:
    paths: Paths
    params: Params
    store: Store
    echo: Echo
    report: Report

    def is_needed(self) -> bool:
        """Whether something is new, was withdrawn, or was left unversioned by a run that was killed."""
        unversioned = self._mark.exists() or bool(self.store.unversioned())
        return bool(self.store.fresh()) or unversioned or not revocations_are_written(self.store, self.paths.feedback)

    def run(self, run: FlowRun) -> None:
        """The flow run: take in, write down what was withdrawn, version, and ask for an improvement."""
        self.report.flow_run = run.id
        taken = effect(self.take)
        self.report.partition, self.report.accepted = taken.partition, taken.accepted
        self.report.quarantined = taken.quarantined
        self.report.version = effect(self.version)
        counts = {"accepted": taken.accepted, "quarantined": sum(taken.quarantined.values())}
        run.note({f"feedback.{name}": str(count) for name, count in counts.items()})
        with warn_on_failure("Prefect artifact feedback"):
            self._show(taken)
        waiting = self.store.waiting()
        if waiting >= self.params.feedback.improve_after:
            effect(_ask_to_improve, waiting)
            self.echo(f"ingest: {waiting} accepted items wait to be learned from")

    def take(self) -> IngestResult:
        """Write the next partition and its record."""
        return take_in(self.store, self.paths.feedback, self.params.feedback, self._gate)

    def version(self) -> str | None:
        """Write down what was withdrawn and put data/feedback under DVC as it is now; null when nothing changed."""
        commit_revocations(self.paths, self.store)
        names = self.store.unversioned()
        if not names and not self._mark.exists():
            return None
        version = _patiently(self.paths.root, self.paths.feedback)
        self.store.mark_versioned(names, version)
        self._mark.unlink(missing_ok=True)
        return version

    def forget(self) -> None:
        """Delete requests that nobody spoke about, when they are older than is allowed."""
        if self.params.feedback.keep_days is not None:
            self.report.forgotten = self.store.forget(self.params.feedback.keep_days)

    @property
    def _mark(self) -> Path:
        return _mark(self.paths)

    def _gate(self, rows: Sequence[Row]) -> Mapping[int, str]:
        from components.validation.validate import Validator

        return Validator(self.paths.expectations).failing(rows, "feedback")

    def _show(self, taken: IngestResult) -> None:
        """A table of what came of the votes, in Prefect."""
        from prefect.artifacts import create_table_artifact

        rows = [{"outcome": "accepted", "reason": "", "votes": taken.accepted}]
        rows += [{"outcome": "quarantined", "reason": why, "votes": n} for why, n in taken.quarantined.items()]
        create_table_artifact(table=rows, key="feedback", description=f"Partition {taken.partition or 'none'}")


def commit_revocations(paths: Paths, store: Store) -> None:
    """Bring `withdrawn.json` up to date; the next ingestion versions it if this one does not."""
    if not (paths.feedback / WITHDRAWN).is_file() or not revocations_are_written(store, paths.feedback):
        mark = _mark(paths)
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
        write_revocations(store, paths.feedback)


def _mark(paths: Paths) -> Path:
    return paths.home / "stages" / _UNVERSIONED


def _patiently(root: Path, folder: Path) -> str:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return version_data(root, folder)
        except InputError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1.0)


def _ask_to_improve(waiting: int) -> None:
    from prefect.events import emit_event

    emit_event(ENOUGH, resource={"prefect.resource.id": RESOURCE}, payload={"waiting": waiting})
