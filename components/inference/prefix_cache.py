"""Keys and values of earlier prompts, for those that begin alike."""

from __future__ import annotations

import threading
from bisect import bisect_left, insort
from collections import OrderedDict

from torch import Tensor

MIN_SHARED = 16
"""Tokens of the shortest common prefix that is copied instead of prefilled again."""
Ids = tuple[int, ...]


class PrefixCache:
    """Keys and values of prompts of rows that left; the least recently used go first.

    One thread keeps and takes; any may ask for `shared`.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._entries: OrderedDict[Ids, Tensor] = OrderedDict()
        self._sorted: list[Ids] = []
        """The same, in an order in which those that begin alike are neighbours."""
        self._ordering = threading.Lock()
        """Held while that order changes."""
        self.tokens = 0

    def keep(self, ids: Ids, part: Tensor) -> None:
        """Keep keys and values (layers, 2, K, T, D) of T ids; the entry before it that these extend is dropped."""
        index = bisect_left(self._sorted, ids)
        if index and self._sorted[index - 1] == ids[: len(self._sorted[index - 1])]:
            self._drop(self._sorted[index - 1])
        if ids in self._entries:
            self._drop(ids)
        self._entries[ids] = part.clone()
        with self._ordering:
            insort(self._sorted, ids)
        self.tokens += len(ids)
        while self.tokens > self._max_tokens:
            self._drop(next(iter(self._entries)))

    def best(self, ids: Ids) -> tuple[int, Tensor | None]:
        """The longest common beginning with what is kept, and whose it is."""
        nearest, longest = self._nearest(ids)
        if not longest:
            return 0, None
        self._entries.move_to_end(nearest)
        return longest, self._entries[nearest]

    def shared(self, ids: Ids) -> int:
        """The length of the longest common beginning."""
        return self._nearest(ids)[1]

    def _nearest(self, ids: Ids) -> tuple[Ids, int]:
        with self._ordering:
            index = bisect_left(self._sorted, ids)
            neighbours = self._sorted[max(0, index - 1) : index + 1]
        return max(((key, common(key, ids)) for key in neighbours), key=lambda pair: pair[1], default=((), 0))

    def _drop(self, ids: Ids) -> None:
        del self._entries[ids]
        with self._ordering:
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
