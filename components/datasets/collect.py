"""Stage `collect`: gather every dataset that models train on, and the agent's tools.

A dataset is the project's (`components/config/project.py`), or was added by a user. All pass the same removal of
duplicates, and of training rows that equal a held-out row.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

from components.agent.saved_tools import TOOL_FILES, save_agent
from components.config.params import InputError
from components.config.project import Collecting, Project, Rows, load_project
from components.datasets.added_rows import AddedRows, by_label, by_share
from components.datasets.deduplication import Splits
from components.datasets.disk_splits import DiskSplits
from components.datasets.formats import (
    DatasetInfo,
    DatasetWriter,
    Kind,
    Split,
    read_info,
    read_rows,
    refuse_other_kinds,
    write_json,
)
from components.runtime.stage import StageRun

MAX_ROWS_IN_MEMORY = 20_000
"""Rows of added datasets of a kind up to which hashes of all are in memory, 2 KB each."""
_SPLITS: tuple[Split, ...] = ("train", "test", "validation")


def collect(run: StageRun) -> None:
    """Write each dataset that a section of params.yaml names, and the agent's tools in data/agent.

    Raises: InputError for an unknown dataset, and for a function that cannot be a tool.
    """
    project = load_project(run.params.project, run.paths.root)
    kinds = _kinds(run, project)
    collecting = Collecting(run.params.collect, run.params.seed, run.paths.agent_files / TOOL_FILES)
    save_agent(project, collecting, run.paths)
    run.progress(1, len(kinds) + 1, project=project.name)
    infos, metrics = _write(run, kinds, project, collecting)
    for info in infos:
        counts = {**info.rows, **info.dropped}
        run.tracker.metrics({f"{info.name}/{name}": float(count) for name, count in counts.items()})
        for source in info.sources:
            run.tracker.dataset(info.name, source["sha256"], source["name"], "collect")
    datasets = {info.name: {"kind": info.kind, "rows": info.rows, "dropped": info.dropped} for info in infos}
    write_json(run.paths.metrics / "collect.json", {"python": sys.version, "datasets": datasets, **metrics})


def _write(
    run: StageRun, kinds: Mapping[str, Kind], project: Project, collecting: Collecting
) -> tuple[list[DatasetInfo], dict[str, Any]]:
    """Write the held-out rows of every dataset, then the training rows: none may equal another's test row."""
    similarity, seed = run.params.collect.near_duplicate_similarity, run.params.seed
    on_disk = {kind for kind in set(kinds.values()) - {"images"} if _added_rows(run, kinds, kind) > MAX_ROWS_IN_MEMORY}
    splits = {
        kind: (DiskSplits(run, kind, similarity, seed) if kind in on_disk else Splits(kind, similarity, seed))
        for kind in kinds.values()
    }
    writers: list[tuple[DatasetWriter, Rows]] = []
    with ExitStack() as stack:
        for name, kind in kinds.items():
            folder = run.paths.collected / name
            shutil.rmtree(folder, ignore_errors=True)
            writer = stack.enter_context(DatasetWriter(folder, name, kind))
            if name in project.datasets:
                rows, licence = project.rows(name, collecting), ""
            else:
                rows, licence = _added(run, name, kind), read_info(run.paths.added / name).licence
            writer.info.sources, writer.info.licence = list(rows.sources), project.licences.get(name, licence)
            for reason, count in rows.dropped.items():
                writer.drop(reason, count)
            splits[kind].write_held_out("test", rows.test, writer)
            writers.append((writer, rows))
        for writer, rows in writers:
            splits[writer.info.kind].write_held_out("validation", rows.validation, writer)
        for done, (writer, rows) in enumerate(writers, start=2):
            splits[writer.info.kind].write_train(rows.train, writer)
            counts = {key: str(count) for key, count in writer.info.rows.items()}
            run.progress(done, len(kinds) + 1, dataset=writer.info.name, **counts)
        for kind in splits:
            splits[kind].finish()
    metrics = {name: value for _, rows in writers for name, value in rows.metrics.items()}
    return [writer.info for writer, _ in writers], metrics


def _added_rows(run: StageRun, kinds: Mapping[str, Kind], kind: Kind) -> int:
    """Rows of a kind in the datasets to write that a user added; what a project makes itself is not known before."""
    named = [run.paths.added / name for name, of_dataset in kinds.items() if of_dataset == kind]
    infos = [read_info(folder) for folder in named if (folder / "dataset.json").is_file()]
    return sum(info.rows.get("train", 0) for info in infos)


def _kinds(run: StageRun, project: Project) -> dict[str, Kind]:
    """The kind of each dataset to write, by name.

    Raises: InputError for an unknown name, or a kind that the section does not train on.
    """
    added = sorted(run.paths.added.glob("*/dataset.json"))
    known = {path.parent.name: read_info(path.parent).kind for path in added} | dict(project.datasets)
    kinds: dict[str, Kind] = {}
    for section, names in run.params.datasets.items():
        if not names:
            raise InputError(f"params.yaml: {section}.dataset: no dataset named; known: {', '.join(sorted(known))}")
        for name in names:
            if name not in known:
                raise InputError(
                    f"params.yaml: {section}.dataset: {name!r} is not a dataset; known: {', '.join(sorted(known))}; "
                    'add one with "loopwright data add"'
                )
            refuse_other_kinds(section, name, known[name])
            kinds[name] = known[name]
    return kinds


def _added(run: StageRun, name: str, kind: Kind) -> Rows:
    """Rows of a user's dataset, split by their ids: labelled texts label by label, pictures by their files.

    Raises: InputError when the dataset is empty.
    """
    folder = run.paths.added / name
    rows = partial(read_rows, folder, "train")
    if next(iter(rows()), None) is None:
        raise InputError(f'{folder.name}: the dataset is empty; add rows with "loopwright data add"')
    share, validation, seed = run.params.collect.held_out_share, run.params.collect.validation_share, run.params.seed
    if kind in ("labelled_texts", "text_pairs"):
        rule = by_label(rows, share, validation, seed)
    else:
        rule = by_share(rows, share, seed)
    train, test, validated = (AddedRows(folder, split, rule) for split in _SPLITS)
    return Rows(train, test, validated if rule.limits else (), read_info(folder).sources)
