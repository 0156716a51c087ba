"""Figures and their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy.stats import binomtest

from components.models.decoder import Decoder
from components.tokenization.chat_tokenizer import ChatTokenizer

Encoded = tuple[list[int], list[int]]
"""Ids and mask of one text or chat."""


class Scored(NamedTuple):
    """What a model makes of a piece's masked tokens."""

    bits: float
    """That it needs for them."""
    greedy: bool
    """Whether each is the token that it finds likeliest."""


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion at 95 %; (0, 1) without trials."""
    if not trials:
        return 0.0, 1.0
    interval = binomtest(successes, trials).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def bits_per_byte(
    model: Decoder, tokenizer: ChatTokenizer, pieces: Sequence[Encoded], batch_size: int
) -> tuple[float, int]:
    """Bits that the model needs per byte of the masked tokens' text, and the number of those bytes.

    A special token counts in bits and has no bytes: ending a text in the right place is part of the task.
    """
    bits = sum(piece_bits(model, tokenizer, pieces, batch_size))
    size = sum(masked_bytes(tokenizer, piece) for piece in pieces)
    return (bits / size if size else math.inf), size


def masked_bytes(tokenizer: ChatTokenizer, piece: Encoded) -> int:
    """Bytes of the text of a piece's masked tokens, the first token left out: nothing foretells it."""
    ids, mask = piece
    return sum(
        len(tokenizer.token_bytes(number)) for number, learned in list(zip(ids, mask, strict=True))[1:] if learned
    )


def piece_bits(model: Decoder, tokenizer: ChatTokenizer, pieces: Sequence[Encoded], batch_size: int) -> list[float]:
    """Bits that the model needs for the masked tokens of each piece, in order."""
    return [scored.bits for scored in score_pieces(model, tokenizer, pieces, batch_size)]


@torch.inference_mode()
def score_pieces(model: Decoder, tokenizer: ChatTokenizer, pieces: Sequence[Encoded], batch_size: int) -> list[Scored]:
    """What the model makes of the masked tokens of each piece, in order."""
    device = next(model.parameters()).device
    scored = [Scored(0.0, True)] * len(pieces)
    by_length = sorted(range(len(pieces)), key=lambda number: len(pieces[number][0]))
    for start in range(0, len(pieces), batch_size):
        numbers = by_length[start : start + batch_size]
        batch = [pieces[number] for number in numbers]
        width = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([row + [tokenizer.pad_id] * (width - len(row)) for row, _ in batch], device=device)
        mask = torch.tensor([row + [0] * (width - len(row)) for _, row in batch], device=device)
        segments = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in batch], device=device)
        logits = model(ids, segment_ids=segments).float()[:, :-1]
        learned = mask[:, 1:].bool()
        losses = torch.zeros(learned.shape, device=device)
        losses[learned] = F.cross_entropy(logits[learned], ids[:, 1:][learned], reduction="none")
        greedy = ((logits.argmax(-1) == ids[:, 1:]) | ~learned).all(dim=1)
        sums = losses.sum(dim=1, dtype=torch.float64)
        for number, loss, likeliest in zip(numbers, sums.tolist(), greedy.tolist(), strict=True):
            scored[number] = Scored(loss / math.log(2), likeliest)
    return scored
