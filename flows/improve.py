"""Continual learning once: curate what people said, train from the champion, judge, and promote or refuse.

Effects fetch the two models that the stages read and publish what they made; the stages in between are files to
files, so that an improvement that is killed anywhere goes on where it was when it is run again.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.config.params import InputError, Refused, load_params
from components.config.paths import Paths
from components.feedback.curate import FEEDBACK
from components.feedback.ingest import clear_orphans
from components.feedback.lineage import ancestry, feedback_ids
from components.feedback.store import Store
from components.runtime.process import file_lock
from components.runtime.stage import IMPROVEMENT, remove
from components.tracking.registry import ModelVersion, Registry, is_empty
from flows.feedback import commit_revocations
from flows.orchestration.flow_run import Echo, FlowRun, effect, run_flow
from flows.pipeline import Report, RunOptions, bring_up_to_date, look
from flows.release import (
    NAME,
    GateReport,
    Release,
    conclude,
    fetch_answers,
    keep_answers,
    publish,
    register,
)

_PATIENCE_SECONDS = 120.0
"""For an ingestion that goes on."""
SEQUENCE = "feedback_sequence"
"""Tag of a version: the last item that was there to learn from when it was trained."""


@dataclass(frozen=True)
class Improvement:
    """What came of it."""

    outcome: str
    """promoted, or nothing new; a refusal is raised."""
    champion: str
    """`NAME/VERSION` that answers now."""
    reason: str
    release: Release | None = None


def improve(root: Path, force: bool = False, echo: Echo = print) -> Improvement:
    """Learn from the feedback that no model has learned from yet; with `force`, also where there is none.

    Raises: InputError when there is no champion, or nothing can be learned; StageFailed; Refused by the gate.
    """
    paths = Paths(root)
    if is_empty(paths.home) or (champion := Registry(paths.home).find(f"{NAME}@champion")) is None:
        raise InputError(f'{NAME}@champion: there is no model to improve; run "loopwright run"')
    if not paths.collected.is_dir():
        raise InputError(f'{paths.collected}: not found; run "loopwright run" for the earlier data')
    store = Store.of(paths.home)
    try:
        with file_lock(paths.home / "stages", "run"):
            job = _Job(paths, Registry(paths.home), store, champion, echo, force)
            if (why := job.needless()) is not None:
                return Improvement("nothing new", str(champion), why)
            return run_flow("improve", paths.home, echo, job.run, champion=str(champion))
    finally:
        store.close()


@dataclass
class _Job:
    paths: Paths
    registry: Registry
    store: Store
    champion: ModelVersion
    echo: Echo
    force: bool

    def needless(self) -> str | None:
        """Why there is nothing to do; None when there is."""
        self._record_forgotten()
        if self.force or FEEDBACK not in load_params(self.paths.params).align.datasets:
            return None
        if self.store.waiting() or self._start().version != self.champion.version:
            return None
        return "no accepted feedback waits that no model has learned from"

    def run(self, run: FlowRun) -> Improvement:
        """The flow run: fetch, three stages, register, gate, publish."""
        sequence = self.store.last_accepted_sequence()
        start = self._start()
        effect(self.fetch, start)
        order = RunOptions(self.paths.root, force=self.force, echo=self.echo)
        bring_up_to_date(order, look(self.paths.root, self.force, pipeline=IMPROVEMENT), Report(), run)
        judged = json.loads((self.paths.metrics / "judge.json").read_text(encoding="utf-8"))
        about = {SEQUENCE: str(sequence), "parent": str(start), "feedback": self._partitions()}
        metrics = {"score": judged["score"]} | {f"{one['skill']}/score": one["candidate"] for one in judged["findings"]}
        version = effect(register, self.registry, self.paths, NAME, self.paths.candidate, metrics, about, run.id)
        self.echo(f"improve: {version} registered, trained from {start}")
        if version.version == self.champion.version:
            return self._done(sequence, version, "promoted", "it is the champion already", None)
        effect(keep_answers, self.registry, version, self.paths.judged)
        report = self.paths.judged / "report.md"
        page = report.read_text(encoding="utf-8") if report.is_file() else ""
        ruling = GateReport(judged["promote"], f"against {self.champion}: {judged['reason']}", page)
        try:
            told = effect(conclude, self.registry, version, ruling)
        except Refused as refusal:
            self.store.add_improvement(sequence, str(version), "refused", str(refusal))
            raise
        release = publish(self.registry, version, told, self.paths, self.echo)
        return self._done(sequence, version, "promoted", told, release)

    def fetch(self, start: ModelVersion) -> None:
        """Put the models that the stages read where they read them."""
        with file_lock(self.paths.home / "stages", "ingest", patience=_PATIENCE_SECONDS):
            clear_orphans(self.store, self.paths.feedback)
            commit_revocations(self.paths, self.store)
        mode = "gain" if start.version == self.champion.version else "replace"
        _place(self.champion, self.paths.champion, {"gate.json": {"mode": mode}})
        fetch_answers(self.registry, self.champion, self.paths.champion)
        _place(start, self.paths.start, {"origin.json": {"version": str(start)}})

    def _start(self) -> ModelVersion:
        """The champion; when it learned from what was withdrawn since, its nearest ancestor that did not."""
        gone = set(self.store.withdrawn())
        line = ancestry(self.registry, self.champion)
        tainted = [bool(gone.intersection(feedback_ids(one))) for one in line]
        clean = [number for number in range(len(line)) if not any(tainted[number:])]
        return line[clean[0]] if clean else line[-1]

    def _partitions(self) -> str:
        """Digest of each partition of feedback that was there, as a tag has room for it."""
        names = sorted(path.name for path in self.paths.feedback.glob("items-*.parquet"))
        return json.dumps({"partitions": len(names), "last": names[-1] if names else None})

    def _record_forgotten(self) -> None:
        """Write down an improvement whose process was killed after its verdict."""
        known = {row["candidate"] for row in self.store.improvements()}
        for version in self.registry.versions(NAME):
            decided = "gate" in version.tags and (version.tags["gate"] == "refused" or self._reigned(version))
            if SEQUENCE in version.tags and decided and str(version) not in known:
                outcome = "refused" if version.tags["gate"] == "refused" else "promoted"
                self.store.add_improvement(
                    int(version.tags[SEQUENCE]), str(version), outcome, version.tags["gate_reason"]
                )

    def _reigned(self, version: ModelVersion) -> bool:
        return bool({"champion", "previous"} & set(version.aliases))

    def _done(
        self, sequence: int, version: ModelVersion, outcome: str, reason: str, release: Release | None
    ) -> Improvement:
        self.store.add_improvement(sequence, str(version), outcome, reason)
        return Improvement(outcome, str(version), reason, release)


def _place(version: ModelVersion, folder: Path, notes: dict[str, Any]) -> None:
    """A model folder and notes in it, all of it or nothing."""
    temporary = folder.with_name(f".{folder.name}")
    remove(temporary)
    shutil.copytree(version.folder, temporary)
    for name, value in notes.items():
        (temporary / name).write_text(json.dumps(value) + "\n", encoding="utf-8")
    remove(folder)
    os.replace(temporary, folder)
