"""A model card: Markdown that says what a registered version is, how it was made, how good it is and where it fails.

The sections are written from the version's own records, so that a card is true of any machine's registry. The file has
Hugging Face's metadata in front; the version's description in MLflow, which is limited, has briefs of long sections.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from components.config.params import flat
from components.config.paths import CONFIG
from components.models.weight_files import ADAPTER_CONFIG, weight_files
from components.runtime.model_tasks import Task

CARD = "README.md"
"""The card's name in a model folder, as Hugging Face has it."""
WATTS_PER_CORE, WATTS_PER_GPU = 10.0, 400.0
"""Of a busy core of a server's processor, and of a data center's GPU with its share of the machine: an estimate."""
PIPELINE_TAGS: Mapping[Task, str] = {
    "chat": "text-generation",
    "classify": "text-classification",
    "summarize": "summarization",
}
"""Hugging Face's name of each task."""
DATASET = "dvc.data/collected/"
"""Start of a lineage's key with the hash of a dataset."""
_MAX_CELL = 70


@dataclass(frozen=True)
class Section:
    """A section of a card."""

    title: str
    text: str
    brief: str | None = None
    """What stands for the text where there is little room."""


@dataclass(frozen=True)
class ModelCard:
    """A card: a title, Hugging Face's metadata and sections."""

    title: str
    headline: str
    """What one reads in MLflow's list of versions: the score and the verdict."""
    summary: str
    sections: Sequence[Section]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    figures: Sequence[SuiteFigure] = ()

    def readme(self) -> str:
        """The card as README.md of a model folder."""
        front = yaml.safe_dump(dict(self.metadata), sort_keys=False, allow_unicode=True, width=1000)
        return f"---\n{front}---\n\n# {self.title}\n\n{self._markdown([section.text for section in self.sections])}"

    def description(self, limit: int) -> str:
        """The card in at most `limit` characters: briefs of the longest sections, then without the last sections."""
        texts = [section.text for section in self.sections]
        briefs = [
            text if section.brief is None else section.brief for section, text in zip(self.sections, texts, strict=True)
        ]
        by_gain = sorted(range(len(texts)), key=lambda number: len(briefs[number]) - len(texts[number]))
        for number in by_gain:
            if len(self._markdown(texts)) <= limit:
                break
            texts[number] = briefs[number]
        while texts and len(self._markdown(texts)) > limit:
            texts.pop()
        return self._markdown(texts)[:limit]

    def _markdown(self, texts: Sequence[str]) -> str:
        sections = [
            f"## {section.title}\n\n{text}\n" for section, text in zip(self.sections, texts, strict=False) if text
        ]
        return "\n".join([f"{self.headline}\n\n{self.summary}\n", *sections])


def body(readme: str) -> str:
    """A card without the metadata in front of it."""
    return _split(readme)[1]


def front_matter(readme: str) -> dict[str, Any]:
    """The metadata in front of a card, as YAML; empty where there is none or it cannot be read."""
    try:
        values = yaml.safe_load(_split(readme)[0])
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) else {}


def _split(readme: str) -> tuple[str, str]:
    if readme.startswith("---\n") and "\n---\n" in readme:
        front, _, rest = readme.removeprefix("---\n").partition("\n---\n")
        return front, rest.lstrip("\n")
    return "", readme


@dataclass(frozen=True)
class SuiteFigure:
    """A model's score on a held-out suite."""

    suite: str
    questions: int
    score: float
    interval: tuple[float, float] | None = None
    """95 %."""
    champion: float | None = None
    """The champion's score on the same questions."""
    baseline: float | None = None


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown; numbers are aligned to the right, and None is left blank."""
    right = [
        all(row[index] is None or isinstance(row[index], (int, float)) for row in rows) for index in range(len(columns))
    ]
    lines = [columns, ["---:" if is_number else "---" for is_number in right], *rows]
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in lines)


def cell(value: Any) -> str:
    """A value as the text of a table's cell: in one line, and without the sign that ends a cell."""
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())
    return (text if len(text) <= _MAX_CELL else f"{text[: _MAX_CELL - 1]}…").replace("|", "\\|")


def figures_section(figures: Sequence[SuiteFigure], metric: str, champion: str, baseline: str) -> Section:
    """Scores by suite, beside the champion's and the baseline's where there are any."""
    others = {champion: [row.champion for row in figures], baseline: [row.baseline for row in figures]}
    shown = {name: values for name, values in others.items() if name and any(value is not None for value in values)}
    columns = ["suite", "n", "score", "95 %", *shown]
    rows = [
        [row.suite, row.questions, row.score, _interval(row.interval), *(values[number] for values in shown.values())]
        for number, row in enumerate(figures)
    ]
    mean = sum(row.score for row in figures) / max(1, len(figures))
    about = f"Score: {metric}. Mean over {len(figures)} {'suite' if len(figures) == 1 else 'suites'}: {mean:.4g}."
    return Section("Held-out suites", f"{about}\n\n{table(columns, rows)}", about)


def weaknesses_section(
    figures: Sequence[SuiteFigure], wrong: Mapping[str, Sequence[tuple[str, str, str]]], most: int = 3
) -> Section:
    """The suites with the lowest scores, with wrong answers: question, right answer, the model's answer."""
    worst = sorted(figures, key=lambda row: row.score)[:most]
    lines = [f"- **{row.suite}**: {row.score:.3g} of 1 on {row.questions} questions." for row in worst]
    below = [row.suite for row in figures if row.baseline is not None and row.baseline > row.score]
    lines += [f"- The baseline is better on {', '.join(below)}."] if below else []
    rows = [[row.suite, *texts] for row in worst for texts in wrong.get(row.suite, ())]
    examples = f"\n\n{table(('suite', 'question', 'right', 'answered'), rows)}" if rows else ""
    brief = "\n".join(lines)
    return Section("Known weaknesses", brief + examples, brief)


def gate_section(verdict: str, findings: Sequence[Mapping[str, Any]]) -> Section:
    """The promotion gate's verdict, and its tests by skill."""
    text = f"{verdict[:1].upper()}{verdict[1:].rstrip('.')}."
    rows = [
        [
            row["skill"],
            row["questions"],
            float(row["champion"]),
            float(row["candidate"]),
            f"{row['wins']}:{row['losses']}",
            float(row["p_fall"] if row["outcome"] == "worse" else row["p_gain"]),
            row["outcome"],
        ]
        for row in findings
    ]
    columns = ("skill", "n", "champion", "candidate", "won:lost", "p", "outcome")
    return Section("Promotion gate", f"{text}\n\n{table(columns, rows)}" if rows else text, text)


def data_section(lineage: Mapping[str, str]) -> Section:
    """The datasets with their kinds, rows and licences, and the feedback that was trained on."""
    datasets: dict[str, dict[str, Any]] = json.loads(lineage.get("datasets", "{}"))
    rows = [
        [
            name,
            info["kind"],
            (info["rows"] or {}).get("train"),
            (info["rows"] or {}).get("test"),
            info["licence"] or "not stated",
        ]
        for name, info in datasets.items()
    ]
    recorded = sorted(key.removeprefix(DATASET) for key in lineage if key.startswith(DATASET))
    text = table(("dataset", "kind", "trained on", "held out", "licence"), rows) if rows else ", ".join(recorded)
    text = text or "Not recorded."
    sources = sorted({source["name"] for info in datasets.values() for source in info["sources"] or []})
    if sources:
        text += f"\n\nSources: {'; '.join(sources[:5])}{'; ...' if len(sources) > 5 else ''}."
    if feedback := int(lineage.get("trained_on_feedback", "0")):
        text += f"\n\nAnd {feedback} corrections and votes of users (`lessons.json` names them)."
    return Section("Data", text, ", ".join(datasets) or text)


def training_section(lineage: Mapping[str, str]) -> Section:
    """The stages that trained, with their settings; hours of computation and an estimate of energy."""
    stages: dict[str, dict[str, float]] = json.loads(lineage.get("stages", "{}"))
    params: dict[str, Any] = json.loads(lineage.get("params", "{}"))
    rows = []
    for name, report in reversed(stages.items()):  # in the order in which they ran
        values = _settings(params, name)
        if "max_steps" in values:
            keys = ("max_steps", "global_batch_size", "learning_rate", "optimizer", "lora_rank")
            rows.append([name, *(values.get(key) for key in keys), report["seconds"]])
    columns = ("stage", "steps", "batch", "learning rate", "optimizer", "LoRA rank", "seconds")
    text = f"Scale `{params['scale']}`, seed {params['seed']}.\n\n" if "scale" in params else ""
    text += table(columns, rows) if rows else "The settings of its training are not recorded."
    if hours := compute(stages):
        text += (
            f"\n\n{len(stages)} stages took {hours['cpu_hours']:.3g} CPU hours and {hours['gpu_hours']:.3g} GPU hours,"
            f" some {hours['energy_kwh']:.2g} kWh (estimate: {WATTS_PER_CORE:g} W a core, {WATTS_PER_GPU:g} W a GPU)."
        )
    return Section("Training", text)


def _settings(params: Mapping[str, Any], stage: str) -> Mapping[str, Any]:
    """A stage's section of params.yaml: `pretrain.decoder` of pretrain@decoder, `classifier` of finetune@classifier."""
    name, _, item = stage.partition("@")
    section = params.get(name) or params.get(item) or {}
    values = section.get(item, section) if isinstance(section, Mapping) else {}
    return values if isinstance(values, Mapping) else {}


def compute(stages: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """CPU hours, GPU hours and an estimate of the energy of stages; empty without any."""
    if not stages:
        return {}
    cpu = sum(stage["cpu_seconds"] for stage in stages.values()) / 3600
    gpu = sum(stage["seconds"] * stage["gpus"] for stage in stages.values()) / 3600
    return {"cpu_hours": cpu, "gpu_hours": gpu, "energy_kwh": (cpu * WATTS_PER_CORE + gpu * WATTS_PER_GPU) / 1000}


def changes_section(lineage: Mapping[str, str], previous: Mapping[str, str], name: str, most: int = 10) -> Section:
    """What differs from the lineage of the version `name`: data, settings, code, feedback."""
    before, after = ({key: tags[key] for key in tags if key.startswith(DATASET)} for tags in (previous, lineage))
    lines = [f"- dataset {key.rpartition('/')[2]}: new" for key in sorted(after.keys() - before.keys())]
    lines += [f"- dataset {key.rpartition('/')[2]}: no longer used" for key in sorted(before.keys() - after.keys())]
    lines += [
        f"- dataset {key.rpartition('/')[2]}: other rows" for key in after if before.get(key, after[key]) != after[key]
    ]
    old, new = (flat(json.loads(tags.get("params", "{}"))) for tags in (previous, lineage))
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    lines += [f"- `{key}`: {cell(str(old.get(key)))} → {cell(str(new.get(key)))}" for key in changed[:most]]
    lines += [f"- and {len(changed) - most} more settings"] if len(changed) > most else []
    commits = [tags.get("git_commit", "")[:12] for tags in (previous, lineage)]
    lines += [f"- code: commit {commits[0]} → {commits[1]}"] if commits[0] != commits[1] else []
    feedback = int(lineage.get("trained_on_feedback", "0"))
    lines += [f"- {feedback} corrections and votes of users"] if feedback else []
    text = "\n".join(lines) or "Nothing that is recorded: the same data, settings and commit."
    return Section(f"Changes since {name}", text, "\n".join(lines[:3]) or text)


def lineage_section(run_id: str, tags: Mapping[str, str]) -> Section:
    """Where a version came from, in five lines."""
    hashes = {key: md5 for key, md5 in tags.items() if key.startswith(DATASET)}
    data = ", ".join(f"{key.rpartition('/')[2]} {md5[:8]}" for key, md5 in sorted(hashes.items()))
    dirty = " with changed files" if tags.get("git_dirty") == "true" else ""
    flow_run = f", Prefect flow run `{tags['prefect_flow_run']}`" if tags.get("prefect_flow_run") else ""
    weights = next((tags[key] for key in ("adapter_sha256", "weights_sha256") if key in tags), "")
    lines = [
        f"- weights: SHA-256 `{weights[:16]}`"
        + (f", DVC `{tags['model_digest'][:12]}`" if "model_digest" in tags else ""),
        f"- trained from: {tags.get('parent') or tags.get('base_version') or tags.get('imported_from') or 'scratch'}",
        f"- data: {data or 'not recorded'}",
        f"- code: commit `{tags.get('git_commit', 'none')[:12]}`{dirty}, Python {tags.get('python', '?')}",
        f"- runs: MLflow `{run_id}`{flow_run}; everything else is in its `lineage.json`",
    ]
    return Section("Lineage", "\n".join(lines))


def usage_section(name: str, task: Task, question: str) -> Section:
    """How the model is called: by the command, over HTTP, with transformers."""
    question = question or "Hello"
    quoted = _shell(question)
    chat = {"model": name, "messages": [{"role": "user", "content": question}]}
    path, request = (
        ("classify", {"model": name, "input": question}) if task == "classify" else ("chat/completions", chat)
    )
    command = f"loopwright {'classify' if task == 'classify' else 'chat'} {quoted}"
    lines = [
        "```sh",
        *([command] if task != "summarize" else []),
        f"curl http://127.0.0.1:3000/v1/{path} -H 'Content-Type: application/json' \\",
        f"  -d {_shell(json.dumps(request, ensure_ascii=False))}",
        f"loopwright export {name}@champion DIR   # for transformers, vLLM; --format gguf for llama.cpp",
        "```",
    ]
    return Section("How to call it", "\n".join(lines), f"`{command}`" if task != "summarize" else f"`model: {name}`")


def _shell(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def architecture(folder: Path) -> str:
    """A model folder's architecture, parameters and context in a line."""
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    named = (config.get("architectures") or ["model"])[0]
    text = config.get("text_config") or config
    sizes = {
        "layers": text.get("num_hidden_layers") or text.get("num_layers"),
        "wide": text.get("hidden_size") or text.get("d_model"),
        "tokens in its vocabulary": text.get("vocab_size"),
        "tokens of context": text.get("max_position_embeddings") or text.get("n_positions"),
    }
    parts = [f"{named}, {_parameters(folder):,} parameters"]
    if (folder / ADAPTER_CONFIG).is_file():
        rank = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("r")
        parts = [f"{named}, a LoRA adapter of rank {rank} with {_parameters(folder):,} parameters"]
    return ", ".join(parts + [f"{size:,} {unit}" for unit, size in sizes.items() if size])


def _parameters(folder: Path) -> int:
    total = 0
    for file in weight_files(folder):
        with safe_open(file, "np") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total


def _interval(interval: tuple[float, float] | None) -> str:
    return f"{interval[0]:.3f}–{interval[1]:.3f}" if interval else ""


def hugging_face_metadata(
    version: str, task: Task, figures: Sequence[SuiteFigure], metric: str, tags: Sequence[str], base: str = ""
) -> dict[str, Any]:
    """Hugging Face's metadata; https://huggingface.co/docs/hub/model-cards#model-card-metadata has its keys."""
    pipeline = PIPELINE_TAGS[task]
    results = [
        {
            "task": {"type": pipeline},
            "dataset": {"name": figure.suite, "type": figure.suite},
            "metrics": [{"type": metric, "value": round(figure.score, 4)}],
        }
        for figure in figures
    ]
    named = {"library_name": "transformers", "pipeline_tag": pipeline, "tags": ["loopwright", *tags]}
    index = {"model-index": [{"name": version, "results": results}]} if results else {}
    return {**named, **({"base_model": base} if base else {}), **index}
