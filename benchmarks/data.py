"""Speed and memory of the stages that read data, at several sizes.

    python -m benchmarks.data --megabytes 50 200

Writes documents of words of the standard library's sources, a twentieth of them near-copies, and runs each stage on
them in a process of its own: seconds, those of processors, and the peak memory of the stage and of its largest worker
(resident pages, with those of libraries and mapped files).
`prepare` is compared with `encode_batch` of tokenizers on as many cores; without copy augmentation, so that both have
the same tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from components.config.params import load_params
from components.config.paths import Paths
from components.datasets import collect as collect_stage
from components.datasets import formats
from components.datasets.formats import DatasetWriter, batched, read_rows
from components.runtime.shards import RAYON_THREADS
from components.runtime.stage import StageRun, stage_function
from components.tracking.event_log import NoTracker

ROOT = Path(__file__).parents[1]
NAME = "notes"
WORDS_OF_DOCUMENT = 250
NEAR_COPIES = 0.05
BATCH = 512
STAGES = ("collect", "validate", "train_tokenizer@decoder", "prepare@decoder")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[50, 200])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="processes of `prepare`")
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES, help="each needs those before it")
    parser.add_argument("--rows-per-shard", type=int, default=formats.ROWS_PER_SHARD)
    parser.add_argument("--on-disk", action="store_true", help="decide duplicates from files at every size")
    parser.add_argument("--run", nargs=3, metavar=("STAGE", "FOLDER", "WORKERS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        stage, folder, workers = arguments.run
        formats.ROWS_PER_SHARD = arguments.rows_per_shard
        collect_stage.MAX_ROWS_IN_MEMORY = 0 if arguments.on_disk else collect_stage.MAX_ROWS_IN_MEMORY
        print(json.dumps(measured(stage, Path(folder), int(workers))))
        return
    options = ["--rows-per-shard", str(arguments.rows_per_shard), *(["--on-disk"] if arguments.on_disk else [])]
    print("megabytes  stage                    workers  seconds  processor  peak MB  of a worker")
    for megabytes in arguments.megabytes:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            write_documents(folder / "data/added" / NAME, megabytes * 10**6)
            measure(folder, megabytes, arguments.stages, arguments.workers, options)


def measure(folder: Path, megabytes: int, stages: Sequence[str], workers: list[int], options: list[str]) -> None:
    """Print a line for each stage, and the speed of `prepare` beside that of tokenizers."""
    (folder / "data/expectations").symlink_to(ROOT / "data/expectations")
    runs = [(stage, 1) for stage in STAGES[:-1] if stage in stages]
    if STAGES[-1] in stages:
        runs += [(stage, count) for stage in (STAGES[-1], "encode_batch") for count in workers]
    prepared: dict[int, dict[str, Any]] = {}
    for stage, count in runs:
        figures = in_process(stage, folder, count, options)
        seconds, processor, peak, of_worker = (figures[name] for name in ("seconds", "processor", "peak", "worker"))
        print(
            f"{megabytes:9}  {stage:<23}  {count:7}  {seconds:7.1f}  {processor:9.1f}  {peak:7}  {of_worker:11}",
            flush=True,
        )
        if stage == STAGES[-1]:
            prepared[count] = figures
        if stage == "encode_batch":
            prepare = prepared[count]
            speed, reference = prepare["tokens"] / prepare["seconds"], figures["tokens"] / seconds
            speedup = prepared[workers[0]]["seconds"] / prepare["seconds"]
            of_processor = figures["processor"] / figures["tokens"] * prepare["tokens"] / prepare["processor"]
            print(
                f"{megabytes:9}  prepare by {count}: {speed:,.0f} tokens/s, {speed / reference:.2f} x encode_batch"
                f" ({of_processor:.2f} x a processor second), {speedup:.2f} x"
                f" of {workers[0]} worker(s)",
                flush=True,
            )


def in_process(stage: str, folder: Path, workers: int, options: list[str]) -> dict[str, Any]:
    """The figures of a stage, run in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.data", "--run", stage, str(folder), str(workers)]
    cores = "1" if workers == 1 else str(workers)
    ended = subprocess.run(
        [*command, *options],
        env={**os.environ, RAYON_THREADS: cores},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    figures: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return figures


def measured(stage: str, folder: Path, workers: int) -> dict[str, Any]:
    """Run a stage here: seconds, tokens, and the peak memory of this process and of its largest child, in megabytes."""
    paths = Paths(folder)
    values = {
        "scale": "smoke",
        "pretrain.decoder.dataset": NAME,
        "prepare.decoder.copy_rate": 0.0,
        "run.workers": workers,
    }
    run = StageRun(
        stage, load_params(ROOT / "params.yaml", values), paths, folder / "state" / f"{stage}-{workers}", NoTracker()
    )
    work: Callable[[StageRun], object] = encode if stage == "encode_batch" else stage_function(stage)
    started, before = time.perf_counter(), processor_seconds()
    tokens = work(run)
    seconds, processor = time.perf_counter() - started, processor_seconds() - before
    if stage.startswith("prepare"):
        counts = json.loads((paths.metrics / f"{stage}.json").read_text())["pretrain"]
        tokens = counts["train_tokens"] + counts["test_tokens"]
    own, children = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {
        "seconds": seconds,
        "processor": processor,
        "tokens": tokens,
        "peak": own >> 10,
        "worker": children >> 10,
    }


def processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def encode(run: StageRun) -> int:
    """The tokens of all documents, by tokenizers alone."""
    tokenizer = Tokenizer.from_file(str(run.paths.tokenizer("decoder") / "tokenizer.json"))
    folder = run.paths.collected / NAME
    tokens = 0
    for split in ("train", "test"):
        for texts in batched((row["text"] for row in read_rows(folder, split, ["text"])), BATCH):
            tokens += sum(len(encoding) for encoding in tokenizer.encode_batch(texts, add_special_tokens=False))
    return tokens


def write_documents(folder: Path, size: int) -> None:
    """A dataset of documents with so many bytes of text."""
    sources = "\n".join(path.read_text(encoding="utf-8") for path in sorted(Path(os.__file__).parent.glob("*.py")))
    words = re.findall(r"\S+\s*", sources)
    with DatasetWriter(folder, NAME, "documents") as writer:
        for number, text in enumerate(_texts(words, size)):
            writer.write("train", {"id": f"{NAME}-{number}", "text": text, "source": NAME})


def _texts(words: list[str], size: int) -> Iterator[str]:
    draw = random.Random(0)
    text: list[str] = []
    while size > 0:
        if text and draw.random() < NEAR_COPIES:
            text[draw.randrange(len(text))] = draw.choice(words)
        else:  # runs of eight words, as text has them
            starts = draw.choices(range(len(words) - 8), k=draw.randrange(1, WORDS_OF_DOCUMENT // 4))
            text = [word for start in starts for word in words[start : start + 8]]
        joined = "".join(text)
        size -= len(joined.encode())
        yield joined


if __name__ == "__main__":
    main()
