"""What pretraining hides from a model: masked tokens (BERT, arXiv 1810.04805) and spans (T5, arXiv 1910.10683)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from components.token_rows.batches import IGNORED

Ids = npt.NDArray[np.int64]
Marks = npt.NDArray[np.bool_]

MASKED_SHARE, RANDOM_SHARE = 0.8, 0.1
"""Of the chosen tokens: shown as the mask, shown as another token; the rest is shown as it is."""


def mask_tokens(
    ids: Ids,
    choosable: Marks,
    random: np.random.Generator,
    mask_id: int,
    regular: Ids,
    share: float,
    words: Ids | None,
) -> tuple[Ids, Ids]:
    """Section 3.1, task 1 of the BERT paper: ids (T,) as the model sees them, and labels (T,), else IGNORED.

    `share` of the `choosable` tokens (T,), at least one, is to be guessed: 80 % of them are shown as `mask_id`, 10 %
    as one of `regular` (R,), 10 % as they are. With `words` (T,), the number of each token's word, whole words
    are chosen, as many as fit.
    """
    shown, labels = ids.copy(), np.full_like(ids, IGNORED)
    places = np.flatnonzero(choosable)
    if not len(places):
        return shown, labels
    wanted = max(1, round(len(places) * share))
    chosen = random.permutation(places)[:wanted] if words is None else _whole_words(places, words, wanted, random)
    labels[chosen] = ids[chosen]
    fate = random.random(len(chosen))
    shown[chosen[fate < MASKED_SHARE]] = mask_id
    others = chosen[(fate >= MASKED_SHARE) & (fate < MASKED_SHARE + RANDOM_SHARE)]
    shown[others] = regular[random.integers(len(regular), size=len(others))]
    return shown, labels


def _whole_words(places: Ids, words: Ids, wanted: int, random: np.random.Generator) -> Ids:
    """Places of words in random order, those left out that would make it more than wanted."""
    found = words[places]
    starts = np.flatnonzero(np.diff(found, prepend=found[0] - 1))
    groups = np.split(places, starts[1:])
    chosen: list[Ids] = []
    room = wanted
    for number in random.permutation(len(groups)):
        if len(groups[number]) <= room:
            chosen.append(groups[number])
            room -= len(groups[number])
        if not room:
            break
    return np.concatenate(chosen) if chosen else groups[int(random.integers(len(groups)))][:wanted]


def corrupt_spans(
    ids: Ids, random: np.random.Generator, sentinels: Sequence[int], end_id: int, share: float, mean_length: float
) -> tuple[list[int], list[int]]:
    """Section 3.1.4 of the T5 paper: what the encoder reads of ids (T,), and what the decoder is to write.

    About `share` of the tokens lie in spans of `mean_length` on average. Each span is one of the `sentinels` in the
    source; the target names each with what it stands for. Both end with `end_id`. The lengths depend on T alone.
    """
    noise = min(max(round(len(ids) * share), 1), len(ids) - 1)
    spans = min(max(1, round(noise / mean_length)), noise, len(ids) - noise, len(sentinels))
    hidden = _partition(noise, spans, random)
    seen = _partition(len(ids) - noise, spans, random)
    source: list[int] = []
    target: list[int] = []
    start = 0
    for sentinel, kept, lost in zip(sentinels, seen, hidden, strict=False):
        source += [*ids[start : start + kept].tolist(), sentinel]
        target += [sentinel, *ids[start + kept : start + kept + lost].tolist()]
        start += kept + lost
    return [*source, end_id], [*target, end_id]


def _partition(total: int, parts: int, random: np.random.Generator) -> list[int]:
    """`total` as a sum of that many positive numbers, all such sums equally likely."""
    cuts = np.sort(random.choice(total - 1, parts - 1, replace=False)) + 1
    return [int(size) for size in np.diff(cuts, prepend=0, append=total)]
