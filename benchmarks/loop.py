"""What the loop makes of corrections: `python -m benchmarks.loop` in a project whose pipeline has run.

A scripted user asks forty questions about base classes, each of another class, and corrects every answer into a style
of their own. The candidate that comes of it is asked questions about classes that it was not corrected on, and the
suites of every other skill. Then the same corrections are dealt out to the wrong questions, with a new seed each time:
noise, which the gate must refuse.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from components.agent.agent import Agent, Answer
from components.agent.batch_rollout import answer_all
from components.config.params import load_params
from components.config.paths import Paths, find_root
from components.datasets.formats import Row, read_rows
from components.evaluation.compare_agents import judge
from components.feedback.curate import curate
from components.feedback.items import SCHEMA
from components.inference.sampling import Sampling
from components.models.checkpoint import load_decoder
from components.runtime.stage import StageRun
from components.training.align import align

CORRECTIONS = 40
SUITE = "bases/held_out_symbols"


class Silent:
    """A tracker that tells nobody."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def styled(row: Row) -> str:
    """The answer as the scripted user wants it."""
    return f"Base class: {row['messages'][2]['content']}"


def answers(folder: Path, rows: Sequence[Row]) -> list[Answer | None]:
    model = load_decoder(folder)
    agent = Agent.load(folder, model.config.max_seq_len)
    sampling = Sampling(max_new_tokens=96, stop_ids=(agent.tokenizer.end_id,))
    return answer_all(model, agent, [(row["messages"][:1], None) for row in rows], sampling, 64)


def item(number: int, row: Row, answer: Answer | None, correction: str) -> Row:
    """A vote as ingestion would have written it."""
    said = answer.content if answer else ""
    steps = list(answer.steps) if answer else []
    return {
        "feedback_id": f"fb-{number:04d}",
        "sequence": number + 1,
        "completion_id": f"chatcmpl-{number:04d}",
        "created": float(number),
        "model": "agent/1",
        "messages": row["messages"][:1],
        "tools": None,
        "steps": json.dumps(steps),
        "answer": said,
        "rating": "down",
        "correction": correction,
        "comment": None,
        "voice": "local",
        "skill": next((step["name"] for step in reversed(steps) if step["type"] == "call"), "conversation"),
    }


def votes(rows: Sequence[Row], said: Sequence[Answer | None], corrections: Sequence[str]) -> list[Row]:
    given = zip(rows, said, corrections, strict=True)
    return [item(number, row, answer, text) for number, (row, answer, text) in enumerate(given)]


def workshop(project: Paths, folder: Path) -> Paths:
    """A folder with what the three stages read; the champion is the model that `tune` made."""
    paths = Paths(folder)
    (folder / "data/models").mkdir(parents=True)
    shutil.copy(project.params, paths.params)
    paths.collected.symlink_to(project.collected)
    for place, notes in ((paths.champion, {}), (paths.start, {"origin.json": {"version": "agent/1"}})):
        shutil.copytree(project.agent, place)
        for name, value in notes.items():
            (place / name).write_text(json.dumps(value))
    for name in ("answers.parquet", "answers.json"):
        shutil.copy(project.evaluation / name, paths.champion)
    return paths


def improve(paths: Paths, items: Sequence[Row], seed: int) -> Row:
    """Curate, align and judge; returns the verdict."""
    shutil.rmtree(paths.feedback, ignore_errors=True)
    paths.feedback.mkdir()
    table = pa.Table.from_pylist(list(items), schema=SCHEMA)
    pq.write_table(table, paths.feedback / f"items-{1:09d}-{len(items):09d}.parquet")
    params = load_params(paths.params, {"seed": seed})
    for stage in (curate, align, judge):
        state = paths.root / "state" / stage.__name__
        shutil.rmtree(state, ignore_errors=True)
        state.mkdir(parents=True)
        stage(StageRun(stage.__name__, params, paths, state, Silent()))
    verdict: Row = json.loads((paths.metrics / "judge.json").read_text(encoding="utf-8"))
    return verdict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--noise-seeds", type=int, default=3)
    given = parser.parse_args()
    project = Paths(find_root())
    rows = [row for row in read_rows(project.collected / "stdlib-conversations", "test") if row["suite"] == SUITE]
    random.Random(0).shuffle(rows)
    corrected, others = rows[:CORRECTIONS], rows[CORRECTIONS:]
    said = answers(project.agent, corrected)
    wanted = [styled(row) for row in corrected]
    with tempfile.TemporaryDirectory() as scratch:
        paths = workshop(project, Path(scratch) / "project")
        started = time.monotonic()
        verdict = improve(paths, votes(corrected, said, wanted), seed=0)
        print(f"corrections: promoted {verdict['promote']} in {time.monotonic() - started:.1f} s: {verdict['reason']}")
        asked = answers(paths.candidate, others)
        right = sum(a is not None and a.content == styled(row) for a, row in zip(asked, others, strict=True))
        print(f"as corrected on {len(others)} classes that nobody corrected: {right / len(others):.3f}")
        for one in verdict["findings"]:
            change = one["candidate"] - one["champion"]
            print(
                f"  {one['skill']:22} {one['champion']:.3f} → {one['candidate']:.3f}  {change:+.3f}  {one['outcome']}"
            )
        refused = 0
        for seed in range(1, given.noise_seeds + 1):
            dealt = list(wanted)
            random.Random(seed).shuffle(dealt)
            verdict = improve(paths, votes(corrected, said, dealt), seed)
            refused += not verdict["promote"]
            print(f"noise, seed {seed}: promoted {verdict['promote']}: {verdict['reason']}", flush=True)
        print(f"noise refused: {refused} of {given.noise_seeds}")


if __name__ == "__main__":
    main()
