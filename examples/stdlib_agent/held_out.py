"""Which symbols training never sees: whole packages, and single definitions of the packages that it does see."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from examples.stdlib_agent.areas import area
from examples.stdlib_agent.stdlib import Symbol

MAX_SHARE = 0.35
"""Of the symbols with a summary, that held-out packages may take at most."""
MAX_PACKAGE = 0.6
"""Of that, for one package: several are held out where there are several."""


@dataclass(frozen=True)
class HeldOut:
    """The symbols that questions are asked about, each under one name, in three parts without common definitions."""

    train: list[Symbol]
    symbols: list[Symbol]
    """Held out of packages that are trained on."""
    modules: list[Symbol]
    """Of packages that are held out whole."""
    packages: frozenset[str]


def hold_out(symbols: Sequence[Symbol], share: float, questions: int, seed: int) -> HeldOut:
    """Split the symbols by a seeded choice of packages and definitions.

    Packages are added until their share is held out and, as far as that can be, enough for `questions`
    about different summaries and for half as many about different classes.
    """
    single = one_name_each(symbols)
    packages = _choose_packages(single, share, questions, seed)
    of_packages = defaultdict(set)
    for symbol in symbols:
        of_packages[symbol.package in packages].add(symbol.family)
    shared = of_packages[True] & of_packages[False]
    seen = [symbol for symbol in single if symbol.package not in packages and symbol.family not in shared]
    held_families = draw_definitions(seen, share, str(seed))
    train: list[Symbol] = []
    held_symbols: list[Symbol] = []
    held_modules: list[Symbol] = []
    for symbol in single:
        if symbol.package in packages:
            held_modules += [] if symbol.family in shared else [symbol]
        elif symbol.family in held_families:
            held_symbols.append(symbol)
        else:
            train.append(symbol)
    return HeldOut(train, held_symbols, held_modules, packages)


def draw_definitions(symbols: Sequence[Symbol], share: float, seed: str) -> frozenset[str]:
    """Families with about that share of the symbols of each area of the library, in a seeded order.

    A family that is large for its area is skipped: the drawn ones take at most twice the share, and never all.
    """
    sizes: dict[str | None, Counter[str]] = defaultdict(Counter)
    for symbol in symbols:
        sizes[area(symbol)][symbol.family] += 1
    chosen: set[str] = set()
    for families in sizes.values():
        target, drawn = share * families.total(), 0
        for family in sorted(families, key=lambda name: hashlib.blake2b(f"{seed}:{name}".encode()).digest()):
            if drawn < target and drawn + families[family] <= min(max(1, 2 * target), families.total() - 1):
                chosen.add(family)
                drawn += families[family]
    return frozenset(chosen)


def one_name_each(symbols: Sequence[Symbol]) -> list[Symbol]:
    """Of every object the shortest of its public names, in alphabetical order."""
    shortest: dict[tuple[str, str, str], Symbol] = {}
    for symbol in sorted(symbols, key=lambda symbol: (symbol.name.count("."), len(symbol.name), symbol.name)):
        last = ".".join(symbol.name.rsplit(".", 2)[-2:]) if symbol.kind == "method" else symbol.name.rpartition(".")[2]
        shortest.setdefault((symbol.family, symbol.kind, last), symbol)
    return sorted(shortest.values(), key=lambda symbol: symbol.name)


def is_askable_class(symbol: Symbol) -> bool:
    """A class with bases worth asking for."""
    return symbol.kind == "class" and symbol.bases not in ((), ("object",))


def _choose_packages(symbols: Sequence[Symbol], share: float, questions: int, seed: int) -> frozenset[str]:
    summaries = Counter(symbol.package for symbol in symbols if symbol.summary)
    classes = Counter(symbol.package for symbol in symbols if is_askable_class(symbol))
    total = summaries.total()
    chosen: list[str] = []
    order = sorted(set(summaries), key=lambda name: hashlib.blake2b(f"{seed}:{name}".encode()).digest())
    for package in order:
        taken = sum(summaries[name] for name in chosen)
        named = sum(classes[name] for name in chosen)
        many = taken >= max(share * total, min(questions * 1.1, MAX_SHARE * total / 2))
        enough = many and named >= min(questions / 2, share * classes.total())
        if enough or len(chosen) == len(order) - 1:
            break
        if summaries[package] <= MAX_PACKAGE * MAX_SHARE * total and taken + summaries[package] <= MAX_SHARE * total:
            chosen.append(package)
    return frozenset(chosen)
