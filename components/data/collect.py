"""Stage `collect`: gather every dataset that is learned from, and the agent's facts.

The reference datasets are read from the running interpreter's standard library; any other name is a dataset that a
user added. All pass the same removal of duplicates, and of training rows that equal a held-out one.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from components.config import InputError
from components.data.datasets import (
    DatasetInfo,
    DatasetWriter,
    Kind,
    Row,
    in_test_split,
    read_info,
    read_rows,
    write_json,
)
from components.data.duplicates import Splits, split
from components.reference.conversations import training_conversations
from components.reference.dialogue import asked
from components.reference.facts import build
from components.reference.held_out import HeldOut, hold_out
from components.reference.knowledge import Knowledge
from components.reference.questions import Asker
from components.reference.stdlib import Symbol, library_symbols
from components.reference.suites import suites
from components.stage import StageRun

DOCUMENTS = "stdlib-documents"
CONVERSATIONS = "stdlib-conversations"
REFERENCE: dict[str, Kind] = {DOCUMENTS: "documents", CONVERSATIONS: "conversations"}
"""Built-in datasets; any other name lies in `data/added`."""


def collect(run: StageRun) -> None:
    """Write each dataset that `pretrain` and `tune` name, and the knowledge file."""
    wanted = _wanted(run)
    config, seed = run.params.collect, run.params.seed
    symbols = library_symbols(config.modules)
    held_out = hold_out(symbols, config.held_out_share, config.questions, seed)
    build(run.paths.knowledge, symbols)
    run.progress(1, len(wanted) + 1, symbols=str(len(symbols)), held_out_packages=str(len(held_out.packages)))
    infos = _write(run, wanted, _library_source(symbols), held_out)
    for info in infos:
        _report(run, info)
    write_json(run.paths.metrics / "collect.json", _metrics(infos, symbols, held_out))


def _write(run: StageRun, wanted: Mapping[str, Kind], source: dict[str, str], held_out: HeldOut) -> list[DatasetInfo]:
    """Write every dataset's test rows, then what each trains on: no dataset may train on another's test rows."""
    similarity, seed = run.params.collect.near_duplicate_similarity, run.params.seed
    splits = {kind: Splits(kind, similarity, seed) for kind in wanted.values()}
    training: list[tuple[DatasetWriter, Iterable[Row]]] = []
    with ExitStack() as stack:
        for name, kind in wanted.items():
            shutil.rmtree(run.paths.collected / name, ignore_errors=True)
            writer = stack.enter_context(DatasetWriter(run.paths.collected / name, name, kind))
            tests, rows = _reference(run, writer, source, held_out) if name in REFERENCE else _added(run, writer)
            splits[kind].write_test(tests, writer)
            training.append((writer, rows))
        for done, (writer, rows) in enumerate(training, start=2):
            splits[writer.info.kind].write_train(rows, writer)
            counts = {key: str(count) for key, count in writer.info.rows.items()}
            run.progress(done, len(wanted) + 1, dataset=writer.info.name, **counts)
    return [writer.info for writer, _ in training]


def _wanted(run: StageRun) -> dict[str, Kind]:
    """The datasets to write, by name, with their kinds.

    Raises: InputError for an unknown name, or a kind that the stage does not learn from.
    """
    added = run.paths.added
    kinds = {path.parent.name: read_info(path.parent).kind for path in sorted(added.glob("*/dataset.json"))} | REFERENCE
    wanted: dict[str, Kind] = {}
    sections: tuple[tuple[str, list[str], Kind], ...] = (
        ("pretrain", run.params.pretrain.datasets, "documents"),
        ("tune", run.params.tune.datasets, "conversations"),
    )
    for section, names, learned in sections:
        if not names:
            raise InputError(f"params.yaml: {section}.dataset: no dataset named; known: {', '.join(sorted(kinds))}")
        for name in names:
            if name not in kinds:
                raise InputError(
                    f"params.yaml: {section}.dataset: {name!r} is not a dataset; known: {', '.join(sorted(kinds))}; "
                    'add one with "loopwright data add"'
                )
            if kinds[name] != learned:
                raise InputError(
                    f"params.yaml: {section}.dataset: {name!r} holds {kinds[name]}; {section} learns from {learned}"
                )
            wanted[name] = learned
    return wanted


def _reference(
    run: StageRun, writer: DatasetWriter, source: dict[str, str], held_out: HeldOut
) -> tuple[Iterable[Row], Iterable[Row]]:
    """Test and training rows about the standard library."""
    config, seed = run.params.collect, run.params.seed
    writer.info.sources = [source]
    if writer.info.kind == "documents":
        return documents([*held_out.symbols, *held_out.modules]), documents(held_out.train)
    asker = Asker(held_out, Knowledge(run.paths.knowledge), config.held_out_share, seed)
    tests = list(suites(asker, config.questions, seed))
    avoid = {asked(test["messages"]) for test in tests}
    return tests, training_conversations(asker, config.conversations, seed, avoid)


def documents(symbols: Sequence[Symbol]) -> Iterator[Row]:
    """The docstring of each symbol under its name, and the source of each definition once."""
    sources: set[str] = set()
    for symbol in symbols:
        if symbol.docstring:
            bases = f"({', '.join(symbol.bases)})" if symbol.bases not in ((), ("object",)) else ""
            text = f"{symbol.kind} {symbol.name}{bases}\n\n{symbol.docstring}"
            yield {"id": f"{symbol.name}#docstring", "text": text, "source": symbol.module}
        if symbol.source and symbol.family not in sources:
            sources.add(symbol.family)
            yield {"id": f"{symbol.name}#source", "text": symbol.source, "source": symbol.module}


def _added(run: StageRun, writer: DatasetWriter) -> tuple[Iterable[Row], Iterable[Row]]:
    """Test and training rows of a user's dataset: each row's own id decides.

    Raises: InputError when the dataset is empty.
    """
    folder = run.paths.added / writer.info.name
    writer.info.sources = read_info(folder).sources
    rows = partial(read_rows, folder, "train")
    if next(iter(rows()), None) is None:
        raise InputError(f'{folder.name}: the dataset is empty; add rows with "loopwright data add"')
    share, seed = run.params.collect.held_out_share, run.params.seed
    return split(rows, lambda row: in_test_split(row["id"], share, seed))


def _library_source(symbols: Sequence[Symbol]) -> dict[str, str]:
    """The interpreter and a digest of what was read from it."""
    digest = hashlib.sha256()
    for symbol in symbols:
        digest.update(repr((symbol.name, symbol.kind, symbol.docstring, symbol.bases, symbol.source)).encode())
    return {"name": f"standard library of Python {sys.version}", "sha256": digest.hexdigest()}


def _report(run: StageRun, info: DatasetInfo) -> None:
    counts = {**info.rows, **info.dropped}
    run.tracker.metrics({f"{info.name}/{name}": float(count) for name, count in counts.items()})
    for source in info.sources:
        run.tracker.dataset(info.name, source["sha256"], source["name"], "collect")


def _metrics(infos: Sequence[DatasetInfo], symbols: Sequence[Symbol], held_out: HeldOut) -> dict[str, Any]:
    return {
        "python": sys.version,
        "datasets": {info.name: {"kind": info.kind, "rows": info.rows, "dropped": info.dropped} for info in infos},
        "symbols": len(symbols),
        "trained_symbols": len(held_out.train),
        "held_out_symbols": len(held_out.symbols),
        "held_out_module_symbols": len(held_out.modules),
        "held_out_packages": sorted(held_out.packages),
    }
