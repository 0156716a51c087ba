"""Masked tokens and corrupted spans against cases worked out by hand, and the shares that the papers name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from components.token_rows.batches import IGNORED
from components.training.rows import corrupt_spans, mask_tokens

MASK, REGULAR = 3, np.arange(5, 100)


class Drawn:
    """A source of numbers that are given by hand."""

    def __init__(self, order: list[int], fates: list[float], replacements: list[int]) -> None:
        self.order, self.fates, self.replacements = order, fates, replacements

    def permutation(self, given: Any) -> np.ndarray[Any, Any]:
        return np.array(self.order)

    def random(self, count: int) -> np.ndarray[Any, Any]:
        assert count == len(self.fates)
        return np.array(self.fates)

    def integers(self, high: int, size: int) -> np.ndarray[Any, Any]:
        assert (high, size) == (len(REGULAR), len(self.replacements))
        return np.array(self.replacements, np.int64)


def masked(ids: list[int], choosable: list[int], drawn: Any, share: float, words: Any = None) -> tuple[Any, Any]:
    marks = np.isin(np.arange(len(ids)), choosable)
    words = None if words is None else np.array(words)
    shown, labels = mask_tokens(np.array(ids), marks, drawn, MASK, REGULAR, share, words)
    return shown.tolist(), labels.tolist()


def test_masking_equals_a_case_by_hand() -> None:
    """Of eight tokens that may be chosen, 0.4 are three: masked, replaced, and left as it is, in the order drawn."""
    ids = [1, 20, 21, 22, 23, 24, 25, 26, 27, 2]
    drawn = Drawn([6, 2, 4, 1, 3, 5, 7, 8], [0.79, 0.85, 0.95], [72])
    shown, labels = masked(ids, list(range(1, 9)), drawn, 0.4)
    assert shown == [1, 20, 77, 22, 23, 24, MASK, 26, 27, 2]
    ignored = IGNORED
    assert labels == [ignored, ignored, 21, ignored, 23, ignored, 25, ignored, ignored, ignored]


def test_whole_words_are_masked_together() -> None:
    """Words of 3, 1, 2 and 2 tokens; four may be hidden: the second drawn fits, the third no more, the fourth does."""
    ids, words = [20, 21, 22, 23, 24, 25, 26, 27], [0, 0, 0, 1, 2, 2, 3, 3]
    drawn = Drawn([2, 0, 1, 3], [0.1, 0.1, 0.1], [])
    shown, labels = masked(ids, list(range(8)), drawn, 0.375, words)
    assert shown == [20, 21, 22, MASK, MASK, MASK, 26, 27]
    assert [number for number, label in enumerate(labels) if label != IGNORED] == [3, 4, 5]


@pytest.mark.parametrize("whole_words", [False, True])
def test_shares_are_those_of_the_paper(whole_words: bool) -> None:
    random = np.random.default_rng(0)
    ids = random.integers(5, 100, 20_000)
    choosable = random.random(20_000) < 0.9
    words = np.arange(20_000) // 2 if whole_words else None
    shown, labels = mask_tokens(ids, choosable, random, MASK, REGULAR, 0.15, words)
    chosen = labels != IGNORED
    assert not (chosen & ~choosable).any()
    assert (shown == ids)[~chosen].all()
    assert (labels == ids)[chosen].all()
    assert chosen.sum() == pytest.approx(0.15 * choosable.sum(), abs=1)
    assert (shown[chosen] == MASK).mean() == pytest.approx(0.8, abs=0.02)
    # One replacement in 95 draws the token that stood there.
    assert (shown[chosen] == ids[chosen]).mean() == pytest.approx(0.1 + 0.1 / 95, abs=0.02)
    if words is not None:
        assert all(chosen[words == word][choosable[words == word]].all() for word in words[chosen][:50])


def test_one_token_is_always_chosen_and_none_where_none_may_be() -> None:
    random = np.random.default_rng(0)
    marks = np.array([False, True, False])
    _, labels = mask_tokens(np.array([1, 20, 2]), marks, random, MASK, REGULAR, 0.15, None)
    assert labels.tolist() == [IGNORED, 20, IGNORED]
    shown, labels = mask_tokens(np.array([1, 20, 2]), ~marks & marks, random, MASK, REGULAR, 0.15, None)
    assert (shown.tolist(), set(labels.tolist())) == ([1, 20, 2], {IGNORED})


class Cuts:
    """Gives the places of cuts by hand."""

    def __init__(self, *cuts: list[int]) -> None:
        self.cuts = list(cuts)

    def choice(self, total: int, count: int, replace: bool) -> np.ndarray[Any, Any]:
        assert not replace
        assert len(self.cuts[0]) == count
        return np.array(self.cuts.pop(0))


def test_span_corruption_is_the_papers_example() -> None:
    """Figure 2: Thank you [for inviting] me to your party [last] week. Three of ten tokens, in two spans."""
    thank, you, for_, inviting, me, to, your, party, last, week = range(20, 30)
    ids = np.array([thank, you, for_, inviting, me, to, your, party, last, week])
    # Spans of 2 and 1 hidden tokens behind 2 and 4 seen ones; a last seen piece is made part of the sequence by hand.
    drawn: Any = Cuts([1], [1])
    source, target = corrupt_spans(ids[:9], drawn, [90, 91, 92], 1, 0.33, 1.5)
    assert source == [thank, you, 90, me, to, your, party, 91, 1]
    assert target == [90, for_, inviting, 91, last, 1]


@pytest.mark.parametrize("length", [2, 3, 10, 128, 300])
def test_spans_can_be_put_back(length: int) -> None:
    random = np.random.default_rng(length)
    ids = random.integers(5, 90, length)
    sentinels = list(range(100, 200))
    sizes = set()
    for _ in range(20):
        source, target = corrupt_spans(ids, random, sentinels, 1, 0.15, 3.0)
        sizes.add((len(source), len(target)))
        pieces: dict[int, list[int]] = {}
        for token in target[:-1]:
            if token >= 100:
                pieces[token] = []
            else:
                pieces[list(pieces)[-1]].append(token)
        back = [one for token in source[:-1] for one in (pieces[token] if token >= 100 else [token])]
        assert back == ids.tolist()
        assert list(pieces) == sentinels[: len(pieces)]
        assert (source[-1], target[-1]) == (1, 1)
    assert len(sizes) == 1, "lengths depend on the number of tokens alone, so that batches need no padding"
    hidden = sum(len(piece) for piece in pieces.values())
    assert hidden == max(1, round(0.15 * length))
    assert len(pieces) == max(1, round(hidden / 3))
