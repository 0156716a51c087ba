"""Stage `collect`: gather every dataset that is learned from, and the agent's facts.

The reference datasets are read from the running interpreter's standard library; any other name is a dataset that a
user added. All pass the same removal of duplicates, and of training rows that equal a held-out one.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
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
from components.data.duplicates import split_and_write, write_splits
from components.reference.dialogue import asked
from components.reference.facts import build
from components.reference.held_out import HeldOut, hold_out
from components.reference.knowledge import Knowledge
from components.reference.questions import Asker, training_conversations
from components.reference.stdlib import Symbol, library_symbols
from components.reference.suites import suites
from components.stage import StageRun

DOCUMENTS = "stdlib-documents"
CONVERSATIONS = "stdlib-conversations"
REFERENCE: dict[str, Kind] = {DOCUMENTS: "documents", CONVERSATIONS: "conversations"}
"""Built-in datasets; any other name lies in `data/added`."""


def collect(run: StageRun) -> None:
    """Write each dataset that `pretrain` and `tune` name, and the knowledge file."""
    params = run.params
    wanted = _wanted(run)
    config, steps = params.collect, len(wanted) + 1
    symbols = library_symbols(config.modules)
    source = _library_source(symbols)
    held_out = hold_out(symbols, config.held_out_share, config.questions, params.seed)
    build(run.paths.knowledge, symbols)
    run.progress(1, steps, symbols=str(len(symbols)), held_out_packages=str(len(held_out.packages)))
    infos: list[DatasetInfo] = []
    for name, kind in wanted.items():
        folder = run.paths.collected / name
        shutil.rmtree(folder, ignore_errors=True)
        with DatasetWriter(folder, name, kind) as writer:
            if name in REFERENCE:
                writer.info.sources = [source]
                _write_reference(run, writer, held_out)
            else:
                _write_added(run, writer, run.paths.added / name)
        infos.append(writer.info)
        run.progress(len(infos) + 1, steps, dataset=name, **{split: str(n) for split, n in writer.info.rows.items()})
        _report(run, writer.info)
    write_json(run.paths.metrics / "collect.json", _metrics(infos, symbols, held_out))


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


def _write_reference(run: StageRun, writer: DatasetWriter, held_out: HeldOut) -> None:
    config, seed = run.params.collect, run.params.seed
    tests: Iterable[Row] = documents([*held_out.symbols, *held_out.modules])
    training: Iterable[Row] = documents(held_out.train)
    if writer.info.kind == "conversations":
        asker = Asker(held_out, Knowledge(run.paths.knowledge), config.held_out_share, seed)
        tests = list(suites(asker, config.questions, seed))
        avoid = {asked(test["messages"]) for test in tests}
        training = training_conversations(asker, config.conversations, seed, avoid)
    write_splits(tests, training, writer, config.near_duplicate_similarity, seed)


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


def _write_added(run: StageRun, writer: DatasetWriter, folder: Path) -> None:
    writer.info.sources = read_info(folder).sources
    rows = partial(read_rows, folder, "train")
    share, seed = run.params.collect.held_out_share, run.params.seed
    if next(iter(rows()), None) is None:
        raise InputError(f'{folder.name}: the dataset is empty; add rows with "loopwright data add"')
    similarity = run.params.collect.near_duplicate_similarity
    split_and_write(rows, writer, lambda row: in_test_split(row["id"], share, seed), similarity, seed)


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
