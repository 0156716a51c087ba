"""Keys and values of earlier prompts, for those that begin alike."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict

from torch import Tensor

MIN_SHARED = 16
"""Tokens of the shortest common prefix that is copied instead of prefilled again."""
Ids = tuple[int, ...]


class PrefixCache:
    """Keys and values of prompts of rows that left; the least recently used go first."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._entries: OrderedDict[Ids, Tensor] = OrderedDict()
        self._sorted: list[Ids] = []
        """The same, in an order in which those that begin alike are neighbours."""
        self.tokens = 0

    def keep(self, ids: Ids, part: Tensor) -> None:
        """Keep keys and values (layers, 2, K, T, D) of T ids; the entry before it that these extend is dropped."""
        index = bisect_left(self._sorted, ids)
        if index and self._sorted[index - 1] == ids[: len(self._sorted[index - 1])]:
            self._drop(self._sorted[index - 1])
        if ids in self._entries:
            self._drop(ids)
        self._entries[ids] = part.clone()
        insort(self._sorted, ids)
        self.tokens += len(ids)
        while self.tokens > self._max_tokens:
            self._drop(next(iter(self._entries)))

    def best(self, ids: Ids) -> tuple[int, Tensor | None]:
        """The longest common beginning with what is kept, and whose it is."""
        index = bisect_left(self._sorted, ids)
        neighbours = self._sorted[max(0, index - 1) : index + 1]
        nearest = max(neighbours, key=lambda key: common(key, ids), default=None)
        if nearest is None or not (longest := common(nearest, ids)):
            return 0, None
        self._entries.move_to_end(nearest)
        return longest, self._entries[nearest]

    def _drop(self, ids: Ids) -> None:
        del self._entries[ids]
        del self._sorted[bisect_left(self._sorted, ids)]
        self.tokens -= len(ids)


def common(first: Ids, second: Ids) -> int:
    """Length of the common beginning, 0 where it is too short to be worth a copy."""
    length, most = 0, min(len(first), len(second))
    while length < most:  # by halves: slices compare at the speed of memory
        middle = (length + most + 1) // 2
        if first[length:middle] == second[length:middle]:
            length = middle
        else:
            most = middle - 1
    return length if length >= MIN_SHARED else 0
