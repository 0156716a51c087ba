"""The rows of a dataset that a user added, split by hashes of their ids.

A rule of how to split is data: a row's split depends on the rule and the row alone, whichever process reads it.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from components.config.params import InputError
from components.datasets.formats import Row, Split, in_test_split, read_rows

MIN_ROWS = 3
"""Rows of a label from which on it is in every split."""


@dataclass(frozen=True)
class SplitRule:
    """Which split a row belongs to: by label where there are limits, else by its share."""

    seed: int
    share: float = 0.0
    """Tested, of the hashes of ids, or of the first pictures."""
    tested_id: str | None = None
    """The only row that is tested, where the share would leave a split empty (a handful of rows); "": none is."""
    limits: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """By label, the hashes of ids below which a row is tested, and held out."""

    def split_of(self, row: Row) -> Split:
        """The split of a row; rows without a label count as of the label ""."""
        if self.limits:
            number, (tested, held_out) = self.hash_of(str(row["id"])), self.limits[row.get("label", "")]
            return "test" if number < tested else "validation" if number < held_out else "train"
        if self.tested_id is not None:
            return "test" if row["id"] == self.tested_id else "train"
        # What is held out together: a row, or all rows whose first picture is the same file.
        key = hashlib.sha256(row["images"][0]).hexdigest() if row.get("images") else str(row["id"])
        return "test" if in_test_split(key, self.share, self.seed) else "train"

    def hash_of(self, key: str) -> int:
        return int.from_bytes(hashlib.blake2b(f"{self.seed}:{key}".encode(), digest_size=8).digest())


@dataclass(frozen=True)
class AddedRows:
    """The rows of one split; each iteration reads the whole dataset."""

    folder: Path
    split: Split
    rule: SplitRule

    def __iter__(self) -> Iterator[Row]:
        return (row for row in read_rows(self.folder, "train") if self.rule.split_of(row) == self.split)


def by_share(rows: Callable[[], Iterable[Row]], share: float, seed: int) -> SplitRule:
    """Each row by itself; where that leaves a split empty, the last row alone is tested; a single row is trained on."""
    rule = SplitRule(seed, share)
    splits: set[Split] = set()
    ids: list[str] = []
    for row in rows():
        splits.add(rule.split_of(row))
        if len(splits) == 2:
            return rule
        if not ids or row["id"] != ids[-1]:
            ids = [*ids[:1], row["id"]]
    return SplitRule(seed, share, tested_id=ids[1] if len(ids) == 2 else "")


def by_label(rows: Callable[[], Iterable[Row]], test_share: float, validation_share: float, seed: int) -> SplitRule:
    """Of each label the rows with the smallest hashes of their ids are held out, as many as the shares require and,
    from MIN_ROWS on, at least one; of two rows one is tested, a single row is trained on.

    Memory holds 8 bytes a row. Raises: InputError for a repeated id.
    """
    rule = SplitRule(seed)
    hashes_of: dict[str, array[int]] = defaultdict(lambda: array("Q"))
    for row in rows():
        hashes_of[row.get("label", "")].append(rule.hash_of(str(row["id"])))
    limits: dict[str, tuple[int, int]] = {}
    for label, numbers in hashes_of.items():
        hashes = np.sort(np.frombuffer(numbers, np.uint64))
        tested = max(1, round(len(hashes) * test_share)) if len(hashes) > 1 else 0
        validated = max(1, round(len(hashes) * validation_share)) if len(hashes) >= MIN_ROWS else 0
        validated = min(validated, len(hashes) - tested - 1) if validated else 0
        held_out = hashes[: tested + validated]
        if len(repeated := held_out[1:][held_out[1:] == held_out[:-1]]):
            identity = next(row["id"] for row in rows() if rule.hash_of(str(row["id"])) == repeated[0])
            raise InputError(f"{label!r}: id {identity!r} is there twice; give every row an id of its own")
        ends = [int(hashes[count]) if count < len(hashes) else 2**64 for count in (tested, tested + validated)]
        limits[label] = ends[0], ends[1]
    return SplitRule(seed, limits=limits)
