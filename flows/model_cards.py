"""The model card of a registered version, from its records, those of its champion and those of the version before."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from components.agent.saved_tools import tool_tags
from components.evaluation.saved_outputs import Output, intervals, mistakes, read_outputs
from components.evaluation.suite_plot import draw_suites
from components.runtime.model_tasks import task_of
from components.tracking.event_log import warn_on_failure
from components.tracking.model_card import (
    ModelCard,
    SuiteFigure,
    architecture,
    changes_section,
    data_section,
    figures_section,
    gate_section,
    hugging_face_metadata,
    lineage_section,
    training_section,
    usage_section,
    weaknesses_section,
)
from components.tracking.registry import ModelVersion, Registry
from components.tracking.traces import store_held_out_traces
from components.tracking.version_files import (
    MAX_DESCRIPTION,
    describe_model,
    fetch_file,
    lineage,
    store_card,
    store_figure,
    store_imported_card,
    store_table,
)
from flows.release_targets import release_target

_WRONG_EACH = 2
"""Wrong answers shown of each of the worst suites."""
FAMILIES_BY_TASK = {"chat": "decoder", "classify": "encoder", "summarize": "encoder-decoder"}
TABLE = "held_out_answers.json"
"""Name of the table of a version's outputs in its run."""
_TRACES = 5
_NOT_JUDGED = "not compared with a champion yet"
_METRICS = {"macro_f1": ("macro-F1", "f1"), "rougeL": ("ROUGE-L", "rouge")}
"""Name and Hugging Face's name of the metric that a suite is scored by."""
_KINDS = {"chat": "a chat model that calls tools", "classify": "a classifier of texts", "summarize": "a summarizer"}


def write_card(
    registry: Registry, version: ModelVersion, verdict: str = _NOT_JUDGED, findings: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Write the card of a version into its folder and into MLflow, with the gate's verdict and tests.

    A card that cannot be written is reported, and ends no release.
    """
    with warn_on_failure(f"model card of {version}"), tempfile.TemporaryDirectory() as scratch:
        for name in release_target(version.name).answer_files:
            fetch_file(version, name, Path(scratch))
        outputs = read_outputs(Path(scratch))
        card = model_card(registry, version, verdict, findings, outputs)
        store_card(version, card.readme(), card.description(MAX_DESCRIPTION))
        if (base_name := version.tags.get("base_version")) and not (base := registry.resolve(base_name)).description:
            store_imported_card(base)
        _store_evidence(version, card, outputs)
        task = task_of(version.stored)
        about = card.summary.partition("\n\n")[2]
        describe_model(
            version,
            f"{_KINDS[task].capitalize()}. {about}\n\n`@champion` is served; each version has its model card.",
            {"task": task, "family": str(card.metadata["tags"][1])},
        )


def model_card(
    registry: Registry,
    version: ModelVersion,
    verdict: str,
    findings: Sequence[Mapping[str, Any]],
    outputs: Sequence[Output],
) -> ModelCard:
    """The card of a version of a model that a run or an improvement trains, with its outputs for held-out rows."""
    target, tags, folder = release_target(version.name), lineage(version), version.stored
    task = task_of(folder)
    champion = registry.find(f"{version.name}@champion")
    figures = _figures(version, champion, intervals(outputs, task == "classify"), target.baseline, findings)
    parent = tags.get("parent")
    previous = registry.find(parent or f"{version.name}/{version.version - 1}")
    beside = f"champion {champion}" if champion and champion.version != version.version else ""
    baseline = target.baseline.removeprefix("baseline_")
    metric, metric_type = _METRICS.get(baseline, ("share of answers that are right", "exact_match"))
    sections = [
        figures_section(figures, metric, beside, "baseline"),
        gate_section(verdict, findings),
        weaknesses_section(figures, mistakes(outputs, _WRONG_EACH)),
        *([changes_section(tags, lineage(previous), str(previous))] if previous else []),
        data_section(tags),
        training_section(tags),
        usage_section(version.name, task, _project(tags).get("smoke_questions", {}).get(version.name, "")),
        lineage_section(version.run_id, tags),
    ]
    score = f"Score {version.metrics['score']:.4g}; " if "score" in version.metrics else ""
    headline = f"{score}{verdict[:1].lower()}{verdict[1:].rstrip('.')}."
    about = _metadata(version, tags, figures, metric_type)
    return ModelCard(str(version), headline, _summary(version, tags, folder), sections, about, figures)


def _store_evidence(version: ModelVersion, card: ModelCard, outputs: Sequence[Output]) -> None:
    """Store a plot of the suites, a table of the outputs and traces of some of them with a version's run."""
    scores = {row.suite: row.score for row in card.figures}
    bounds = {row.suite: row.interval for row in card.figures if row.interval is not None}
    others = {"champion": [row.champion for row in card.figures], "baseline": [row.baseline for row in card.figures]}
    present = {name: points for name, points in others.items() if any(point is not None for point in points)}
    store_figure(version, "suites.png", draw_suites(scores, bounds, present, "score (95 % interval)"))
    if not outputs:
        return
    columns = ("suite", "question", "expected", "answer", "score")
    store_table(version, TABLE, {column: [getattr(output, column) for output in outputs] for column in columns})
    first = {output.suite: output for output in reversed(outputs)}
    store_held_out_traces(version, [asdict(output) for output in list(first.values())[:_TRACES]])


def _figures(
    version: ModelVersion,
    champion: ModelVersion | None,
    confidence: Mapping[str, tuple[float, float]],
    baseline: str,
    findings: Sequence[Mapping[str, Any]],
) -> list[SuiteFigure]:
    """The score of each suite, with the champion's where both were measured on the same rows."""
    digest = version.tags.get("held_out_digest")
    is_same = champion is not None and digest is not None and champion.tags.get("held_out_digest") == digest
    beside = champion.metrics if champion is not None and is_same else {}
    tested = {row["skill"]: row for row in findings}
    figures = []
    for name in sorted(key.removesuffix("/score") for key in version.metrics if key.endswith("/score")):
        values = {
            key: version.metrics.get(f"{name}/{key}") for key in ("questions", "texts", "conversations", baseline)
        }
        finding = tested.get(name, {})
        count = values["questions"] or values["texts"] or values["conversations"] or finding.get("questions", 0)
        score = version.metrics[f"{name}/score"]
        if name in confidence and not confidence[name][0] <= score <= confidence[name][1]:
            interval = None  # of another figure, as of conversations without right answers
        else:
            interval = confidence.get(name)
        champion_score = finding.get("champion", beside.get(f"{name}/score"))
        figures.append(
            SuiteFigure(name, int(count), score, interval, champion_score, values[baseline] if baseline else None)
        )
    return figures


def _summary(version: ModelVersion, tags: Mapping[str, str], folder: Path) -> str:
    """What the model is, what it was made for, and what it may call."""
    project = _project(tags)
    made = f"Made by the project `{project['name']}`" if project else "Made by an earlier release"
    lines = [f"{version} is {_KINDS[task_of(folder)]}: {architecture(folder)}. {made}."]
    if base := tags.get("base_version"):
        lines[0] += f" Base: {base}."
    lines.append(project.get("description", ""))
    if tools := tool_tags(folder).get("tools"):
        lines.append(f"Tools: {tools}.")
    lines.append("For the questions that its held-out suites are like; other uses were not measured.")
    return "\n\n".join(filter(None, lines))


def _project(tags: Mapping[str, str]) -> dict[str, Any]:
    project: dict[str, Any] = json.loads(tags.get("project", "{}"))
    return project


def _metadata(
    version: ModelVersion, tags: Mapping[str, str], figures: Sequence[SuiteFigure], metric: str
) -> dict[str, Any]:
    family = FAMILIES_BY_TASK[task_of(version.stored)]
    named = [family, "lora"] if "adapter_sha256" in tags else [family]
    return hugging_face_metadata(
        str(version), task_of(version.stored), figures, metric, named, tags.get("base_version", "")
    )
