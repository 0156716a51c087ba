"""From a trained model folder to the champion: register, gate, package, smoke-test, promote.

A model becomes champion only after its Bento has answered over HTTP; without a significant gain over the champion on
the same held-out questions it stays a challenger. Models are released one after another; refusing one does not stop
the others.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.config.params import InputError, Refused
from components.config.paths import Paths
from components.feedback.store import leased_in, shared_registry
from components.tracking.event_log import PARENT_RUN, warn_on_failure
from components.tracking.model_card import compute
from components.tracking.registry import ModelVersion, Registry, is_empty
from components.tracking.version_files import fetch_file, store_file, store_text
from flows.bento import has_bento, package, smoke
from flows.model_cards import write_card
from flows.orchestration.flow_run import Echo, effect, while_unavailable
from flows.release_targets import RELEASE_TARGETS, ModelUnderRelease, ReleaseTarget, release_target, smoke_question
from flows.version_lineage import commit_tags, outs, version_lineage

if TYPE_CHECKING:
    from components.evaluation.gate import GateDecision

NAME = "agent"
"""The model that users chat with and whose feedback it is trained on."""
RELEASE_SECONDS = 1800.0
"""Longest wait for a release on another host."""


@dataclass(frozen=True)
class Release:
    """The champion after a run, and how it came to be."""

    version: str
    """`NAME/VERSION` of the champion."""
    outcome: str
    score: float
    scores: dict[str, float] = field(default_factory=dict)
    """Score of each held-out suite; a classifier's is its macro-F1, a summarizer's its ROUGE-L."""
    baselines: dict[str, float] = field(default_factory=dict)
    """Score of a simple model that was trained on the same data, where there is one."""
    bento: str = ""
    question: str = ""
    answer: str = ""
    """What the served Bento answered to `question`."""


@dataclass
class Releases:
    """The outcome for each model that the stages trained."""

    champions: list[Release] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    """The gate's reasons for the models that it refused."""
    pending: list[str] = field(default_factory=list)
    """Names of the models that need a release."""


def release_states(paths: Paths) -> Releases:
    """Which of the models on disk are released or refused already, and which need a release."""
    releases = Releases()
    for target in trained_targets(paths):
        try:
            release = current_release(paths, target.name)
        except Refused as refusal:
            releases.refusals.append(str(refusal))
            continue
        if release:
            releases.champions.append(release)
        else:
            releases.pending.append(target.name)
    return releases


def trained_targets(paths: Paths) -> list[ReleaseTarget]:
    """The release targets that the stages have trained."""
    locked = outs(paths)
    return [target for target in RELEASE_TARGETS if target.out(paths) in locked]


def current_release(paths: Paths, name: str = NAME) -> Release | None:
    """The champion, when the model on disk needs no release; None when it does.

    Raises: Refused when the gate refused this very model against the same champion.
    """
    digest = outs(paths).get(release_target(name).out(paths))
    if digest is None or is_empty(paths.home):
        return None
    registry = Registry(paths.home)
    champion = registry.find(f"{name}@champion")
    version = find_digest(registry, name, digest)
    if champion is None or version is None:
        return None
    if version.version == champion.version:
        return _released(champion, "up to date") if has_bento(paths.home, champion.tags.get("bento", "")) else None
    if version.tags.get("rolled_back") == "true":
        return _released(champion, f"{version} was rolled back, {champion} stays")
    if str(version) in ancestors(registry, champion):
        return _released(champion, f"{champion} was trained on feedback since {version}")
    if version.tags.get("gate") == "refused" and version.tags.get("gate_against") == str(champion):
        raise Refused(version.tags["gate_reason"])
    return None


def release(paths: Paths, echo: Echo, flow_run: str) -> Releases:
    """Release what the stages trained, each effect a task of the flow run; a refusal does not stop the other models."""
    releases = Releases()
    for target in trained_targets(paths):
        try:
            with leased_in(paths.home, "release", RELEASE_SECONDS):
                released = while_unavailable(partial(_release_target, target, paths, echo, flow_run), echo)
                releases.champions.append(released)
        except Refused as refusal:
            echo(f"release: {refusal}")
            releases.refusals.append(str(refusal))
    return releases


def _release_target(target: ReleaseTarget, paths: Paths, echo: Echo, flow_run: str) -> Release:
    """Raises: Refused without a significant gain, or with a significant regression."""
    name = target.name
    current = current_release(paths, name)
    if current:
        return current
    registry = shared_registry(paths.home)
    evaluation = target.evaluation(paths)
    tags = {"held_out_digest": evaluation.held_out_digest}
    arguments = (name, target.folder(paths), evaluation.metrics, tags, flow_run)
    version = effect(register, registry, paths, *arguments, of=name)
    echo(f"release: {version} registered, score {evaluation.metrics['score']:.4f}")
    effect(store_answers, registry, version, target.answers(paths), of=name)
    report = effect(gate, registry, version, paths, echo, of=name, retries=0)
    reason = effect(apply_gate, registry, version, report, of=name)
    return publish(registry, version, reason, paths, echo, report.champion)


def publish(
    registry: Registry, version: ModelVersion, reason: str, paths: Paths, echo: Echo, compared_with: str
) -> Release:
    """Package a version that passed the gate against a champion, smoke-test its Bento over HTTP, and promote it.

    Raises: InputError where another version has become the champion meanwhile.
    """
    registry.tag(version, {"gate": "passed", "gate_reason": reason})
    echo(f"release: {version} passes: {reason}")
    tag = effect(package, paths, str(version), of=version.name)
    question = smoke_question(version.name, paths)
    answer, device = effect(smoke, paths, tag, release_target(version.name).probe, question, of=version.name)
    smoke_test = {"smoke_question": question, "smoke_answer": answer, "smoke_device": device}
    registry.tag(version, {"bento": tag, **smoke_test})
    effect(promote, registry, version, compared_with, reason, of=version.name)
    return _released(registry.resolve(str(version)), "promoted")


def promote(registry: Registry, version: ModelVersion, compared_with: str, reason: str) -> None:
    """Make a version the champion, unless an interrupted release has."""
    champion = registry.find(f"{version.name}@champion")
    if champion is None or champion.version != version.version:
        registry.promote(version, compared_with, reason)
    else:
        registry.audit_last_move(version.name)


def find_digest(registry: Registry, name: str, digest: str) -> ModelVersion | None:
    """The version of a model with this digest of its files."""
    if name not in registry.names():
        return None
    return next((row for row in registry.versions(name) if row.tags.get("model_digest") == digest), None)


def ancestors(registry: Registry, version: ModelVersion) -> list[str]:
    """The versions that a version was trained from, `NAME/VERSION`, nearest first."""
    from components.feedback.lineage import ancestry

    return [str(ancestor) for ancestor in ancestry(registry, version)[1:]]


def register(
    registry: Registry,
    paths: Paths,
    name: str,
    folder: Path,
    metrics: Mapping[str, float],
    about: Mapping[str, str],
    flow_run: str,
) -> ModelVersion:
    """Register a model folder with its lineage, unless an interrupted release has registered the same files."""
    out = folder.relative_to(paths.root).as_posix()
    digest = outs(paths)[out]
    if registered := find_digest(registry, name, digest):
        return registered
    lineage = version_lineage(paths, out)
    tags = {"model_digest": digest, "prefect_flow_run": flow_run, **commit_tags(paths.root), **about}
    version = registry.register(
        folder, name, {**metrics, **compute(lineage["stages"])}, tags, os.environ.get(PARENT_RUN), lineage
    )
    write_card(registry, version)
    return version


def store_answers(registry: Registry, version: ModelVersion, folder: Path) -> None:
    """Store a version's answers to the held-out rows with it, so that the gate need not generate them again."""
    for name in release_target(version.name).answer_files:
        if (folder / name).is_file():
            store_file(version, folder / name)


def fetch_answers(registry: Registry, version: ModelVersion, folder: Path) -> None:
    """Put what `store_answers` stored into a folder."""
    for name in release_target(version.name).answer_files:
        fetch_file(version, name, folder)


@dataclass(frozen=True)
class GateReport:
    """The gate's decision on a version, and the page that explains it."""

    promote: bool
    reason: str
    page: str = ""
    champion: str = ""
    """`NAME/VERSION` that it was compared with; empty without one."""
    findings: Sequence[Mapping[str, Any]] = ()
    """The outcome of the tests for each skill, as `SkillResult` has it."""


def gate(registry: Registry, version: ModelVersion, paths: Paths, echo: Echo) -> GateReport:
    """Whether a version has a significant gain and no significant regression against the champion."""
    champion = registry.find(f"{version.name}@champion")
    if champion is None:
        return GateReport(True, "; ".join(["there was no champion", *_better_baselines(version)]))
    if champion.version == version.version:
        return GateReport(True, "it is the champion already", champion=str(champion))
    from components.evaluation.gate import report

    echo(f"release: the champion {champion} answers the same questions")
    decision = compare(registry, version, champion, paths)
    page = report(decision, str(version), str(champion))
    findings = decision.to_json()["findings"]
    return GateReport(decision.promote, f"against {champion}: {decision.reason}", page, str(champion), findings)


def compare(registry: Registry, candidate: ModelVersion, champion: ModelVersion, paths: Paths) -> GateDecision:
    """The gate's decision between two versions of a model on the held-out rows of data/collected.

    Raises: InputError when there are none.
    """
    if not paths.collected.is_dir():
        raise InputError(f'{paths.collected}: not found; run "loopwright run --until collect" for the held-out rows')
    return release_target(candidate.name).compare(
        _under_release(registry, candidate, paths), _under_release(registry, champion, paths), paths
    )


def _under_release(registry: Registry, version: ModelVersion, paths: Paths) -> ModelUnderRelease:
    """A version with its stored answers, which are generated anew where they are to other rows."""
    answers = paths.home / "answers" / version.name / str(version.version)
    answers.mkdir(parents=True, exist_ok=True)
    fetch_answers(registry, version, answers)
    return ModelUnderRelease(version.folder, answers)


def _better_baselines(version: ModelVersion) -> list[str]:
    """The suites on which the baseline is better."""
    scores, baselines = _scores(version, "score"), _baselines(version)
    return [
        f"the baseline is better on {suite}: {value:.3f} against {scores[suite]:.3f}"
        for suite, value in baselines.items()
        if value > scores[suite]
    ]


def _baselines(version: ModelVersion) -> dict[str, float]:
    metric = release_target(version.name).baseline
    return _scores(version, metric) if metric else {}


def _scores(version: ModelVersion, metric: str) -> dict[str, float]:
    """A metric of each held-out suite, logged as `SUITE/METRIC`."""
    end = f"/{metric}"
    return {name.removesuffix(end): value for name, value in version.metrics.items() if name.endswith(end)}


def apply_gate(registry: Registry, version: ModelVersion, report: GateReport) -> str:
    """Record the gate's decision in MLflow and Prefect, and return its reason.

    Raises: Refused where the decision is not to promote; the version is then the challenger.
    """
    from prefect.artifacts import create_markdown_artifact

    verdict = f"{'Passed' if report.promote else 'Refused'}: {report.reason}"
    write_card(registry, version, verdict, report.findings)
    if report.page:
        with warn_on_failure(f"gate.md of {version}"):
            store_text(version, "gate.md", report.page)
            create_markdown_artifact(report.page, key="gate", description=f"Why {version} was promoted or refused")
    if report.promote:
        return report.reason
    overrule = f'overrule with "loopwright registry promote {version.name} {version.version}"'
    message = f"{version}: refused {report.reason}; {overrule}"
    champion = registry.resolve(f"{version.name}@champion")
    registry.tag(version, {"gate": "refused", "gate_reason": message, "gate_against": str(champion)})
    registry.alias(version.name, "challenger", version)
    raise Refused(message)


def _released(champion: ModelVersion, outcome: str) -> Release:
    scores, baselines = _scores(champion, "score"), _baselines(champion)
    smoke_test = [champion.tags.get(key, "") for key in ("bento", "smoke_question", "smoke_answer")]
    return Release(str(champion), outcome, champion.metrics.get("score", 0.0), scores, baselines, *smoke_test)
