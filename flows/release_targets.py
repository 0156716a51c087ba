"""The models that a run trains, and how each is evaluated, compared with its champion and smoke-tested."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.config.params import load_params
from components.config.paths import CURATED, Paths
from components.config.project import load_project

if TYPE_CHECKING:
    from components.evaluation.gate import GateDecision

QUESTION = "Hello"
"""The smoke question of a model for which the project defines none."""


@dataclass(frozen=True)
class Evaluation:
    """Figures of a model on its held-out rows."""

    metrics: Mapping[str, float]
    """`score` among them."""
    held_out_digest: str
    """Digest of the held-out rows: figures are comparable only where it is equal."""


@dataclass(frozen=True)
class ModelUnderRelease:
    """A model folder, and the folder of its stored answers to the held-out rows."""

    folder: Path
    answers: Path


@dataclass(frozen=True)
class SmokeProbe:
    """The request and response by which a served model is smoke-tested."""

    path: str
    body: Callable[[str], dict[str, Any]]
    answer: Callable[[Any], str]
    """Extracts the answer from the response's JSON."""


@dataclass(frozen=True)
class ReleaseTarget:
    """A model that a run trains and releases."""

    name: str
    """In the registry, and of the property of `Paths` with its folder."""
    stage: str
    """The stage that evaluates it; `data/metrics/STAGE.json` has the figures."""
    compare: Callable[[ModelUnderRelease, ModelUnderRelease, Paths], GateDecision]
    """Candidate and champion on the same held-out rows."""
    answers: Callable[[Paths], Path]
    """The folder in which its evaluation stored its answers."""
    answer_files: tuple[str, ...]
    """Files there that are stored with a version: its challengers are compared with them without generating anew."""
    probe: SmokeProbe
    baseline: str = ""
    """Metric of a held-out suite with the score of a simple model that was trained on the same data."""

    def folder(self, paths: Paths) -> Path:
        folder: Path = getattr(paths, self.name)
        return folder

    def evaluation(self, paths: Paths) -> Evaluation:
        """The figures that its stage wrote."""
        figures = json.loads((paths.metrics / f"{self.stage}.json").read_text(encoding="utf-8"))
        if self.baseline:
            from components.evaluation.held_out import flat_metrics

            metrics = flat_metrics(figures, self.baseline.removeprefix("baseline_"))
        else:
            from components.evaluation.evaluate import flat_metrics as flat_suites

            metrics = flat_suites(figures)
        return Evaluation(metrics, figures["held_out_digest"])

    def out(self, paths: Paths) -> str:
        """Its folder as dvc.yaml names it."""
        return self.folder(paths).relative_to(paths.root).as_posix()


def release_target(name: str) -> ReleaseTarget:
    """The release target of a registered name."""
    return next(target for target in RELEASE_TARGETS if target.name == name)


def _compare_agents(candidate: ModelUnderRelease, champion: ModelUnderRelease, paths: Paths) -> GateDecision:
    from components.evaluation.compare_agents import AgentFolder, judge_folders

    curated = paths.curated if (paths.curated / CURATED).is_file() else None
    return judge_folders(
        AgentFolder(candidate.folder, candidate.answers),
        AgentFolder(champion.folder, champion.answers),
        paths.collected,
        curated,
        load_params(paths.params),
        "any_gain",
    ).decision


def _compare_classifiers(candidate: ModelUnderRelease, champion: ModelUnderRelease, paths: Paths) -> GateDecision:
    from components.evaluation.compare_classifiers import judge_classifier

    folders, answers = (candidate.folder, champion.folder), (candidate.answers, champion.answers)
    return judge_classifier(*folders, paths.collected, load_params(paths.params), *answers)


def _compare_summarizers(candidate: ModelUnderRelease, champion: ModelUnderRelease, paths: Paths) -> GateDecision:
    from components.evaluation.compare_summarizers import judge_summarizer

    params = load_params(paths.params)
    return judge_summarizer(candidate.folder, champion.folder, paths.collected, params, candidate.answers)


def smoke_question(name: str, paths: Paths) -> str:
    """The project's question with which a model is smoke-tested before its promotion."""
    project = load_project(load_params(paths.params).project, paths.root)
    return project.smoke_questions.get(name, QUESTION)


_CHAT = SmokeProbe(
    "/v1/chat/completions",
    lambda text: {"messages": [{"role": "user", "content": text}]},
    lambda reply: str(reply["choices"][0]["message"]["content"]),
)
RELEASE_TARGETS = (
    ReleaseTarget(
        "agent",
        "evaluate",
        _compare_agents,
        lambda paths: paths.evaluation,
        ("answers.parquet", "answers.json"),
        _CHAT,
    ),
    ReleaseTarget(
        "classifier",
        "assess@classifier",
        _compare_classifiers,
        lambda paths: paths.assessment("classifier"),
        ("predictions.parquet", "predictions.json"),
        SmokeProbe(
            "/v1/classify",
            lambda text: {"input": text},
            lambda reply: str(reply["results"][0]["label"]),
        ),
        "baseline_macro_f1",
    ),
    ReleaseTarget(
        "summarizer",
        "assess@summarizer",
        _compare_summarizers,
        lambda paths: paths.assessment("summarizer"),
        ("written.parquet", "written.json"),
        _CHAT,
        "baseline_rougeL",
    ),
)
"""In the order in which they are released."""
