"""Copy augmentation and token-noise augmentation, for copying names out of prompts and answers out of tool results.

A small model learns to copy only tokens that it has copied before. So pretraining rows repeat spans, and conversations
are repeated with random tokens inside the spans that their calls and answers copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from components.tokenization.chat_tokenizer import SPECIAL_TOKENS, ChatTokenizer

Piece = tuple[list[int], list[int]]
"""Ids and mask of one document or conversation."""

FIRST_ID = len(SPECIAL_TOKENS)
NAME_SHARE = 0.5
"""Share of copied spans that are real names; the others are random tokens."""
REPLACEMENT_RATE = 0.35
"""Probability that a token of a copied span is replaced."""


def copy_augmented_rows(
    names: Sequence[str], tokenizer: ChatTokenizer, count: int, seq_len: int, seed: int | Sequence[int]
) -> Iterator[list[Piece]]:
    """Rows of spans that are repeated in another order.

    A span's first occurrence, and the first token of each repetition, cannot be predicted and are not in the mask.
    """
    random = np.random.default_rng(seed)
    encoded = tokenizer.encode_batch([" " + name for name in names])
    for _ in range(count):
        row: list[Piece] = []
        free = seq_len
        while free >= 24:
            spans = [_span(random, encoded, tokenizer.vocab_size) for _ in range(random.integers(1, 5))]
            repeated = [spans[index] for index in random.integers(len(spans), size=2 * len(spans))]
            ids = [tokenizer.document_id, *(token for span in [*spans, *repeated] for token in span)]
            mask = [0] * (1 + sum(map(len, spans))) + [
                int(index > 0) for span in repeated for index in range(len(span))
            ]
            row.append((ids[:free], mask[:free]))
            free -= len(row[-1][0])
        yield row


def _span(random: np.random.Generator, encoded: Sequence[list[int]], vocab_size: int) -> list[int]:
    if encoded and random.random() < NAME_SHARE:
        return encoded[int(random.integers(len(encoded)))][:16]
    span: list[int] = random.integers(FIRST_ID, vocab_size, size=random.integers(2, 12)).tolist()
    return span


def with_token_noise(ids: list[int], random: np.random.Generator, tokenizer: ChatTokenizer) -> list[int] | None:
    """The conversation with random tokens in its copied spans, equal in each copy; None without such spans."""
    noisy = list(ids)
    changed = False
    stop_id = tokenizer.vocab_size - bool(tokenizer.image_tokens)  # the last is the image token
    for start, stop in _fields(ids, tokenizer):
        starts = _occurrences(ids, ids[start:stop])
        if len(starts) < 2:
            continue
        for offset in range(stop - start):
            if random.random() < REPLACEMENT_RATE:
                token = int(random.integers(FIRST_ID, stop_id))
                changed = True
                for copy in starts:
                    noisy[copy + offset] = token
    return noisy if changed else None


def _fields(ids: Sequence[int], tokenizer: ChatTokenizer) -> Iterator[tuple[int, int]]:
    """(start, stop) of argument values and tool results."""
    start = -1
    for index, token in enumerate(ids):
        if token < FIRST_ID:
            if 0 <= start < index:
                yield start, index
            start = index + 1 if token in (tokenizer.value_id, tokenizer.tool_id) else -1


def _occurrences(ids: list[int], span: list[int]) -> list[int]:
    first, size = span[0], len(span)
    return [index for index, token in enumerate(ids) if token == first and ids[index : index + size] == span]
