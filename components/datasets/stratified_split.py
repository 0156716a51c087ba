"""Splits that keep each label's share: which rows are tested, validated and trained on is decided label by label."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable

from components.config.params import InputError
from components.datasets.formats import Row, Split

MIN_ROWS = 3
"""Rows of a label from which it is in every split."""


def stratified(
    rows: Callable[[], Iterable[Row]], test_share: float, validation_share: float, seed: int
) -> Callable[[Row], Split]:
    """Which split each row is of: of each label the rows with the smallest hashes of their ids, as many as the shares
    say and, from MIN_ROWS on, at least one; of two rows one is tested, a lone row is trained on.

    Raises: InputError for an id that is there twice.
    """
    by_label: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for row in rows():
        by_label[row["label"]].append((_place(seed, row["id"]), row["id"]))
    chosen: dict[str, Split] = {}
    for label, held in by_label.items():
        held.sort()
        tested = max(1, round(len(held) * test_share)) if len(held) > 1 else 0
        validated = max(1, round(len(held) * validation_share)) if len(held) >= MIN_ROWS else 0
        validated = min(validated, len(held) - tested - 1) if validated else 0
        for number, (_, identity) in enumerate(held[: tested + validated]):
            if identity in chosen:
                raise InputError(f"{label!r}: id {identity!r} is there twice; give every row an id of its own")
            chosen[identity] = "test" if number < tested else "validation"
    return lambda row: chosen.get(row["id"], "train")


def by_hash(
    rows: Callable[[], Iterable[Row]], test_share: float, validation_share: float, seed: int
) -> Callable[[Row], Split]:
    """The same for rows without labels: all are of one kind."""
    return stratified(lambda: ({"id": row["id"], "label": ""} for row in rows()), test_share, validation_share, seed)


def _place(seed: int, identity: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}:{identity}".encode(), digest_size=8).digest(), "big")
