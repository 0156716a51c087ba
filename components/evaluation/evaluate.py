"""Stage: the agent's answers to every held-out question, and bits per byte of held-out text.

Held-out text is tokenized anew by the model's own tokenizer, so that candidate and champion answer the very same sets.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from components.agent.agent import Agent
from components.config.loop_settings import EvaluateConfig
from components.config.params import Params
from components.datasets.formats import Row, first_per_suite, read_info, read_rows, split_digest, write_json
from components.evaluation.few_shot import few_shot
from components.evaluation.metrics import Encoded, bits_per_byte, wilson_interval
from components.evaluation.parallel_rollout import ParallelRollout
from components.evaluation.questions import COLUMNS, HELD_OUT, captions_in, correctness, read_questions
from components.evaluation.suite_plot import draw_suites
from components.models.decoder import Decoder
from components.runtime.stage import StageRun, warn_on_failure

Figures = dict[str, Any]
ANSWERS, ANSWERS_OF = "answers.parquet", "answers.json"
"""A model's answers to the suites; the digest of the held-out sets and the most questions of a suite."""


def evaluate(run: StageRun) -> None:
    """Write `data/metrics/evaluate.json`, the plots and `data/evaluation/answers.parquet`."""
    params, collected = run.params, run.paths.collected
    with ParallelRollout(run.paths.agent, params.evaluate) as rollout:
        figures, table = _measure(rollout, collected, params, run.progress)
        shots = _measure_shots(run, rollout)
    figures |= {"few_shot": shots, "seed": params.seed, "scale": params.scale}
    write_json(run.paths.metrics / "evaluate.json", figures)
    _write_plot(run.paths.metrics / "evaluate_suites.csv", figures["suites"])
    write_answers(run.paths.evaluation, table, collected, params, params.evaluate.max_questions)
    run.tracker.metrics(flat_metrics(figures))
    run.tracker.table("evaluation_answers.json", _columns(table))
    with warn_on_failure("evaluation_suites.png"):
        shown = {name: values for name, values in figures["suites"].items() if "exact_match" in values}
        bounds = {name: (values["ci95_low"], values["ci95_high"]) for name, values in shown.items()}
        exact = {name: values["exact_match"] for name, values in shown.items()}
        run.tracker.figure(draw_suites(exact, bounds), "evaluation_suites.png")


def _measure(
    rollout: ParallelRollout, collected: Path, params: Params, progress: Callable[..., None]
) -> tuple[Figures, list[Row]]:
    """Figures of the held-out sets of the datasets that `params` names, and one row of `COLUMNS` per question."""
    config = params.evaluate
    torch.manual_seed(params.seed)
    model, agent = rollout.model, rollout.agent
    questions = [
        question for name in params.tune.datasets for question in read_questions(collected / name, config.max_questions)
    ]
    rollout.prepare(len(questions))
    documents = {
        name: _measure_documents(model, agent, collected / name, config) for name in params.pretrain.decoder.datasets
    }
    table = rollout(questions, progress)
    suites = _suite_figures(table)
    pictured = [name for name in params.tune.datasets if read_info(collected / name).kind == "images"]
    _add_picture_figures(suites, table, [collected / name for name in pictured], config, params.seed)
    for name in params.tune.datasets:
        suites.update(_measure_conversations(model, agent, collected / name, name, suites, config))
    figures: Figures = {
        "score": sum(suite["score"] for suite in suites.values()) / max(1, len(suites)),
        "held_out_digest": held_out_digest(collected, params),
        "suites": suites,
        "documents": documents,
    }
    return figures, table


def _measure_shots(run: StageRun, rollout: ParallelRollout) -> dict[str, Figures]:
    """The agent's exact match with solved examples in the prompt."""
    config, named = run.params.evaluate, [run.paths.collected / name for name in run.params.tune.datasets]
    folders = [folder for folder in named if read_info(folder).kind == "conversations"]
    questions = [question for folder in folders for question in read_questions(folder, config.shot_questions)]
    return few_shot(rollout.agent, rollout, folders, questions, config, run.params.seed, run.progress)


def write_answers(folder: Path, table: list[Row], collected: Path, params: Params, most: int) -> None:
    """Write `ANSWERS` and `ANSWERS_OF`, for up to `most` questions of each suite."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(_columns(table)), folder / ANSWERS)
    write_json(folder / ANSWERS_OF, {"held_out_digest": held_out_digest(collected, params), "questions": most})


def _columns(table: list[Row]) -> dict[str, list[Any]]:
    return {column: [row[column] for row in table] for column in COLUMNS}


def held_out_digest(collected: Path, params: Params) -> str:
    """Identity of the held-out sets: two evaluations compare only when theirs are equal."""
    folders = [collected / name for name in [*params.pretrain.decoder.datasets, *params.tune.datasets]]
    return split_digest(folders, "test", params.evaluate.model_dump_json(exclude={"shots", "shot_questions"}))


def flat_metrics(figures: Figures) -> dict[str, float]:
    """The figures under the names of the tracker."""
    flat = {"score": float(figures["score"])}
    for group, prefix in (("suites", ""), ("documents", ""), ("few_shot", "few_shot/")):
        for name, values in figures.get(group, {}).items():
            numbers = {key: float(value) for key, value in values.items() if isinstance(value, (int, float))}
            numbers |= {f"baseline_{key}": float(value) for key, value in values.get("baseline", {}).items()}
            flat.update({f"{prefix}{name}/{key}": value for key, value in numbers.items()})
    return flat


def _suite_figures(table: list[Row]) -> dict[str, Figures]:
    suites: dict[str, list[Row]] = {}
    scores: dict[str, list[float]] = {}
    for row, score in zip(table, correctness(table), strict=True):
        suites.setdefault(row["suite"], []).append(row)
        scores.setdefault(row["suite"], []).append(score)
    figures = {}
    for name, rows in sorted(suites.items()):
        right = sum(row["correct"] for row in rows)
        low, high = wilson_interval(right, len(rows))
        exact = right / len(rows)
        figures[name] = {
            "questions": len(rows),
            "exact_match": round(exact, 4),
            "ci95_low": round(low, 4),
            "ci95_high": round(high, 4),
            "right_calls": round(sum(row["right_calls"] for row in rows) / len(rows), 4),
            "score": round(sum(scores[name]) / len(rows), 6),
        }
    return figures


def _add_picture_figures(
    suites: dict[str, Figures], table: list[Row], folders: list[Path], config: EvaluateConfig, seed: int
) -> None:
    """Add to suites about pictures what baselines reach, and to those of captions CIDEr-D and BLEU."""
    if not folders:
        return
    from components.evaluation.picture_baselines import picture_baselines

    for suite, scores in captions_in(table).items():
        suites[suite] |= {"cider_d": round(scores.cider_d, 4), "bleu": round(scores.bleu, 4)}
    train = (row for folder in folders for row in read_rows(folder, "train"))
    tests = (
        {**row, "suite": row["suite"] or f"{folder.name}/{HELD_OUT}"}
        for folder in folders
        for row in read_rows(folder, "test")
    )
    baselines = picture_baselines(train, first_per_suite(tests, config.max_questions), seed)
    for suite in suites.keys() & baselines.keys():
        suites[suite]["baseline"] = baselines[suite]


def _measure_documents(model: Decoder, agent: Agent, folder: Path, config: EvaluateConfig) -> Figures:
    """Bits per byte on held-out text, in windows of at most the context."""
    tokenizer = agent.tokenizer
    width = min(256, agent.context_len) - 1
    pieces: list[Encoded] = []
    left = config.documents_tokens
    for row in read_rows(folder, "test", ["text"]):
        ids = tokenizer.encode(row["text"])[:left]
        left -= len(ids)
        for start in range(0, len(ids), width):
            window = ids[start : start + width]
            pieces.append(([tokenizer.document_id, *window], [0] + [1] * len(window)))
        if left <= 0:
            break
    bits, size = bits_per_byte(model, tokenizer, pieces, config.batch_size)
    return {"bits_per_byte": round(bits, 5), "bytes": size}


def read_conversations(agent: Agent, folder: Path, most: int) -> list[Encoded]:
    """The first held-out conversations without one right answer that fit the context."""
    if read_info(folder).kind == "images":  # its pictures would have to be read with it
        return []
    rows = (row for row in read_rows(folder, "test") if not row["suite"])
    encoded = agent.tokenizer.encode_chats([(row["messages"], row["tools"]) for row in islice(rows, most)])
    return [piece for piece in encoded if len(piece[0]) <= agent.context_len]


def _measure_conversations(
    model: Decoder, agent: Agent, folder: Path, name: str, suites: dict[str, Figures], config: EvaluateConfig
) -> dict[str, Figures]:
    """Free-text conversations have no one right answer: their score is the mean probability per byte, 2 ** -bits."""
    pieces = read_conversations(agent, folder, config.max_questions)
    if not pieces:
        return {}
    bits, size = bits_per_byte(model, agent.tokenizer, pieces, max(1, config.batch_size // 4))
    figures = {
        "bits_per_byte": round(bits, 5),
        "bytes": size,
        "conversations": len(pieces),
        "score": round(2**-bits, 6),
    }
    return {name: {**suites.get(name, {}), **figures}}


def _write_plot(path: Path, suites: dict[str, Figures]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["suite", "exact_match", "ci95_low", "ci95_high"])
        for name, figures in suites.items():
            if "exact_match" in figures:
                writer.writerow([name, figures["exact_match"], figures["ci95_low"], figures["ci95_high"]])
