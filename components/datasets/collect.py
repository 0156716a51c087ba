"""Stage `collect`: gather every dataset that is learned from, and the agent's facts.

The reference datasets are read from the running interpreter's standard library; any other name is a dataset that a
user added. All pass the same removal of duplicates, and of training rows that equal a held-out one.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import compress
from typing import Any, NamedTuple

from components.config.params import InputError
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
from examples.stdlib_agent.areas import area, labelled
from examples.stdlib_agent.code_summaries import described
from examples.stdlib_agent.conversations import training_conversations
from examples.stdlib_agent.dialogue import asked
from examples.stdlib_agent.facts import build
from examples.stdlib_agent.held_out import HeldOut, draw_definitions, hold_out
from examples.stdlib_agent.knowledge import Knowledge
from examples.stdlib_agent.questions import Asker
from examples.stdlib_agent.stdlib import Symbol, library_symbols
from examples.stdlib_agent.suites import suites

DOCUMENTS = "stdlib-documents"
CONVERSATIONS = "stdlib-conversations"
AREAS = "stdlib-areas"
SUMMARIES = "stdlib-summaries"
REFERENCE: dict[str, Kind] = {
    DOCUMENTS: "documents",
    CONVERSATIONS: "conversations",
    AREAS: "labelled_texts",
    SUMMARIES: "text_pairs",
}
"""Built-in datasets; any other name lies in `data/added`."""


def collect(run: StageRun) -> None:
    """Write each dataset that a section of params.yaml names, and the knowledge file."""
    wanted = _wanted(run)
    config, seed = run.params.collect, run.params.seed
    symbols = library_symbols(config.modules)
    held_out = hold_out(symbols, config.held_out_share, config.questions, seed)
    build(run.paths.knowledge, symbols)
    run.progress(1, len(wanted) + 1, symbols=str(len(symbols)), held_out_packages=str(len(held_out.packages)))
    infos = _write(run, wanted, Library(symbols, held_out, _library_source(symbols)))
    for info in infos:
        _report(run, info)
    write_json(run.paths.metrics / "collect.json", _metrics(infos, symbols, held_out))


@dataclass(frozen=True)
class Library:
    """What was read of the standard library."""

    symbols: list[Symbol]
    held_out: HeldOut
    source: dict[str, str]
    """The interpreter, and a digest of what was read from it."""


class Parts(NamedTuple):
    """Rows of a dataset, each kind of them a pass of its own."""

    test: Iterable[Row]
    train: Iterable[Row]
    validation: Iterable[Row] = ()


def _write(run: StageRun, wanted: Mapping[str, Kind], library: Library) -> list[DatasetInfo]:
    """Write every dataset's held-out rows, then what each trains on: no dataset may train on another's test rows."""
    similarity, seed = run.params.collect.near_duplicate_similarity, run.params.seed
    splits = {kind: Splits(kind, similarity, seed) for kind in wanted.values()}
    made: list[tuple[DatasetWriter, Parts]] = []
    with ExitStack() as stack:
        for name, kind in wanted.items():
            folder = run.paths.collected / name
            shutil.rmtree(folder, ignore_errors=True)
            writer = stack.enter_context(DatasetWriter(folder, name, kind))
            parts = _reference(run, writer, library) if name in REFERENCE else _added(run, writer)
            splits[kind].write_test(parts.test, writer)
            made.append((writer, parts))
        for writer, parts in made:
            splits[writer.info.kind].write_validation(parts.validation, writer)
        for done, (writer, parts) in enumerate(made, start=2):
            splits[writer.info.kind].write_train(parts.train, writer)
            counts = {key: str(count) for key, count in writer.info.rows.items()}
            run.progress(done, len(wanted) + 1, dataset=writer.info.name, **counts)
    return [writer.info for writer, _ in made]


def _wanted(run: StageRun) -> dict[str, Kind]:
    """The datasets to write, by name, with their kinds.

    Raises: InputError for an unknown name, or a kind that the stage does not learn from.
    """
    added = run.paths.added
    kinds = {path.parent.name: read_info(path.parent).kind for path in sorted(added.glob("*/dataset.json"))} | REFERENCE
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


def _reference(run: StageRun, writer: DatasetWriter, library: Library) -> Parts:
    """Rows about the standard library."""
    config, seed, held_out = run.params.collect, run.params.seed, library.held_out
    writer.info.sources = [library.source]
    match writer.info.kind:
        case "documents":
            return Parts(documents([*held_out.symbols, *held_out.modules]), documents(held_out.train))
        case "labelled_texts":
            return _areas(run, writer, held_out)
        case "text_pairs":
            classes = {symbol.name: symbol for symbol in library.symbols if symbol.kind == "class"}
            return _parts(run, held_out, lambda symbols, suite: described(symbols, classes, suite))
    asker = Asker(held_out, Knowledge(run.paths.knowledge), config.held_out_share, seed)
    tests = list(suites(asker, config.questions, seed))
    avoid = {asked(test["messages"]) for test in tests}
    return Parts(tests, training_conversations(asker, config.conversations, seed, avoid))


def _areas(run: StageRun, writer: DatasetWriter, held_out: HeldOut) -> Parts:
    """Docstrings with their areas; one of an area with fewer than two rows to learn from is not asked, and counted.

    Where all are of one area their modules take its place, and where all are of one module their kinds.

    Raises: InputError when that leaves one label.
    """
    for label_of in (area, lambda symbol: symbol.module, lambda symbol: symbol.kind):
        parts = _parts(run, held_out, partial(labelled, label_of))
        counted = Counter(row["label"] for row in parts.train)
        known = {label for label, count in counted.items() if count > 1}
        if len(known) > 1:
            break
    else:
        raise InputError(
            f"params.yaml: collect.modules: {AREAS}: one kind of text to learn from; name more modules, or another"
            " classifier.dataset"
        )
    rare = sum(row["label"] not in known for rows in parts for row in rows)
    if rare:
        writer.drop("rare_label", rare)
    return Parts(*([row for row in rows if row["label"] in known] for rows in parts))


def _parts(run: StageRun, held_out: HeldOut, rows: Callable[[Sequence[Symbol], str | None], Iterable[Row]]) -> Parts:
    """Rows of held-out symbols and modules, of definitions to validate with, and of those to learn from."""
    share, seed = run.params.collect.validation_share, run.params.seed
    families = draw_definitions(held_out.train, share, f"validation:{seed}")
    chosen = [symbol.family in families for symbol in held_out.train]
    return Parts(
        [*rows(held_out.symbols, "held_out_symbols"), *rows(held_out.modules, "held_out_modules")],
        list(rows(list(compress(held_out.train, (not one for one in chosen))), None)),
        list(rows(list(compress(held_out.train, chosen)), None)),
    )


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


def _added(run: StageRun, writer: DatasetWriter) -> Parts:
    """Rows of a user's dataset: each row's own id decides, of labelled texts label by label.

    Raises: InputError when the dataset is empty.
    """
    folder = run.paths.added / writer.info.name
    writer.info.sources = read_info(folder).sources
    rows = partial(read_rows, folder, "train")
    if next(iter(rows()), None) is None:
        raise InputError(f'{folder.name}: the dataset is empty; add rows with "loopwright data add"')
    share, validation, seed = run.params.collect.held_out_share, run.params.collect.validation_share, run.params.seed
    match writer.info.kind:
        case "labelled_texts":
            split_of = stratified(rows, share, validation, seed)
        case "text_pairs":
            split_of = by_hash(rows, share, validation, seed)
        case _:
            return Parts(*split(rows, lambda row: in_test_split(row["id"], share, seed)))

    def of(part: Split) -> Iterator[Row]:
        return (row for row in rows() if split_of(row) == part)

    return Parts(of("test"), of("train"), of("validation"))


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
