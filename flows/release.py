"""From a trained model folder to a champion that serves: register, gate, package, try, promote.

A model takes the alias only after its Bento has answered over HTTP; one that is not really better than the champion
on the same held-out questions stays a challenger. What a run makes is released one model after another, and a refusal
of one is no business of the others'.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from components.config.params import InputError, Refused, load_params
from components.config.paths import Paths
from components.runtime.process import git
from components.runtime.stage import PIPELINES
from components.tracking.event_log import PARENT_RUN, warn_on_failure
from components.tracking.mlflow_client import attach, attached
from components.tracking.registry import ModelVersion, Registry, is_empty
from flows.bento import has_bento, package, smoke
from flows.orchestration.flow_run import Echo, effect
from flows.release_targets import CANDIDATES, Candidate, ModelUnderRelease, candidate, smoke_question

NAME = "agent"
"""The model that people talk to, and that learns from them."""


@dataclass(frozen=True)
class Release:
    """The model that answers after a run, and why."""

    version: str
    """`NAME/VERSION` of the champion."""
    outcome: str
    score: float
    scores: dict[str, float] = field(default_factory=dict)
    """Score of each held-out suite; a classifier's is its macro-F1, a summarizer's its ROUGE-L."""
    baselines: dict[str, float] = field(default_factory=dict)
    """What a simple model that learned from the same scores there, where one was trained."""
    bento: str = ""
    question: str = ""
    answer: str = ""
    """What the served Bento answered to `question`."""


@dataclass
class Releases:
    """What became of the models that the stages made."""

    champions: list[Release] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    """What the gate said of the models that it refused."""
    pending: list[str] = field(default_factory=list)
    """Names of those that need a release."""


def look_at_releases(paths: Paths) -> Releases:
    """Which of the models on disk are released or refused already, and which need a release."""
    found = Releases()
    for one in made(paths):
        try:
            release = current_release(paths, one.name)
        except Refused as refusal:
            found.refusals.append(str(refusal))
            continue
        if release:
            found.champions.append(release)
        else:
            found.pending.append(one.name)
    return found


def made(paths: Paths) -> list[Candidate]:
    """The models that the stages have made."""
    locked = outs(paths)
    return [one for one in CANDIDATES if one.out(paths) in locked]


def current_release(paths: Paths, name: str = NAME) -> Release | None:
    """The champion, when the model on disk needs no release; None when it does.

    Raises: Refused when the gate has said no to this very model and the champion is still the same.
    """
    digest = outs(paths).get(candidate(name).out(paths))
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
        return _released(champion, f"{champion} learned from people since {version}")
    if version.tags.get("gate") == "refused" and version.tags.get("gate_against") == str(champion):
        raise Refused(version.tags["gate_reason"])
    return None


def release(paths: Paths, echo: Echo, flow_run: str) -> Releases:
    """Release what the stages made, each effect a task of the flow run; a refusal does not stop the other models."""
    found = Releases()
    for one in made(paths):
        try:
            found.champions.append(_release_one(one, paths, echo, flow_run))
        except Refused as refusal:
            echo(f"release: {refusal}")
            found.refusals.append(str(refusal))
    return found


def _release_one(one: Candidate, paths: Paths, echo: Echo, flow_run: str) -> Release:
    """Raises: Refused when nothing got really better, or something really fell."""
    current = current_release(paths, one.name)
    if current:
        return current
    registry = Registry(paths.home)
    measured = one.measured(paths)
    tags = {"held_out_digest": measured.held_out_digest}
    facts = (one.name, one.folder(paths), measured.metrics, tags, flow_run)
    version = effect(register, registry, paths, *facts, of=one.name)
    echo(f"release: {version} registered, score {measured.metrics['score']:.4f}")
    effect(keep_answers, registry, version, one.answers(paths), of=one.name)
    ruling = effect(gate, registry, version, paths, echo, of=one.name, retries=0)
    reason = effect(conclude, registry, version, ruling, of=one.name)
    return publish(registry, version, reason, paths, echo)


def publish(registry: Registry, version: ModelVersion, reason: str, paths: Paths, echo: Echo) -> Release:
    """What follows on a gate that has passed: package, ask the Bento over HTTP, promote."""
    registry.tag(version, {"gate": "passed", "gate_reason": reason})
    echo(f"release: {version} passes: {reason}")
    tag = effect(package, paths, str(version), of=version.name)
    question = smoke_question(version.name, paths)
    answer = effect(smoke, paths, tag, candidate(version.name).asking, question, of=version.name)
    registry.tag(version, {"bento": tag, "smoke_question": question, "smoke_answer": answer})
    if (champion := registry.find(f"{version.name}@champion")) is None or champion.version != version.version:
        effect(registry.promote, version, of=version.name)
    return _released(registry.resolve(str(version)), "promoted")


def find_digest(registry: Registry, name: str, digest: str) -> ModelVersion | None:
    """The version of a model that holds these very files."""
    if name not in registry.names():
        return None
    return next((row for row in registry.versions(name) if row.tags.get("model_digest") == digest), None)


def ancestors(registry: Registry, version: ModelVersion) -> list[str]:
    """The versions that a version was trained from, `NAME/VERSION`, nearest first."""
    from components.feedback.lineage import ancestry

    return [str(one) for one in ancestry(registry, version)[1:]]


def register(
    registry: Registry,
    paths: Paths,
    name: str,
    folder: Path,
    metrics: Mapping[str, float],
    about: Mapping[str, str],
    flow_run: str,
) -> ModelVersion:
    """Store a model folder with everything it came from; an interrupted release goes on with what it stored."""
    out = folder.relative_to(paths.root).as_posix()
    hashes = made_from(paths, out)
    digest = hashes[out]
    known = find_digest(registry, name, digest)
    if known:
        return known
    tags = {
        "model_digest": digest,
        "prefect_flow_run": flow_run,
        "python": sys.version.split()[0],
        "params": load_params(paths.params).model_dump_json(by_alias=True),
        "validation": _compact(paths.metrics / "validate.json"),
        **_commit(paths.root),
        **{f"dvc.{path}": one for path, one in hashes.items()},
        **about,
    }
    return registry.register(folder, name, metrics, tags, os.environ.get(PARENT_RUN))


def keep_answers(registry: Registry, version: ModelVersion, folder: Path) -> None:
    """Keep what a model answered when it was measured beside it, so that its challengers need not ask it again."""
    for name in candidate(version.name).kept:
        if (folder / name).is_file():
            attach(registry.client, version.run_id, folder / name)


def fetch_answers(registry: Registry, version: ModelVersion, folder: Path) -> None:
    """Put what `keep_answers` kept into a folder; nothing where nothing was kept."""
    for name in candidate(version.name).kept:
        attached(registry.client, version.run_id, name, folder)


@dataclass(frozen=True)
class GateReport:
    """What the gate says of a version, and the page that says why."""

    promote: bool
    reason: str
    page: str = ""


def gate(registry: Registry, version: ModelVersion, paths: Paths, echo: Echo) -> GateReport:
    """Whether a model got really better and nowhere really fell, against the champion on the same questions."""
    champion = registry.find(f"{version.name}@champion")
    if champion is None:
        return GateReport(True, "; ".join(["there was no champion", *_beaten(version)]))
    if champion.version == version.version:
        return GateReport(True, "it is the champion already")
    from components.evaluation.gate import report

    echo(f"release: the champion {champion} answers the same questions")
    kept = paths.home / "answers" / version.name / str(champion.version)
    kept.mkdir(parents=True, exist_ok=True)
    fetch_answers(registry, champion, kept)
    one = candidate(version.name)
    ours = ModelUnderRelease(version.folder, one.answers(paths))
    verdict = one.judged(ours, ModelUnderRelease(champion.folder, kept), paths)
    page = report(verdict, str(version), str(champion))
    return GateReport(verdict.promote, f"against {champion}: {verdict.reason}", page)


def _beaten(version: ModelVersion) -> list[str]:
    """The suites on which the baseline is better."""
    scores, baselines = _scores(version, "score"), _baselines(version)
    return [
        f"the baseline is better on {suite}: {value:.3f} against {scores[suite]:.3f}"
        for suite, value in baselines.items()
        if value > scores[suite]
    ]


def _baselines(version: ModelVersion) -> dict[str, float]:
    metric = candidate(version.name).baseline
    return _scores(version, metric) if metric else {}


def _scores(version: ModelVersion, metric: str) -> dict[str, float]:
    """A metric of each held-out suite, logged as `SUITE/METRIC`."""
    end = f"/{metric}"
    return {name.removesuffix(end): value for name, value in version.metrics.items() if name.endswith(end)}


def conclude(registry: Registry, version: ModelVersion, ruling: GateReport) -> str:
    """Put the ruling where people look, and return its reason.

    Raises: Refused when it is no; the version is then the challenger.
    """
    if ruling.page:
        with warn_on_failure(f"gate.md of {version}"):
            _show(registry, version, ruling.page)
    if ruling.promote:
        return ruling.reason
    overrule = f'overrule with "loopwright registry promote {version.name} {version.version}"'
    told = f"{version}: refused {ruling.reason}; {overrule}"
    champion = registry.resolve(f"{version.name}@champion")
    registry.tag(version, {"gate": "refused", "gate_reason": told, "gate_against": str(champion)})
    registry.alias(version.name, "challenger", version)
    raise Refused(told)


def _show(registry: Registry, version: ModelVersion, page: str) -> None:
    """The report beside the version in MLflow, and on the flow run in Prefect."""
    from prefect.artifacts import create_markdown_artifact

    attach(registry.client, version.run_id, "gate.md", page)
    create_markdown_artifact(page, key="gate", description=f"Why {version} was promoted or refused")


def _released(champion: ModelVersion, outcome: str) -> Release:
    scores, baselines = _scores(champion, "score"), _baselines(champion)
    told = [champion.tags.get(key, "") for key in ("bento", "smoke_question", "smoke_answer")]
    return Release(str(champion), outcome, champion.metrics.get("score", 0.0), scores, baselines, *told)


def made_from(paths: Paths, out: str) -> dict[str, str]:
    """DVC's hash of an out and of everything behind it: what its stage read, what the stages that made that read.

    The datasets are those that its stages named, each with its own digest.
    """
    stages = _locked(paths)
    hashes, waiting = {out: outs(paths)[out]}, [out]
    while waiting:
        wanted = Path(waiting.pop())
        # A stage may read a part of an out, or a folder that holds several.
        makers = [
            name
            for name, stage in stages.items()
            if any(wanted.is_relative_to(made) or Path(made).is_relative_to(wanted) for made in _hashes(stage, "outs"))
        ]
        for read in [_hashes(stages.pop(name), "deps") for name in makers]:
            hashes |= read
            waiting += read
    for file in [paths.root / path for path in hashes]:
        if file.parent == paths.validated("").parent and file.is_file():
            named = json.loads(file.read_text(encoding="utf-8"))
            hashes |= {f"data/collected/{name}": digest for name, digest in named.items()}
    # Of these a model reads a part: what it names.
    return {path: digest for path, digest in hashes.items() if path not in ("data/collected", "data/added")}


def outs(paths: Paths) -> dict[str, str]:
    """DVC's hash of every output of every stage that ran."""
    return {path: digest for stage in _locked(paths).values() for path, digest in _hashes(stage, "outs").items()}


def _locked(paths: Paths) -> dict[str, Any]:
    locks = [lock for pipeline in PIPELINES if (lock := (paths.root / pipeline).with_suffix(".lock")).exists()]
    written = [yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"] for lock in locks]
    return {name: stage for stages in written for name, stage in stages.items()}


def _hashes(stage: Mapping[str, Any], kind: str) -> dict[str, str]:
    return {entry["path"]: entry["md5"] for entry in stage.get(kind, []) if "md5" in entry}


def _commit(root: Path) -> dict[str, str]:
    """The commit that ran, and whether files differed from it."""
    try:
        commit = git(root, "rev-parse", "HEAD")
        # Runs themselves write dvc.lock, and ingestion the version of the feedback.
        changed = git(root, "status", "--porcelain", "--", ".", ":!*dvc.lock", ":!data/feedback.dvc")
        return {"git_commit": commit, "git_dirty": str(bool(changed)).lower()}
    except InputError:  # the run said so when it began
        return {"git_commit": "none"}


def _compact(path: Path) -> str:
    return json.dumps(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else ""
