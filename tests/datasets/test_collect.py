"""The stage collect: every dataset is written alike, with the same bytes each time, and no test row in training."""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.config.params import InputError, load_params
from components.config.paths import Paths
from components.datasets.collect import collect
from components.datasets.formats import DatasetWriter, Kind, read_info, read_rows
from components.runtime.stage import StageRun
from examples.stdlib_agent import datasets
from examples.stdlib_agent.knowledge import Knowledge
from examples.stdlib_agent.library_datasets import AREAS, CONVERSATIONS, DOCUMENTS, SUMMARIES

ROOT = Path(__file__).parents[2]


class Silent:
    """A tracker that keeps nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def stage_run(folder: Path, **overrides: Any) -> StageRun:
    values = {"scale": "smoke", **{key.replace("__", "."): value for key, value in overrides.items()}}
    return StageRun("collect", load_params(ROOT / "params.yaml", values), Paths(folder), folder / "state", Silent())


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def add(folder: Path, name: str, kind: Kind, count: int) -> None:
    with DatasetWriter(folder / "data/added" / name, name, kind) as writer:
        writer.info.sources = [{"name": f"{name}.txt", "sha256": "0" * 64}]
        for number in range(count):
            text = f"row {number % 40} says one thing about number {number % 40} and another"
            messages = [{"role": "user", "content": text}, {"role": "assistant", "content": str(number % 40)}]
            row = {"text": text, "source": "here"} if kind == "documents" else {"messages": messages}
            writer.write("train", {"id": f"{name}-{number}", **row})


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("collected")
    collect(stage_run(folder))
    return folder


def test_the_reference_datasets_are_written(collected: Path) -> None:
    folder = collected / "data/collected"
    assert sorted(path.name for path in folder.iterdir()) == sorted(datasets)
    conversations, documents = read_info(folder / CONVERSATIONS), read_info(folder / DOCUMENTS)
    assert conversations.rows["train"] == 600
    assert conversations.dropped == {}
    assert documents.rows["train"] > 80
    assert documents.rows["test"] > 20
    assert documents.sources[0]["name"] == f"standard library of Python {sys.version}"
    assert Knowledge(collected / "data/agent/tools/files/knowledge.sqlite").bases("collections.OrderedDict") == "dict"


def test_metrics_count_rows_kept_dropped_and_held_out(collected: Path) -> None:
    metrics = json.loads((collected / "data/metrics/collect.json").read_text())
    assert metrics["python"] == sys.version
    assert metrics["datasets"][CONVERSATIONS]["rows"] == read_info(collected / "data/collected" / CONVERSATIONS).rows
    assert set(metrics["datasets"][DOCUMENTS]) == {"kind", "rows", "dropped"}
    assert metrics["held_out_packages"]
    assert metrics["symbols"] > metrics["trained_symbols"] > metrics["held_out_symbols"] > 0


def test_collecting_twice_gives_the_same_bytes(collected: Path, tmp_path: Path) -> None:
    before = digests(collected / "data")
    collect(stage_run(tmp_path))
    assert digests(tmp_path / "data") == before
    collect(stage_run(tmp_path))
    assert digests(tmp_path / "data") == before


def test_held_out_symbols_are_in_no_training_document(collected: Path) -> None:
    folder = collected / "data/collected" / DOCUMENTS
    packages = json.loads((collected / "data/metrics/collect.json").read_text())["held_out_packages"]
    train, test = list(read_rows(folder, "train")), list(read_rows(folder, "test"))
    assert not {row["id"] for row in train} & {row["id"] for row in test}
    assert not [row["id"] for row in train if row["source"].partition(".")[0] in packages]
    assert not {row["text"] for row in train} & {row["text"] for row in test}
    assert {row["id"].rpartition("#")[2] for row in train} == {"docstring", "source"}


def test_an_added_dataset_enters_by_the_same_door(tmp_path: Path) -> None:
    add(tmp_path, "notes", "documents", 50)
    add(tmp_path, "chats", "conversations", 50)
    with DatasetWriter(tmp_path / "data/added/many", "many", "documents") as writer:
        writer.info.licence = "CC0-1.0"
        for number in range(1000):
            writer.write("train", {"id": f"many-{number}", "text": f"note {number}", "source": "here"})
    run = stage_run(tmp_path, pretrain__decoder__dataset=[DOCUMENTS, "notes", "many"], tune__dataset="chats")
    collect(run)
    folder = tmp_path / "data/collected"
    reference = sorted(set(datasets) - {CONVERSATIONS})
    assert sorted(path.name for path in folder.iterdir()) == ["chats", "many", "notes", *reference]
    # Four standard deviations of a fair choice.
    assert abs(read_info(folder / "many").rows["test"] - 1000 * run.params.collect.held_out_share) < 41
    for name in ("chats", "notes"):
        info = read_info(folder / name)
        assert sum(info.rows.values()) + sum(info.dropped.values()) == 50
        assert 1 <= info.rows["test"] < info.rows["train"]
        assert sum(info.dropped.values()) >= 10
        assert info.sources[0]["name"] == f"{name}.txt"
        train, test = ({row["id"] for row in read_rows(folder / name, split)} for split in ("train", "test"))
        assert not train & test
    licences = [read_info(folder / name).licence for name in (DOCUMENTS, "many", "notes")]
    assert licences == ["PSF-2.0", "CC0-1.0", ""]
    assert (tmp_path / "data/agent/tools/files/knowledge.sqlite").is_file()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"pretrain__decoder__dataset": "nothing"},
            r"params\.yaml: pretrain\.decoder\.dataset: 'nothing' is not a dataset; known: notes, stdlib-areas, "
            r'stdlib-conversations, stdlib-documents, stdlib-summaries; add one with "loopwright data add"',
        ),
        (
            {"tune__dataset": ["stdlib-conversations", "notes"]},
            r"params\.yaml: tune\.dataset: 'notes' holds documents; tune trains on conversations",
        ),
        (
            {"pretrain__decoder__dataset": []},
            r"params\.yaml: pretrain\.decoder\.dataset: no dataset named; known: notes, stdlib",
        ),
        ({"tune__dataset": "../notes"}, r"params\.yaml: tune\.dataset: '\.\./notes' is not a dataset"),
        ({"collect__modules": ["jsn"]}, r"params\.yaml: collect\.modules: 'jsn' is not in the standard library"),
        (
            {"pretrain__decoder__dataset": "empty"},
            r"empty: the dataset is empty; add rows with \"loopwright data add\"",
        ),
    ],
)
def test_wrong_names_are_refused(tmp_path: Path, overrides: dict[str, Any], message: str) -> None:
    add(tmp_path, "notes", "documents", 5)
    if overrides.get("pretrain__decoder__dataset") == "empty":
        add(tmp_path, "empty", "documents", 0)
    with pytest.raises(InputError, match=f"^{message}"):
        collect(stage_run(tmp_path, **overrides))


def test_areas_are_held_out_by_symbol_and_by_module(collected: Path) -> None:
    folder = collected / "data/collected" / AREAS
    rows = {split: list(read_rows(folder, split)) for split in ("train", "validation", "test")}
    labels = {row["label"] for row in rows["train"]}
    assert len(labels) > 1
    assert {row["label"] for split in rows for row in rows[split]} == labels, "no label is asked that was not learned"
    assert {row["suite"] for row in rows["test"]} <= {"held_out_symbols", "held_out_modules"}
    assert {row["suite"] for row in rows["train"]} == {None}
    documents = {row["id"].partition("#")[0] for row in read_rows(collected / "data/collected" / DOCUMENTS, "train")}
    assert not documents & {row["id"].partition("#")[0] for row in rows["test"]}
    texts = [row["text"] for split in rows for row in rows[split]]
    assert len(set(texts)) == len(texts)


def test_summaries_are_of_sources_without_their_docstrings(collected: Path) -> None:
    folder = collected / "data/collected" / SUMMARIES
    rows = [row for split in ("train", "validation", "test") for row in read_rows(folder, split)]
    assert len(rows) > 30
    assert read_info(folder).rows["test"] > 0
    assert not [row["id"] for row in rows if row["target"].rstrip(".") in row["source"]]
    assert all("def " in row["source"] and "\n" not in row["target"] for row in rows)


def test_modules_of_one_area_are_distinguished_by_module(tmp_path: Path) -> None:
    collect(stage_run(tmp_path, collect__modules=["json"]))
    labels = {row["label"] for row in read_rows(tmp_path / "data/collected" / AREAS, "train")}
    assert len(labels) > 1


def test_added_labelled_texts_are_split_label_by_label(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "data/added/moods", "moods", "labelled_texts") as writer:
        for number in range(90):
            label = "rare" if number < 3 else "glad" if number < 30 else "sad"
            text = f"{hashlib.sha256(str(number).encode()).hexdigest()} is what number {number} says"
            writer.write("train", {"id": str(number), "text": text, "label": label})
    collect(stage_run(tmp_path, classifier__dataset="moods"))
    folder = tmp_path / "data/collected/moods"
    found = {
        split: Counter(row["label"] for row in read_rows(folder, split)) for split in ("train", "validation", "test")
    }
    assert found == {
        "train": {"rare": 1, "glad": 21, "sad": 47},
        "validation": {"rare": 1, "glad": 3, "sad": 6},
        "test": {"rare": 1, "glad": 3, "sad": 7},
    }
