"""The daily look: do people ask, and judge, otherwise than what the model learned from?"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from components.config.paths import Paths
from components.datasets.formats import read_info, shards
from components.feedback.drift import Measure, compare, first_words, lengths, rating_change
from components.feedback.store import Store, has_store
from components.tracking.event_log import warn_on_failure
from flows.orchestration.flow_run import Echo, FlowRun, effect, run_flow

EVENT = "loopwright.drift"
DAY_SECONDS = 86_400
_MOST = 10_000


def monitor(root: Path, echo: Echo = print) -> list[Measure]:
    """Compare a day's prompts with the training conversations and its votes with the thirty days before."""
    paths = Paths(root)

    def look(run: FlowRun) -> list[Measure]:
        measures = _measures(paths)
        for one in measures:
            echo(f"monitor: {one.name} {one.value:.3f}, threshold {one.threshold:.3f}, {one.samples} seen")
        effect(_report, paths, measures)
        if drifted := [one.name for one in measures if one.drifted]:
            effect(_raise_event, drifted)
        return measures

    return run_flow("monitor", paths.home, echo, look)


def _measures(paths: Paths) -> list[Measure]:
    if not has_store(paths.home):
        return []
    store = Store.of(paths.home)
    now = time.time()
    try:
        month = store.recent(now - 31 * DAY_SECONDS, _MOST)
    finally:
        store.close()
    today = [row for row in month if row["created"] > now - DAY_SECONDS]
    past = [row for row in month if row["created"] <= now - DAY_SECONDS]
    asked = [_text(row["body"].get("messages", [])) for row in today]
    taught = _taught(paths)
    found = []
    if asked and taught:
        found.append(compare("prompt length", lengths(taught), lengths(asked)))
        found.append(compare("first word", *first_words(taught, asked)))
    if (before := _votes(past)) != (0, 0) and (lately := _votes(today)) != (0, 0):
        found.append(rating_change(before, lately))
    return found


def _taught(paths: Paths) -> list[str]:
    """First questions of the conversations that were trained on."""
    folders = [file.parent for file in paths.collected.glob("*/dataset.json")]
    files = [file for one in folders if read_info(one).kind == "conversations" for file in shards(one, "train")]
    return [
        _text(row or []) for file in files for row in pq.read_table(file, columns=["messages"])["messages"].to_pylist()
    ]


def _text(messages: list[dict[str, Any]]) -> str:
    """What the person said first."""
    said = next((one["content"] for one in messages if one["role"] == "user"), "")
    if isinstance(said, list):
        said = " ".join(part.get("text") or "" for part in said)
    return said or ""


def _votes(rows: list[dict[str, Any]]) -> tuple[int, int]:
    counts = Counter(row["rating"] for row in rows)
    return counts["up"], counts["down"]


def _report(paths: Paths, measures: list[Measure]) -> Path:
    """Write the report as a file and as an artifact of the flow run."""
    from prefect.artifacts import create_markdown_artifact

    lines = ["# Drift", "", "| measure | value | threshold | seen | |", "|---|---|---|---|---|"]
    for one in measures:
        state = "DRIFTED" if one.drifted else ""
        lines.append(f"| {one.name} | {one.value:.4f} | {one.threshold:.4f} | {one.samples} | {state} |")
    if not measures:
        lines += ["", "Nothing was asked in the last day, or there is nothing to compare it with."]
    folder = paths.home / "reports"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"drift-{time.strftime('%Y-%m-%d')}.md"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with warn_on_failure("Prefect artifact drift"):
        create_markdown_artifact("\n".join(lines), key="drift", description="Prompts and ratings against the past")
    return file


def _raise_event(drifted: list[str]) -> None:
    from prefect.events import emit_event

    emit_event(EVENT, {"prefect.resource.id": "loopwright.monitor"}, payload={"drifted": drifted})
