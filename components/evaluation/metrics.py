"""Bits per byte of text, and confidence intervals."""

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


class PieceScore(NamedTuple):
    """A model's score of the masked tokens of a piece."""

    bits: float
    """Their negative log-likelihood in bits."""
    greedy: bool
    """Whether each is the model's most probable token."""


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion at 95 %; (0, 1) without trials."""
    if not trials:
        return 0.0, 1.0
    interval = binomtest(successes, trials).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def bits_per_byte(
    model: Decoder, tokenizer: ChatTokenizer, pieces: Sequence[Encoded], batch_size: int
) -> tuple[float, int]:
    """Negative log-likelihood in bits per byte of the masked tokens' text, and the number of those bytes.

    A special token counts in bits and has no bytes: ending a text in the right place is part of the task.
    """
    bits = sum(piece_bits(model, tokenizer, pieces, batch_size))
    size = sum(masked_bytes(tokenizer, piece) for piece in pieces)
    return (bits / size if size else math.inf), size


def masked_bytes(tokenizer: ChatTokenizer, piece: Encoded) -> int:
    """Bytes of the text of a piece's masked tokens, without the first token, which is not predicted."""
    ids, mask = piece
    return sum(
        len(tokenizer.token_bytes(number)) for number, is_target in list(zip(ids, mask, strict=True))[1:] if is_target
    )


def piece_bits(model: Decoder, tokenizer: ChatTokenizer, pieces: Sequence[Encoded], batch_size: int) -> list[float]:
    """Negative log-likelihood in bits of the masked tokens of each piece, in order."""
    return [score.bits for score in score_pieces(model, tokenizer, pieces, batch_size)]


@torch.inference_mode()
def score_pieces(
    model: Decoder, tokenizer: ChatTokenizer, pieces: Sequence[Encoded], batch_size: int
) -> list[PieceScore]:
    """The score of each piece, in order; pieces of similar length share a batch."""
    device = next(model.parameters()).device
    scored = [PieceScore(0.0, True)] * len(pieces)
    by_length = sorted(range(len(pieces)), key=lambda number: len(pieces[number][0]))
    for start in range(0, len(pieces), batch_size):
        numbers = by_length[start : start + batch_size]
        batch = [pieces[number] for number in numbers]
        width = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([row + [tokenizer.pad_id] * (width - len(row)) for row, _ in batch], device=device)
        mask = torch.tensor([row + [0] * (width - len(row)) for _, row in batch], device=device)
        segments = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in batch], device=device)
        logits = model(ids, segment_ids=segments).float()[:, :-1]
        targets = mask[:, 1:].bool()
        losses = torch.zeros(targets.shape, device=device)
        losses[targets] = F.cross_entropy(logits[targets], ids[:, 1:][targets], reduction="none")
        greedy = ((logits.argmax(-1) == ids[:, 1:]) | ~targets).all(dim=1)
        sums = losses.sum(dim=1, dtype=torch.float64)
        for number, loss, all_greedy in zip(numbers, sums.tolist(), greedy.tolist(), strict=True):
            scored[number] = PieceScore(loss / math.log(2), all_greedy)
    return scored
