"""What the loop makes of corrections: `python -m benchmarks.loop` in a project whose pipeline has run.

A scripted user asks forty questions of a held-out suite, each about another class or picture, and corrects every
answer into a style of their own. The candidate that comes of it is asked other questions of that suite, and the suites
of every other skill. Then the same corrections are dealt out to the wrong questions, with a new seed each time: noise,
which the gate must refuse. The colors of pictures, in a project of examples.sight:

    python -m benchmarks.loop --project DIR --dataset sight-vqa --suite vqa/color --wording "The color is {}."
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from components.agent.agent import Answer
from components.agent.batch_rollout import answer_all
from components.config.params import Params, load_params
from components.config.paths import Paths, find_root
from components.datasets.formats import Row, read_rows
from components.datasets.images import complete_messages
from components.evaluation.compare_agents import judge
from components.evaluation.evaluate import ANSWERS, ANSWERS_OF
from components.evaluation.parallel_rollout import load_agent
from components.feedback.curate import curate
from components.feedback.items import NO_CALL, PICTURES, PICTURES_SCHEMA, SCHEMA
from components.inference.sampling import Sampling
from components.media.messages import pictures_of
from components.runtime.stage import StageRun
from components.tracking.event_log import NoTracker
from components.training.align import align

MAX_UNCORRECTED = 200
"""Questions that nobody corrected."""


def styled(row: Row, wording: str) -> str:
    """The answer as the scripted user wants it: of a conversation with a call, its result in other words."""
    answer = row["messages"][2 if len(row["messages"]) > 2 else 1]
    return wording.format(answer["content"])


def question(row: Row) -> list[Row]:
    return complete_messages(row)[:1]


def answers(folder: Path, rows: Sequence[Row]) -> list[Answer | None]:
    model, agent = load_agent(folder)
    sampling = Sampling(max_new_tokens=96, stop_ids=(agent.tokenizer.end_id,))
    return answer_all(model, agent, [(question(row), None) for row in rows], sampling, 64)


def item(number: int, row: Row, answer: Answer | None, correction: str) -> Row:
    """A vote as ingestion would have written it."""
    steps = list(answer.steps) if answer else []
    pictures = pictures_of(question(row))
    without_call = PICTURES if pictures else NO_CALL
    return {
        "feedback_id": f"fb-{number:04d}",
        "sequence": number + 1,
        "completion_id": f"chatcmpl-{number:04d}",
        "created": float(number),
        "model": "agent/1",
        "messages": row["messages"][:1],
        "images": [picture.digest for picture in pictures],
        "tools": None,
        "steps": json.dumps(steps),
        "answer": answer.content if answer else "",
        "rating": "down",
        "correction": correction,
        "comment": None,
        "voice": "local",
        "skill": next((step["name"] for step in reversed(steps) if step["type"] == "call"), without_call),
    }


def votes(rows: Sequence[Row], answered: Sequence[Answer | None], corrections: Sequence[str]) -> list[Row]:
    triples = zip(rows, answered, corrections, strict=True)
    return [item(number, row, answer, text) for number, (row, answer, text) in enumerate(triples)]


def workshop(project: Paths, folder: Path) -> Paths:
    """A folder with what the three stages read; the champion is the model that `tune` made."""
    paths = Paths(folder)
    (folder / "data/models").mkdir(parents=True)
    shutil.copy(project.params, paths.params)
    paths.collected.symlink_to(project.collected)
    for copy, notes in ((paths.champion, {}), (paths.start, {"origin.json": {"version": "agent/1"}})):
        shutil.copytree(project.agent, copy)
        for name, value in notes.items():
            (copy / name).write_text(json.dumps(value))
    for name in (ANSWERS, ANSWERS_OF):
        if (project.evaluation / name).is_file():
            shutil.copy(project.evaluation / name, paths.champion)
    return paths


def write_feedback(paths: Paths, items: Sequence[Row], rows: Sequence[Row]) -> None:
    """The partition that ingestion would have written, and the pictures that `items` refer to."""
    shutil.rmtree(paths.feedback, ignore_errors=True)
    paths.feedback.mkdir()
    numbers = f"{1:09d}-{len(items):09d}"
    pq.write_table(pa.Table.from_pylist(list(items), schema=SCHEMA), paths.feedback / f"items-{numbers}.parquet")
    pictures = {picture.digest: picture.png() for row in rows for picture in pictures_of(question(row))}
    if pictures:
        files = [{"digest": digest, "content": content} for digest, content in pictures.items()]
        table = pa.Table.from_pylist(files, schema=PICTURES_SCHEMA)
        pq.write_table(table, paths.feedback / f"pictures-{numbers}.parquet")


def run_stage(stage: Callable[[StageRun], None], params: Params, paths: Paths) -> None:
    """A stage in this process, which the pipeline gives each of them too."""
    started = time.monotonic()
    state = paths.root / "state" / stage.__name__
    shutil.rmtree(state, ignore_errors=True)
    state.mkdir(parents=True)
    stage(StageRun(stage.__name__, params, paths, state, NoTracker()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{stage.__name__}: {time.monotonic() - started:.0f} s, at most {peak:.1f} GiB", flush=True)


def improve(paths: Paths, seed: int, questions: int) -> Row:
    """Curate, align and judge; returns the verdict."""
    limits = {"judge.max_questions": questions, "evaluate.max_questions": questions} if questions else {}
    params = load_params(paths.params, {"seed": seed, **limits})
    for stage in (curate, align, judge):
        process = multiprocessing.get_context("spawn").Process(target=run_stage, args=(stage, params, paths))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"benchmarks.loop: {stage.__name__} ended with status {process.exitcode}")
    verdict: Row = json.loads((paths.metrics / "judge.json").read_text(encoding="utf-8"))
    return verdict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--noise-seeds", type=int, default=3)
    parser.add_argument("--project", type=Path, default=None, help="Its folder; that of the working directory.")
    parser.add_argument("--dataset", default="stdlib-conversations")
    parser.add_argument("--suite", default="bases/held_out_symbols")
    parser.add_argument("--wording", default="Base class: {}", help="Of the corrections; {} is the right answer.")
    parser.add_argument("--corrections", type=int, default=40)
    parser.add_argument("--questions", type=int, default=0, help="Of each suite for the gate; 0: as params.yaml says.")
    arguments = parser.parse_args()
    project = Paths(find_root(arguments.project))
    rows = [row for row in read_rows(project.collected / arguments.dataset, "test") if row["suite"] == arguments.suite]
    random.Random(0).shuffle(rows)
    corrected, uncorrected = rows[: arguments.corrections], rows[arguments.corrections :][:MAX_UNCORRECTED]
    answers_before = answers(project.agent, corrected)
    corrections = [styled(row, arguments.wording) for row in corrected]
    with tempfile.TemporaryDirectory() as scratch:
        paths = workshop(project, Path(scratch) / "project")
        started = time.monotonic()
        write_feedback(paths, votes(corrected, answers_before, corrections), corrected)
        verdict = improve(paths, 0, arguments.questions)
        print(f"corrections: promoted {verdict['promote']} in {time.monotonic() - started:.1f} s: {verdict['reason']}")
        answers_after = answers(paths.candidate, uncorrected)
        pairs = zip(answers_after, uncorrected, strict=True)
        right = sum(a is not None and a.content == styled(row, arguments.wording) for a, row in pairs)
        print(f"as corrected on {len(uncorrected)} questions that nobody corrected: {right / len(uncorrected):.3f}")
        for finding in verdict["findings"]:
            before, after = finding["champion"], finding["candidate"]
            print(f"  {finding['skill']:22} {before:.3f} → {after:.3f}  {after - before:+.3f}  {finding['outcome']}")
        refused = 0
        for seed in range(1, arguments.noise_seeds + 1):
            shuffled = list(corrections)
            random.Random(seed).shuffle(shuffled)
            write_feedback(paths, votes(corrected, answers_before, shuffled), corrected)
            verdict = improve(paths, seed, arguments.questions)
            refused += not verdict["promote"]
            print(f"noise, seed {seed}: promoted {verdict['promote']}: {verdict['reason']}", flush=True)
        print(f"noise refused: {refused} of {arguments.noise_seeds}")


if __name__ == "__main__":
    main()
