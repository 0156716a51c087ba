"""The models that a run makes, and what sets them apart on the way from a folder to a champion.

Each is measured by its own stage, judged on its own held-out rows, and asked its own kind of question over HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.config.params import load_params
from components.config.paths import Paths
from components.config.project import load_project

if TYPE_CHECKING:
    from components.evaluation.gate import GateDecision

QUESTION = "Hello"
"""The smoke question of a model for which the project has none."""


@dataclass(frozen=True)
class Measured:
    """What evaluation says of a model."""

    metrics: Mapping[str, float]
    """`score` among them."""
    held_out_digest: str
    """Identity of what was asked: figures compare only where it is equal."""


@dataclass(frozen=True)
class ModelUnderRelease:
    """A model folder, and where its answers to the held-out rows are, if they were kept."""

    folder: Path
    answers: Path


@dataclass(frozen=True)
class SmokeProbe:
    """How a question is put to a served model."""

    path: str
    body: Callable[[str], dict[str, Any]]
    answer: Callable[[Any], str]
    """Reads the answer out of the reply's JSON."""


@dataclass(frozen=True)
class Candidate:
    """One of the models that a run makes."""

    name: str
    """In the registry, and of its folder in `Paths`."""
    measured: Callable[[Paths], Measured]
    judged: Callable[[ModelUnderRelease, ModelUnderRelease, Paths], GateDecision]
    """Candidate and champion on the same held-out rows."""
    answers: Callable[[Paths], Path]
    """Where its evaluation put what it answered."""
    kept: tuple[str, ...]
    """Files there that go with a version, so that its challengers need not ask it again."""
    asking: SmokeProbe
    baseline: str = ""
    """Metric of a held-out suite, beside the model's `score`: what a simple model that learned from the same scores."""

    def folder(self, paths: Paths) -> Path:
        folder: Path = getattr(paths, self.name)
        return folder

    def out(self, paths: Paths) -> str:
        """Its folder as dvc.yaml names it."""
        return self.folder(paths).relative_to(paths.root).as_posix()


def candidate(name: str) -> Candidate:
    """The candidate of a registered name."""
    return next(one for one in CANDIDATES if one.name == name)


def _agent_measured(paths: Paths) -> Measured:
    from components.evaluation.evaluate import flat_metrics

    figures = _figures(paths, "evaluate")
    return Measured(flat_metrics(figures), figures["held_out_digest"])


def _agent_judged(ours: ModelUnderRelease, champion: ModelUnderRelease, paths: Paths) -> GateDecision:
    from components.evaluation.compare_agents import AgentFolder, judge_folders

    curated = paths.curated if (paths.curated / "curated.json").is_file() else None
    candidate, theirs = (AgentFolder(each.folder, each.answers) for each in (ours, champion))
    return judge_folders(candidate, theirs, paths.collected, curated, load_params(paths.params), "any_gain").decision


def _classifier_measured(paths: Paths) -> Measured:
    from components.evaluation.held_out import flat_metrics

    figures = _figures(paths, "assess@classifier")
    return Measured(flat_metrics(figures, "macro_f1"), figures["held_out_digest"])


def _classifier_judged(ours: ModelUnderRelease, champion: ModelUnderRelease, paths: Paths) -> GateDecision:
    from components.evaluation.compare_classifiers import judge_classifier

    folders, said = (ours.folder, champion.folder), (ours.answers, champion.answers)
    return judge_classifier(*folders, paths.collected, load_params(paths.params), *said)


def _summarizer_measured(paths: Paths) -> Measured:
    from components.evaluation.held_out import flat_metrics

    figures = _figures(paths, "assess@summarizer")
    return Measured(flat_metrics(figures, "rougeL"), figures["held_out_digest"])


def _summarizer_judged(ours: ModelUnderRelease, champion: ModelUnderRelease, paths: Paths) -> GateDecision:
    from components.evaluation.compare_summarizers import judge_summarizer

    return judge_summarizer(ours.folder, champion.folder, paths.collected, load_params(paths.params), ours.answers)


def _figures(paths: Paths, stage: str) -> dict[str, Any]:
    """The metrics file of a stage."""
    figures: dict[str, Any] = json.loads((paths.metrics / f"{stage}.json").read_text(encoding="utf-8"))
    return figures


def smoke_question(name: str, paths: Paths) -> str:
    """What a model is asked before it may be champion: the project says it."""
    project = load_project(load_params(paths.params).project, paths.root)
    return project.smoke_questions.get(name, QUESTION)


_CHAT = SmokeProbe(
    "/v1/chat/completions",
    lambda text: {"messages": [{"role": "user", "content": text}]},
    lambda reply: str(reply["choices"][0]["message"]["content"]),
)
CANDIDATES = (
    Candidate(
        "agent",
        _agent_measured,
        _agent_judged,
        lambda paths: paths.evaluation,
        ("answers.parquet", "answers.json"),
        _CHAT,
    ),
    Candidate(
        "classifier",
        _classifier_measured,
        _classifier_judged,
        lambda paths: paths.assessment("classifier"),
        ("predictions.parquet", "predictions.json"),
        SmokeProbe(
            "/v1/classify",
            lambda text: {"input": text},
            lambda reply: str(reply["results"][0]["label"]),
        ),
        "baseline_macro_f1",
    ),
    Candidate(
        "summarizer",
        _summarizer_measured,
        _summarizer_judged,
        lambda paths: paths.assessment("summarizer"),
        ("written.parquet", "written.json"),
        _CHAT,
        "baseline_rougeL",
    ),
)
"""In the order in which they are released."""
