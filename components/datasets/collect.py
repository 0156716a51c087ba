"""Stage `collect`: gather every dataset that is learned from, and the agent's tools.

A dataset is the project's (`components/config/project.py`), or was added by a user. All pass the same removal of
duplicates, and of training rows that equal a held-out one.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

from components.agent.saved_tools import TOOL_FILES, save_agent
from components.config.params import InputError
from components.config.project import Collecting, Project, Rows, load_project
from components.datasets.deduplication import Splits, split
from components.datasets.formats import (
    DatasetInfo,
    DatasetWriter,
    Kind,
    Row,
    Split,
    in_test_split,
    read_info,
    read_rows,
    refuse_other_kinds,
    write_json,
)
from components.datasets.stratified_split import by_hash, stratified
from components.runtime.stage import StageRun


def collect(run: StageRun) -> None:
    """Write each dataset that a section of params.yaml names, and data/agent: what makes a model the project's agent.

    Raises: InputError for an unknown dataset, and for a function that cannot be a tool.
    """
    project = load_project(run.params.project, run.paths.root)
    wanted = _wanted(run, project)
    save_agent(project, Collecting(run.params.collect, run.params.seed, run.paths.agent_files / TOOL_FILES), run.paths)
    run.progress(1, len(wanted) + 1, project=project.name)
    infos, metrics = _write(run, wanted, project)
    for info in infos:
        _report(run, info)
    datasets = {info.name: {"kind": info.kind, "rows": info.rows, "dropped": info.dropped} for info in infos}
    write_json(run.paths.metrics / "collect.json", {"python": sys.version, "datasets": datasets, **metrics})


def _write(run: StageRun, wanted: Mapping[str, Kind], project: Project) -> tuple[list[DatasetInfo], dict[str, Any]]:
    """Write every dataset's held-out rows, then what each trains on: no dataset may train on another's test rows."""
    similarity, seed = run.params.collect.near_duplicate_similarity, run.params.seed
    collecting = Collecting(run.params.collect, seed, run.paths.agent_files / TOOL_FILES)
    splits = {kind: Splits(kind, similarity, seed) for kind in wanted.values()}
    made: list[tuple[DatasetWriter, Rows]] = []
    with ExitStack() as stack:
        for name, kind in wanted.items():
            folder = run.paths.collected / name
            shutil.rmtree(folder, ignore_errors=True)
            writer = stack.enter_context(DatasetWriter(folder, name, kind))
            rows = project.rows(name, collecting) if name in project.datasets else _added(run, name, kind)
            writer.info.sources = list(rows.sources)
            for reason, count in rows.dropped.items():
                writer.drop(reason, count)
            splits[kind].write_test(rows.test, writer)
            made.append((writer, rows))
        for writer, rows in made:
            splits[writer.info.kind].write_validation(rows.validation, writer)
        for done, (writer, rows) in enumerate(made, start=2):
            splits[writer.info.kind].write_train(rows.train, writer)
            counts = {key: str(count) for key, count in writer.info.rows.items()}
            run.progress(done, len(wanted) + 1, dataset=writer.info.name, **counts)
    metrics = {name: value for _, rows in made for name, value in rows.metrics.items()}
    return [writer.info for writer, _ in made], metrics


def _wanted(run: StageRun, project: Project) -> dict[str, Kind]:
    """The datasets to write, by name, with their kinds.

    Raises: InputError for an unknown name, or a kind that the stage does not learn from.
    """
    added = sorted(run.paths.added.glob("*/dataset.json"))
    kinds = {path.parent.name: read_info(path.parent).kind for path in added} | dict(project.datasets)
    wanted: dict[str, Kind] = {}
    for section, names in run.params.datasets.items():
        if not names:
            raise InputError(f"params.yaml: {section}.dataset: no dataset named; known: {', '.join(sorted(kinds))}")
        for name in names:
            if name not in kinds:
                raise InputError(
                    f"params.yaml: {section}.dataset: {name!r} is not a dataset; known: {', '.join(sorted(kinds))}; "
                    'add one with "loopwright data add"'
                )
            refuse_other_kinds(section, name, kinds[name])
            wanted[name] = kinds[name]
    return wanted


def _added(run: StageRun, name: str, kind: Kind) -> Rows:
    """Rows of a user's dataset: each row's own id decides, of labelled texts label by label.

    Raises: InputError when the dataset is empty.
    """
    folder = run.paths.added / name
    sources = read_info(folder).sources
    rows = partial(read_rows, folder, "train")
    if next(iter(rows()), None) is None:
        raise InputError(f'{folder.name}: the dataset is empty; add rows with "loopwright data add"')
    share, validation, seed = run.params.collect.held_out_share, run.params.collect.validation_share, run.params.seed
    match kind:
        case "labelled_texts":
            split_of = stratified(rows, share, validation, seed)
        case "text_pairs":
            split_of = by_hash(rows, share, validation, seed)
        case _:
            test, train = split(rows, lambda row: in_test_split(row["id"], share, seed))
            return Rows(train, test, sources=sources)

    def of(part: Split) -> Iterator[Row]:
        return (row for row in rows() if split_of(row) == part)

    return Rows(of("train"), of("test"), of("validation"), sources)


def _report(run: StageRun, info: DatasetInfo) -> None:
    counts = {**info.rows, **info.dropped}
    run.tracker.metrics({f"{info.name}/{name}": float(count) for name, count in counts.items()})
    for source in info.sources:
        run.tracker.dataset(info.name, source["sha256"], source["name"], "collect")
