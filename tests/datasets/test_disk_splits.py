"""Splits decided from files are those decided in memory: the same rows in the same order, and the same reasons."""

import os
import random
import resource
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from components.config.params import load_params
from components.config.paths import Paths
from components.datasets import collect as collect_stage
from components.datasets import formats
from components.datasets.added_rows import by_label
from components.datasets.collect import collect
from components.datasets.deduplication import PERMUTATIONS, Splits
from components.datasets.disk_splits import DiskSplits, SignatureFiles
from components.datasets.formats import DatasetWriter, Kind, Row, Split, row_id
from components.runtime import shards as shard_runs
from components.runtime.files import remove
from components.runtime.stage import StageRun, digest

ROOT = Path(__file__).parents[2]
WORDS = [f"word{number}" for number in range(3000)]
SIMILARITY = 0.7


class Silent:
    """A tracker that keeps nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def documents(count: int, seed: int) -> list[Row]:
    """New texts, exact copies, near-copies, short texts, and relatives that share more bands than an index holds."""
    draw = random.Random(seed)
    base = random.Random(0).choices(WORDS, k=90)
    texts: list[str] = []
    for number in range(count):
        words = draw.choices(WORDS, k=draw.randrange(3, 60))
        if texts and number % 4 == 1:
            words = draw.choice(texts).split()
            for _ in range(number % 3):
                words[draw.randrange(len(words))] = draw.choice(WORDS)
        elif number % 4 == 2:
            words = [*base[:66], *draw.choices(WORDS, k=24)]
        texts.append(" ".join(words))
    return [{"id": row_id(text, str(number)), "text": text, "source": "here"} for number, text in enumerate(texts)]


def conversations(count: int, seed: int) -> list[Row]:
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        turns = [("user", f"question {draw.randrange(600)}"), ("assistant", f"answer {draw.randrange(2)}")]
        messages = [
            {"role": role, "content": text, "tool_calls": None, "tool_call_id": None, "name": None}
            for role, text in turns
        ]
        rows.append({"id": str(number), "messages": messages, "tools": None, "suite": None})
    return rows


def write(
    splits: Splits | DiskSplits, folder: Path, kind: Kind, datasets: list[dict[Split, list[Row]]]
) -> list[object]:
    """The folder of each dataset, written as `collect` does; what was dropped."""
    writers = [DatasetWriter(folder / str(number), str(number), kind) for number in range(len(datasets))]
    for writer in writers:
        writer.__enter__()
    held_out: tuple[Split, ...] = ("test", "validation")
    for split in held_out:
        for writer, rows in zip(writers, datasets, strict=True):
            splits.write_held_out(split, rows[split], writer)
    for writer, rows in zip(writers, datasets, strict=True):
        splits.write_train(rows["train"], writer)
    splits.finish()
    for writer in writers:
        writer.__exit__(None)
    return [asdict(writer.info) for writer in writers]


@pytest.mark.parametrize(("kind", "rows_of"), [("documents", documents), ("conversations", conversations)])
def test_files_decide_as_memory_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind, rows_of: Callable[[int, int], list[Row]]
) -> None:
    monkeypatch.setattr(formats, "ROWS_PER_GROUP", 20)
    monkeypatch.setattr(formats, "ROWS_PER_SHARD", 100)
    rows = [[*rows_of(160, seed), *rows_of(60, 0)] for seed in (1, 2, 3)]  # all share some
    datasets: list[dict[Split, list[Row]]] = [
        {"test": each[:40], "validation": each[40:60], "train": each[60:]} for each in rows
    ]
    run = StageRun(
        "collect", load_params(ROOT / "params.yaml", {"scale": "smoke"}), Paths(tmp_path), tmp_path / "state", Silent()
    )
    in_memory = write(Splits(kind, SIMILARITY, 3), tmp_path / "memory", kind, datasets)
    on_disk = write(DiskSplits(run, kind, SIMILARITY, 3), tmp_path / "disk", kind, datasets)
    assert on_disk == in_memory
    assert digest(tmp_path / "disk") == digest(tmp_path / "memory")
    reasons = {reason for info in in_memory for reason in info["dropped"]}  # type: ignore[index]
    assert reasons == {"in_test", "exact_duplicate"} | ({"near_duplicate"} if kind == "documents" else set())
    assert not (run.state / "waiting").exists(), "scratch rows are gone"


def add(folder: Path, name: str, kind: Kind, rows: list[Row]) -> None:
    with DatasetWriter(folder / "data/added" / name, name, kind) as writer:
        for row in rows:
            writer.write("train", row)


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StageRun:
    """The stage `collect` of datasets of every kind that goes by files, several shards each."""
    monkeypatch.setattr(formats, "ROWS_PER_GROUP", 20)
    monkeypatch.setattr(formats, "ROWS_PER_SHARD", 50)
    texts = [{**row, "label": f"label {number % 3}"} for number, row in enumerate(documents(150, 4))]
    chats = conversations(300, 5)
    for row in chats[::7]:
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": "é"}'}}
        row["messages"][1] |= {"content": None, "tool_calls": [call]}
        row["tools"] = "[]"
    pairs = [{"id": row["id"], "source": row["text"], "target": str(n)} for n, row in enumerate(documents(120, 6))]
    add(tmp_path, "notes", "documents", documents(160, 1))
    add(tmp_path, "more", "documents", documents(90, 2))
    add(tmp_path, "few", "documents", documents(2, 3))
    add(tmp_path, "chats", "conversations", chats)
    add(tmp_path, "tickets", "labelled_texts", [{key: row[key] for key in ("id", "text", "label")} for row in texts])
    add(tmp_path, "pairs", "text_pairs", pairs)
    documents_of = {f"pretrain.{family}.dataset": ["notes", "more", "few"] for family in MODEL_FAMILIES}
    others = {"tune.dataset": "chats", "classifier.dataset": "tickets", "summarizer.dataset": "pairs"}
    params = load_params(ROOT / "params.yaml", {"scale": "smoke", "seed": 3, **documents_of, **others})
    return StageRun("collect", params, Paths(tmp_path), tmp_path / "state", Silent())


MODEL_FAMILIES = ("decoder", "encoder", "encoder_decoder")


def test_added_datasets_are_split_by_files_as_in_memory(added: StageRun, monkeypatch: pytest.MonkeyPatch) -> None:
    collect(added)
    in_memory = digest(added.paths.collected)
    assert not added.state.exists()
    monkeypatch.setattr(collect_stage, "MAX_ROWS_IN_MEMORY", 0)
    collect(added)
    assert digest(added.paths.collected) == in_memory
    workers = added.params.run.model_copy(update={"workers": 2})
    again = replace(added, params=added.params.model_copy(update={"run": workers}), state=added.state.with_name("two"))
    monkeypatch.setattr(shard_runs, "_in_processes", lambda name, jobs, workers: (job.run() for job in reversed(jobs)))
    collect(again)
    assert digest(added.paths.collected) == in_memory


@pytest.mark.parametrize("share", [0.1, 0.4, 0.7, 0.95])
def test_a_collection_that_is_killed_does_at_most_one_shard_again(
    added: StageRun, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    monkeypatch.setattr(collect_stage, "MAX_ROWS_IN_MEMORY", 0)
    begun: list[str] = []
    stop_after, run = [10**6], shard_runs._Job.run

    def counted(job: Any) -> dict[str, Any]:
        begun.append(job.shard.key)
        if len(begun) == stop_after[0]:
            raise KeyboardInterrupt
        return run(job)

    monkeypatch.setattr(shard_runs._Job, "run", counted)
    collect(added)
    unbroken, total = digest(added.paths.collected), len(begun)
    assert len(set(begun)) == total > 30
    remove(added.state)
    begun.clear()
    stop_after[0] = round(share * total)
    with pytest.raises(KeyboardInterrupt):
        collect(added)
    stop_after[0] = 10**6
    collect(added)
    assert digest(added.paths.collected) == unbroken
    assert len(begun) == total + 1


def test_there_may_be_more_shards_than_files_that_a_process_may_open(tmp_path: Path) -> None:
    signatures = np.arange(60 * 2 * PERMUTATIONS, dtype=np.uint32).reshape(120, PERMUTATIONS)
    files = [tmp_path / str(number) for number in range(60)]
    for file, rows in zip(files, np.split(signatures, 60), strict=True):
        file.write_bytes(rows.tobytes())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 30, hard))
    try:
        stored = SignatureFiles(files, list(range(0, 122, 2)))
        np.testing.assert_array_equal([stored[row] for row in range(120)], signatures)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_repeated_id_among_held_out_rows_is_named() -> None:
    rows = [{"id": "same", "label": "a"}, {"id": "same", "label": "a"}]
    with pytest.raises(ValueError, match=r"^'a': id 'same' is there twice; give"):
        by_label(lambda: [*rows, {"id": "other", "label": "a"}], 0.6, 0.1, 0)
