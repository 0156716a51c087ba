"""Daily drift check: a day's prompts against the training data, its votes against the month before."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from components.config.paths import Paths
from components.datasets.formats import read_info, shards
from components.feedback.drift import Measure, compare, first_words, lengths, rating_change
from components.feedback.ledger import DAY_SECONDS
from components.feedback.store import Store, has_store
from components.runtime.files import write_text
from components.runtime.model_tasks import is_chat
from components.tracking.event_log import warn_on_failure
from flows.orchestration.flow_run import Echo, FlowRun, effect, run_flow

EVENT = "loopwright.drift"
_MAX_REQUESTS = 10_000


def monitor(root: Path, echo: Echo = print, days: int = 1) -> list[Measure]:
    """Compare the last days' prompts with the training conversations and their votes with the thirty days before."""
    paths = Paths(root)

    def body(run: FlowRun) -> list[Measure]:
        measures = _measures(paths, days)
        for measure in measures:
            figures = f"{measure.value:.3f}, threshold {measure.threshold:.3f}, {measure.samples} samples"
            echo(f"monitor: {measure.name} {figures}")
        effect(_report, paths, measures)
        if drifted := [measure.name for measure in measures if measure.drifted]:
            effect(_emit_event, drifted)
        return measures

    return run_flow("monitor", paths.home, echo, body, days=days)


def _measures(paths: Paths, days: int) -> list[Measure]:
    if not has_store(paths.home):
        return []
    store = Store.of(paths.home)
    now = time.time()
    since = now - days * DAY_SECONDS
    try:
        # Each with a limit of its own: a busy day leaves the days before in.
        periods = (since, now), (since - 30 * DAY_SECONDS, since)
        recent = [store.recent(*period, _MAX_REQUESTS) for period in periods]
    finally:
        store.close()
    today, past = ([row for row in rows if is_chat(row["model"])] for rows in recent)
    prompts = [_first_prompt(row["body"].get("messages", [])) for row in today]
    trained = _training_prompts(paths)
    measures = []
    if prompts and trained:
        measures.append(compare("prompt length", lengths(trained), lengths(prompts)))
        measures.append(compare("first word", *first_words(trained, prompts)))
    if (past_votes := _votes(past)) != (0, 0) and (votes := _votes(today)) != (0, 0):
        measures.append(rating_change(past_votes, votes))
    return measures


def _training_prompts(paths: Paths) -> list[str]:
    """First prompts of the training conversations."""
    folders = [file.parent for file in paths.collected.glob("*/dataset.json")]
    conversations = [folder for folder in folders if read_info(folder).kind == "conversations"]
    tables = [pq.read_table(file, columns=["messages"]) for folder in conversations for file in shards(folder, "train")]
    return [_first_prompt(messages or []) for table in tables for messages in table["messages"].to_pylist()]


def _first_prompt(messages: list[dict[str, Any]]) -> str:
    """Text of the first user message."""
    content = next((message["content"] for message in messages if message["role"] == "user"), "")
    if isinstance(content, list):
        content = " ".join(part.get("text") or "" for part in content)
    return content or ""


def _votes(rows: list[dict[str, Any]]) -> tuple[int, int]:
    counts = Counter(row["rating"] for row in rows)
    return counts["up"], counts["down"]


def _report(paths: Paths, measures: list[Measure]) -> Path:
    """Write the drift report as a file and as an artifact of the flow run."""
    from prefect.artifacts import create_markdown_artifact

    lines = ["# Drift", "", "| measure | value | threshold | samples | |", "|---|---|---|---|---|"]
    for measure in measures:
        figures = f"{measure.value:.4f} | {measure.threshold:.4f} | {measure.samples}"
        lines.append(f"| {measure.name} | {figures} | {'DRIFTED' if measure.drifted else ''} |")
    if not measures:
        lines += ["", "No recent requests, or nothing to compare them with."]
    folder = paths.home / "reports"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"drift-{time.strftime('%Y-%m-%d')}.md"
    write_text(file, "\n".join(lines) + "\n")
    with warn_on_failure("Prefect artifact drift"):
        create_markdown_artifact("\n".join(lines), key="drift", description="Prompts and ratings against the past")
    return file


def _emit_event(drifted: list[str]) -> None:
    from prefect.events import emit_event

    emit_event(EVENT, {"prefect.resource.id": "loopwright.monitor"}, payload={"drifted": drifted})
