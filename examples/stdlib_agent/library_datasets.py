"""The datasets of the project: documents, conversations, labelled texts and text pairs about the standard library."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import compress
from typing import Any

from components.config.params import InputError
from components.config.project import Collecting, Rows
from components.datasets.formats import Row
from examples.stdlib_agent import facts
from examples.stdlib_agent.agent_tools import FACTS
from examples.stdlib_agent.areas import area, labelled
from examples.stdlib_agent.code_summaries import described
from examples.stdlib_agent.conversations import training_conversations
from examples.stdlib_agent.dialogue import user_text
from examples.stdlib_agent.held_out import HeldOut, draw_definitions, hold_out
from examples.stdlib_agent.knowledge import Knowledge
from examples.stdlib_agent.questions import Asker
from examples.stdlib_agent.stdlib import Symbol, library_symbols
from examples.stdlib_agent.suites import suites

DOCUMENTS = "stdlib-documents"
CONVERSATIONS = "stdlib-conversations"
AREAS = "stdlib-areas"
SUMMARIES = "stdlib-summaries"


@dataclass(frozen=True)
class Library:
    """What was read of the standard library."""

    symbols: list[Symbol]
    held_out: HeldOut
    source: dict[str, str]
    """The interpreter, and a digest of what was read from it."""

    @property
    def metrics(self) -> dict[str, Any]:
        return {
            "symbols": len(self.symbols),
            "trained_symbols": len(self.held_out.train),
            "held_out_symbols": len(self.held_out.symbols),
            "held_out_module_symbols": len(self.held_out.modules),
            "held_out_packages": sorted(self.held_out.packages),
        }


def write_facts(collecting: Collecting) -> None:
    facts.build(collecting.files / FACTS, _library(collecting).symbols)


def dataset_rows(name: str, collecting: Collecting) -> Rows:
    """Rows about the standard library."""
    library = _library(collecting)
    dataset = _ROWS[name](collecting, library)
    return replace(dataset, sources=[library.source], metrics=library.metrics)


def _library(collecting: Collecting) -> Library:
    """Read once for all datasets of a run."""
    settings = collecting.settings
    return _read(tuple(settings.modules), settings.held_out_share, settings.questions, collecting.seed)


@lru_cache(maxsize=1)
def _read(modules: tuple[str, ...], share: float, questions: int, seed: int) -> Library:
    symbols = library_symbols(list(modules))
    digest = hashlib.sha256()
    for symbol in symbols:
        digest.update(repr((symbol.name, symbol.kind, symbol.docstring, symbol.bases, symbol.source)).encode())
    source = {"name": f"standard library of Python {sys.version}", "sha256": digest.hexdigest()}
    return Library(symbols, hold_out(symbols, share, questions, seed), source)


def _documents(_: Collecting, library: Library) -> Rows:
    held_out = library.held_out
    return Rows(documents(held_out.train), documents([*held_out.symbols, *held_out.modules]))


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


def _conversations(collecting: Collecting, library: Library) -> Rows:
    config, seed = collecting.settings, collecting.seed
    asker = Asker(library.held_out, Knowledge(collecting.files / FACTS), config.held_out_share, seed)
    tests = list(suites(asker, config.questions, seed))
    avoid = {user_text(test["messages"]) for test in tests}
    return Rows(training_conversations(asker, config.conversations, seed, avoid), tests)


def _summaries(collecting: Collecting, library: Library) -> Rows:
    classes = {symbol.name: symbol for symbol in library.symbols if symbol.kind == "class"}
    return _split(collecting, library.held_out, lambda symbols, suite: described(symbols, classes, suite))


def _areas(collecting: Collecting, library: Library) -> Rows:
    """Docstrings with their areas; one of an area with fewer than two rows to learn from is not asked, and counted.

    Where all are of one area their modules take its place, and where all are of one module their kinds.

    Raises: InputError when that leaves one label.
    """
    for label_of in (area, lambda symbol: symbol.module, lambda symbol: symbol.kind):
        rows = _split(collecting, library.held_out, partial(labelled, label_of))
        counted = Counter(row["label"] for row in rows.train)
        known = {label for label, count in counted.items() if count > 1}
        if len(known) > 1:
            break
    else:
        raise InputError(
            f"params.yaml: collect.modules: {AREAS}: one kind of text to learn from; name more modules, or another"
            " classifier.dataset"
        )
    splits = (rows.train, rows.test, rows.validation)
    train, test, validation = ([row for row in split if row["label"] in known] for split in splits)
    rare = sum(row["label"] not in known for split in splits for row in split)
    return Rows(train, test, validation, dropped={"rare_label": rare} if rare else {})


def _split(
    collecting: Collecting, held_out: HeldOut, rows: Callable[[Sequence[Symbol], str | None], Iterable[Row]]
) -> Rows:
    """Rows of those to learn from, of held-out symbols and modules, and of definitions to validate with."""
    share = collecting.settings.validation_share
    families = draw_definitions(held_out.train, share, f"validation:{collecting.seed}")
    chosen = [symbol.family in families for symbol in held_out.train]
    return Rows(
        list(rows(list(compress(held_out.train, (not is_held_out for is_held_out in chosen))), None)),
        [*rows(held_out.symbols, "held_out_symbols"), *rows(held_out.modules, "held_out_modules")],
        list(rows(list(compress(held_out.train, chosen)), None)),
    )


_ROWS: dict[str, Callable[[Collecting, Library], Rows]] = {
    DOCUMENTS: _documents,
    CONVERSATIONS: _conversations,
    AREAS: _areas,
    SUMMARIES: _summaries,
}
