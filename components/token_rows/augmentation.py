"""Practice in copying, the skill that a tool-calling agent lives by: names out of questions, answers out of results.

A small model learns to copy the tokens that it has copied before. So spans are repeated in
pretraining rows, and conversations are told again with random tokens inside the spans that
their calls and answers copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from components.tokenization.chat_tokenizer import SPECIAL_TOKENS, ChatTokenizer

Piece = tuple[list[int], list[int]]
"""Ids and mask of one document or conversation."""

FIRST_ID = len(SPECIAL_TOKENS)
NAMES = 0.5
"""Share of practised spans made of real names; the others are random tokens."""
REPLACED = 0.35
"""Chance of each token of a copied span to be replaced."""


def copy_augmented_rows(
    names: Sequence[str], tokenizer: ChatTokenizer, count: int, seq_len: int, seed: int
) -> Iterator[list[Piece]]:
    """Rows of spans that come again, in another order.

    A span's first occurrence, and the first token of its second, cannot be foreseen and are not learned.
    """
    random = np.random.default_rng(seed)
    encoded = tokenizer.encode_batch([" " + name for name in names])
    for _ in range(count):
        row: list[Piece] = []
        free = seq_len
        while free >= 24:
            spans = [_span(random, encoded, tokenizer.vocab_size) for _ in range(random.integers(1, 5))]
            again = [spans[index] for index in random.integers(len(spans), size=2 * len(spans))]
            ids = [tokenizer.document_id, *(token for span in [*spans, *again] for token in span)]
            mask = [0] * (1 + sum(map(len, spans))) + [int(place > 0) for span in again for place in range(len(span))]
            row.append((ids[:free], mask[:free]))
            free -= len(row[-1][0])
        yield row


def _span(random: np.random.Generator, encoded: Sequence[list[int]], vocab_size: int) -> list[int]:
    if encoded and random.random() < NAMES:
        return encoded[int(random.integers(len(encoded)))][:16]
    span: list[int] = random.integers(FIRST_ID, vocab_size, size=random.integers(2, 12)).tolist()
    return span


def with_token_noise(ids: list[int], random: np.random.Generator, tokenizer: ChatTokenizer) -> list[int] | None:
    """The conversation with random tokens in its copied spans, alike in every place; None without such spans."""
    noisy = list(ids)
    changed = False
    for start, stop in _fields(ids, tokenizer):
        places = _occurrences(ids, ids[start:stop])
        if len(places) < 2:
            continue
        for offset in range(stop - start):
            if random.random() < REPLACED:
                token = int(random.integers(FIRST_ID, tokenizer.vocab_size))
                changed = True
                for place in places:
                    noisy[place + offset] = token
    return noisy if changed else None


def _fields(ids: Sequence[int], tokenizer: ChatTokenizer) -> Iterator[tuple[int, int]]:
    """Where argument values and tool results begin and end."""
    start = -1
    for place, token in enumerate(ids):
        if token < FIRST_ID:
            if 0 <= start < place:
                yield start, place
            start = place + 1 if token in (tokenizer.value_id, tokenizer.tool_id) else -1


def _occurrences(ids: list[int], span: list[int]) -> list[int]:
    first, size = span[0], len(span)
    return [place for place, token in enumerate(ids) if token == first and ids[place : place + size] == span]
