"""Ingestion: user feedback becomes versioned data, exactly once.

Each step may be killed anywhere: what is recorded is not done again, the rest is new to the next run, and a missing
version is made then.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from components.config.params import InputError, Params, load_params
from components.config.paths import REVOKED, Paths
from components.datasets.formats import Row
from components.feedback.assessments import exchange
from components.feedback.ingest import (
    IngestResult,
    erase_items,
    rebuild_partition,
    remove_orphans,
    revocations_are_written,
    stale_partitions,
    write_revocations,
)
from components.feedback.ingest import ingest as ingest_partition
from components.feedback.leases import Lease, leased
from components.feedback.store import Store, has_store
from components.runtime.process import file_lock
from components.tracking.event_log import warn_on_failure
from flows.orchestration.dvc_remote import push_to_remote
from flows.orchestration.dvc_repo import fetch_version, push_folder, version_data
from flows.orchestration.flow_run import Echo, FlowRun, effect, run_flow

ENOUGH = "loopwright.feedback.enough"
"""The event that triggers an improvement."""
RESOURCE = "loopwright.feedback"
_UNVERSIONED = "feedback.unversioned"
"""A file in the state folder that marks changes of data/feedback since its last version in DVC."""
_PATIENCE_SECONDS = 60.0
"""Longest wait for DVC's lock, which a stage holds while it saves its outs."""


@dataclass
class IngestReport:
    """The outcome of an ingestion."""

    partition: str | None = None
    """Null without new votes."""
    accepted: int = 0
    quarantined: dict[str, int] = field(default_factory=dict)
    """By reason."""
    fresh: int = 0
    """Votes left for the next ingestion."""
    waiting: int = 0
    """Accepted items that no model is trained on yet."""
    forgotten: int = 0
    """Requests without feedback that were deleted for their age."""
    entered: int = 0
    """Corrections that people entered in MLflow since the last ingestion."""
    version: str | None = None
    """DVC's hash of data/feedback; null when it did not change."""
    flow_run: str | None = None
    """Prefect's id; null when there was nothing to do."""
    seconds: float = 0.0


def ingest(root: Path, echo: Echo = print, limit: int | None = None) -> IngestReport:
    """Ingest the feedback since the last ingestion, at most `limit` votes.

    Raises: InputError while another ingestion goes on; StoreUnavailable; Refused by the suite `feedback`.
    """
    started = time.monotonic()
    paths, report = Paths(root), IngestReport()
    if not has_store(paths.home):
        return report
    overrides = {"feedback.max_items": limit} if limit else {}
    store = Store.of(paths.home)
    try:
        with file_lock(paths.home / "stages", "ingest"), leased(store, "ingest") as lease:
            fetch_partitions(paths, store, echo)
            job = _Job(paths, load_params(paths.params, overrides), store, echo, report, lease)
            job.exchange_assessments()
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
    report: IngestReport
    lease: Lease

    def exchange_assessments(self) -> None:
        """Show votes as assessments of MLflow's traces; corrections that were entered there become votes."""
        if self.params.serve.traces == "mlflow":
            with warn_on_failure("MLflow assessments"):
                self.report.entered = exchange(self.store, self.paths.home)

    def is_needed(self) -> bool:
        """Whether there are new votes, new revocations, or changes that a killed run left unversioned."""
        unversioned = _mark(self.paths).exists() or bool(self.store.unversioned())
        return bool(self.store.fresh()) or unversioned or not revocations_are_written(self.store, self.paths.feedback)

    def run(self, run: FlowRun) -> None:
        """The flow run: ingest, write revocations, version, and trigger an improvement."""
        self.report.flow_run = run.id
        result = effect(self.ingest)
        self.report.partition, self.report.accepted = result.partition, result.accepted
        self.report.quarantined = result.quarantined
        self.report.version = effect(self.version)
        if self.report.version:
            push_to_remote(self.paths.root, self.echo)
        counts = {"accepted": result.accepted, "quarantined": sum(result.quarantined.values())}
        run.note({f"feedback.{name}": str(count) for name, count in counts.items()})
        with warn_on_failure("Prefect artifact feedback"):
            self._show(result)
        waiting = self.store.waiting()
        if waiting >= self.params.feedback.improve_after:
            effect(_trigger_improvement, waiting)
            self.echo(f"ingest: {waiting} accepted items wait to be trained on")

    def ingest(self) -> IngestResult:
        """Write the next partition and its record."""
        return ingest_partition(self.store, self.paths.feedback, self.params.feedback, self._gate)

    def version(self) -> str | None:
        """Write revocations, erase items, put data/feedback under DVC as it is now; null when nothing changed."""
        commit_revocations(self.paths, self.store)
        erase_items(self.store, self.paths.feedback)
        names = self.store.unversioned()
        if not names and not _mark(self.paths).exists():
            return None
        version = _version_when_unlocked(self.paths.root, self.paths.feedback)
        if self.store.is_shared:
            push_folder(self.paths.root, self.paths.feedback)
        self.lease.check()  # a push may take long
        self.store.mark_versioned(names, version)
        _mark(self.paths).unlink(missing_ok=True)
        return version

    def forget(self) -> None:
        """Delete requests without feedback that are older than `keep.request_days`."""
        if self.params.keep.request_days is not None:
            self.report.forgotten = self.store.forget(self.params.keep.request_days)

    def _gate(self, rows: Sequence[Row]) -> Mapping[int, str]:
        from components.validation.validate import Validator

        return Validator(self.paths.expectations).failing(rows, "feedback")

    def _show(self, result: IngestResult) -> None:
        """Create a table of the votes' outcomes in Prefect."""
        from prefect.artifacts import create_table_artifact

        rows = [{"outcome": "accepted", "reason": "", "votes": result.accepted}]
        rows += [{"outcome": "quarantined", "reason": why, "votes": n} for why, n in result.quarantined.items()]
        create_table_artifact(table=rows, key="feedback", description=f"Partition {result.partition or 'none'}")


def fetch_partitions(paths: Paths, store: Store, echo: Echo) -> None:
    """Make the partitions on this disk, which may be empty, those that are recorded; the caller holds `ingest`.

    What other hosts wrote, or wrote anew without erased items, comes from DVC's remote. What the remote lacks, as of a
    host that was lost before it sent it, is made from the database.

    Raises: InputError when the folder belongs to another store, or DVC's remote does not answer.
    """
    remove_orphans(store, paths.feedback)
    tried: set[str | None] = {None}
    while store.is_shared and (stale := stale_partitions(store, paths.feedback)):
        version = next((row["dvc"] for row in reversed(stale) if row["dvc"] not in tried), None)
        if version is None:
            for row in stale:
                echo(f"{row['name']}: DVC's remote lacks it; it is made anew from the database")
                rebuild_partition(store, paths.feedback, row["name"])
            return
        tried.add(version)
        fetch_version(paths.root, paths.feedback, version)
        remove_orphans(store, paths.feedback)


def commit_revocations(paths: Paths, store: Store) -> None:
    """Write revocations to `withdrawn.json`; the next ingestion versions the file if this run does not."""
    if not (paths.feedback / REVOKED).is_file() or not revocations_are_written(store, paths.feedback):
        mark = _mark(paths)
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
        write_revocations(store, paths.feedback)


def _mark(paths: Paths) -> Path:
    return paths.home / "stages" / _UNVERSIONED


def _version_when_unlocked(root: Path, folder: Path) -> str:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return version_data(root, folder)
        except InputError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1.0)


def _trigger_improvement(waiting: int) -> None:
    from prefect.events import emit_event

    emit_event(ENOUGH, resource={"prefect.resource.id": RESOURCE}, payload={"waiting": waiting})
