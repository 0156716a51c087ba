"""Figures and their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from components.data.tokenizer import ChatTokenizer
from components.models.decoder import Decoder

Encoded = tuple[list[int], list[int]]
"""Ids and mask of one text or chat."""


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a proportion (95 % at z = 1.96); (0, 1) without trials."""
    if not trials:
        return 0.0, 1.0
    share = successes / trials
    centre = share + z * z / (2 * trials)
    margin = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - margin) / scale), min(1.0, (centre + margin) / scale)


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


@torch.inference_mode()
def piece_bits(model: Decoder, tokenizer: ChatTokenizer, pieces: Sequence[Encoded], batch_size: int) -> list[float]:
    """Bits that the model needs for the masked tokens of each piece, in order."""
    device = next(model.parameters()).device
    bits = [0.0] * len(pieces)
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
        for number, loss in zip(numbers, losses.sum(dim=1, dtype=torch.float64).tolist(), strict=True):
            bits[number] = loss / math.log(2)
    return bits
