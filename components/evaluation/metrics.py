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


@torch.inference_mode()
def bits_per_byte(
    model: Decoder, tokenizer: ChatTokenizer, pieces: Sequence[Encoded], batch_size: int
) -> tuple[float, int]:
    """Bits that the model needs per byte of the masked tokens' text, and the number of those bytes.

    A special token counts in bits and has no bytes: ending a text in the right place is part of the task.
    """
    device = next(model.parameters()).device
    bits = 0.0
    size = 0
    ordered = sorted(pieces, key=lambda piece: len(piece[0]))
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        width = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([row + [tokenizer.pad_id] * (width - len(row)) for row, _ in batch], device=device)
        mask = torch.tensor([row + [0] * (width - len(row)) for _, row in batch], device=device)
        segments = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in batch], device=device)
        logits = model(ids, segment_ids=segments).float()[:, :-1]
        learned = mask[:, 1:].bool()
        bits += F.cross_entropy(logits[learned], ids[:, 1:][learned], reduction="sum").item() / math.log(2)
        size += sum(len(tokenizer.token_bytes(number)) for number in ids[:, 1:][learned].tolist())
    return (bits / size if size else math.inf), size
