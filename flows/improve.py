"""Continual learning once: curate user feedback, train from the champion, compare, and promote or refuse.

Effects fetch the models that the stages read and publish the candidate; the stages in between turn files into files,
so that a killed improvement resumes when it is run again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from components.config.params import InputError, Refused, load_params
from components.config.paths import GATE_MODE, ORIGIN, Paths
from components.feedback.curate import FEEDBACK
from components.feedback.items import partitions
from components.feedback.leases import Lease, leased
from components.feedback.lineage import ancestry, feedback_ids
from components.feedback.store import Store, is_shared, leased_in, shared_registry
from components.runtime.files import copy_folder
from components.runtime.process import file_lock
from components.runtime.stage import IMPROVEMENT
from components.tracking.event_log import warn_on_failure
from components.tracking.registry import ModelVersion, Registry, is_empty
from flows.feedback import commit_revocations, fetch_partitions
from flows.orchestration.dvc_remote import push_to_remote
from flows.orchestration.dvc_repo import fetch_missing, stage_states
from flows.orchestration.flow_run import Echo, FlowRun, effect, run_flow, while_unavailable
from flows.pipeline import RunOptions, RunReport, bring_up_to_date
from flows.release import (
    NAME,
    RELEASE_SECONDS,
    GateReport,
    Release,
    apply_gate,
    fetch_answers,
    publish,
    register,
    store_answers,
)

_PATIENCE_SECONDS = 120.0
"""Longest wait for a running ingestion."""
SEQUENCE = "feedback_sequence"
"""Tag of a version: sequence number of the last accepted feedback item when it was trained."""


class NoChampion(InputError):
    """There is no model to improve."""

    def __init__(self) -> None:
        super().__init__(f'{NAME}@champion: there is no champion to improve; run "loopwright run"')


@dataclass(frozen=True)
class Improvement:
    """The outcome of an improvement."""

    outcome: str
    """promoted, nothing new, or would train (of a dry run); a refusal is raised."""
    champion: str
    """`NAME/VERSION` of the champion after it."""
    reason: str
    release: Release | None = None


def improve(root: Path, force: bool = False, echo: Echo = print, dry_run: bool = False) -> Improvement:
    """Train on the feedback that no model is trained on yet; with `force`, also where there is none.

    With `dry_run`, only the outcome that it would begin with is returned, and nothing is changed.

    Raises: NoChampion; InputError without earlier data; StageFailed; Refused by the gate.
    """
    paths = Paths(root)
    if is_empty(paths.home):
        raise NoChampion
    registry = shared_registry(paths.home)
    champion = _champion(registry)
    if is_shared(paths.home) and not dry_run:  # on a host of its own, what is missing was removed
        fetch_missing(root, IMPROVEMENT, paths.collected)
    if not paths.collected.is_dir():
        raise InputError(f'{paths.collected}: not found; run "loopwright run" for the earlier data')
    store = Store.of(paths.home)
    try:
        if dry_run:
            return _Job(paths, registry, store, champion, echo, force, Lease(store, "improve")).plan()
        with file_lock(paths.home / "stages", "run"), leased(store, "improve") as lease:
            job = _Job(paths, registry, store, _champion(registry), echo, force, lease)
            job.record_interrupted()
            if (reason := job.skip_reason()) is not None:
                return Improvement("nothing new", str(job.champion), reason)
            return run_flow("improve", paths.home, echo, job.run, champion=str(job.champion))
    finally:
        store.close()


def _champion(registry: Registry) -> ModelVersion:
    if (champion := registry.find(f"{NAME}@champion")) is None:
        raise NoChampion
    return champion


@dataclass
class _Job:
    paths: Paths
    registry: Registry
    store: Store
    champion: ModelVersion
    echo: Echo
    force: bool
    lease: Lease

    def skip_reason(self) -> str | None:
        """Why there is nothing to do; None where there is something."""
        if self.force or FEEDBACK not in load_params(self.paths.params).align.datasets:
            return None
        if self.store.waiting() or self._start().version != self.champion.version:
            return None
        return "no accepted feedback waits to be trained on"

    def plan(self) -> Improvement:
        """What `run` would begin with."""
        if (reason := self.skip_reason()) is not None:
            return Improvement("nothing new", str(self.champion), reason)
        items = f"{self.store.waiting()} accepted items of feedback wait"
        return Improvement("would train", str(self.champion), f"{items}, and training starts from {self._start()}")

    def run(self, run: FlowRun) -> Improvement:
        """The flow run: fetch, three stages, register, gate, publish."""
        sequence = self.store.last_accepted_sequence()
        start = self._start()
        effect(self.fetch, start)
        options = RunOptions(self.paths.root, force=self.force, echo=self.echo)
        states = stage_states(self.paths.root, self.force, pipeline=IMPROVEMENT)
        bring_up_to_date(options, states, RunReport(), run)
        with leased_in(self.paths.home, "release", RELEASE_SECONDS):
            return while_unavailable(partial(self._release, run, sequence, start), self.echo)

    def _release(self, run: FlowRun, sequence: int, start: ModelVersion) -> Improvement:
        judged = json.loads((self.paths.metrics / "judge.json").read_text(encoding="utf-8"))
        names = [path.name for path in partitions(self.paths.feedback)]
        feedback = json.dumps({"partitions": len(names), "last": names[-1] if names else None})
        about = {SEQUENCE: str(sequence), "parent": str(start), "feedback": feedback}
        metrics = {"score": judged["score"]} | {
            f"{suite['skill']}/score": suite["candidate"] for suite in judged["findings"]
        }
        version = effect(register, self.registry, self.paths, NAME, self.paths.candidate, metrics, about, run.id)
        self.echo(f"improve: {version} registered, trained from {start}")
        if version.version == self.champion.version:
            return self._done(sequence, version, "promoted", "it is the champion already", None)
        effect(store_answers, self.registry, version, self.paths.judged)
        report = self.paths.judged / "report.md"
        page = report.read_text(encoding="utf-8") if report.is_file() else ""
        with warn_on_failure("Prefect artifact gate"):
            _show_decision(f"{version}: {judged['reason']}\n\n{page}")
        decision = f"against {self.champion}: {judged['reason']}"
        gate_report = GateReport(judged["promote"], decision, page, str(self.champion), judged["findings"])
        try:
            reason = effect(apply_gate, self.registry, version, gate_report)
        except Refused as refusal:
            self.store.add_improvement(sequence, str(version), "refused", str(refusal))
            raise
        self.lease.check()
        release = publish(self.registry, version, reason, self.paths, self.echo, gate_report.champion)
        push_to_remote(self.paths.root, self.echo)
        return self._done(sequence, version, "promoted", reason, release)

    def fetch(self, start: ModelVersion) -> None:
        """Copy the champion and the start model to the folders that the stages read."""
        with (
            file_lock(self.paths.home / "stages", "ingest", patience=_PATIENCE_SECONDS),
            leased(self.store, "ingest", patience=_PATIENCE_SECONDS),
        ):
            fetch_partitions(self.paths, self.store, self.echo)
            commit_revocations(self.paths, self.store)
        mode = "gain" if start.version == self.champion.version else "replace"
        copy_folder(self.champion.folder, self.paths.champion, {GATE_MODE: {"mode": mode}})
        fetch_answers(self.registry, self.champion, self.paths.champion)
        copy_folder(start.folder, self.paths.start, {ORIGIN: {"version": str(start)}})

    def _start(self) -> ModelVersion:
        """The champion; where it was trained on items that were revoked since, its nearest ancestor that was not.

        Raises: InputError when each ancestor was trained on some.
        """
        revoked = set(self.store.withdrawn())
        generations = ancestry(self.registry, self.champion)
        tainted = [bool(revoked.intersection(feedback_ids(version))) for version in generations]
        # What an ancestor was trained on is in its descendants' weights too.
        for number, version in enumerate(generations):
            if not any(tainted[number:]):
                return version
        raise InputError(
            f"{self.champion}: each of its ancestors was trained on revoked feedback; train a model without it by"
            ' "loopwright run"'
        )

    def record_interrupted(self) -> None:
        """Record an improvement whose process was killed after the gate's decision."""
        recorded = {row["candidate"] for row in self.store.improvements()}
        for version in self.registry.versions(NAME):
            gate, was_champion = version.tags.get("gate"), bool({"champion", "previous"} & set(version.aliases))
            decided = gate == "refused" or (gate is not None and was_champion)
            if SEQUENCE in version.tags and decided and str(version) not in recorded:
                outcome = "refused" if gate == "refused" else "promoted"
                self.store.add_improvement(
                    int(version.tags[SEQUENCE]), str(version), outcome, version.tags["gate_reason"]
                )

    def _done(
        self, sequence: int, version: ModelVersion, outcome: str, reason: str, release: Release | None
    ) -> Improvement:
        self.store.add_improvement(sequence, str(version), outcome, reason)
        return Improvement(outcome, str(version), reason, release)


def _show_decision(page: str) -> None:
    """Create a page of the gate's decision in Prefect."""
    from prefect.artifacts import create_markdown_artifact

    create_markdown_artifact(page, key="gate", description="Candidate and champion on the same held-out questions")
