"""Positions of tokens: rotary positions, and T5's bias by distance.

Rotary positions (arXiv 2104.09864) in the half-split layout that Llama and Qwen3 use: a head's width is split in
two halves; pair (i, i + D/2) turns by an angle that grows with the position, so that a product of query and key sees
only their distance. T5 (arXiv 1910.10683, section 2.1) adds to each score a learned number for the distance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Rotary = tuple[Tensor, Tensor]
"""Cosine and signed sine of every position, each (B or 1, T, 1, R)."""


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are changed for a longer context; names and meanings are those of `rope_parameters`."""

    rope_type: Literal["linear", "llama3", "yarn", "longrope"]
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    """What cosine and sine are multiplied by."""
    short_factor: tuple[float, ...] = ()
    """What each frequency is divided by (longrope), up to the original context."""

    def scaled(self, frequency: Tensor, theta: float) -> Tensor:
        """Frequencies (R/2) of R rotated dimensions."""
        if self.rope_type == "longrope":
            return frequency / torch.tensor(self.short_factor)
        if self.rope_type == "llama3":
            return self._llama3(frequency)
        if self.rope_type == "yarn":
            return self._yarn(frequency, theta)
        return frequency / self.factor

    def _llama3(self, frequency: Tensor) -> Tensor:
        """Long waves are stretched, short ones stay, those between are mixed (Llama 3.1's model code)."""
        turns = self.original_max_position_embeddings * frequency / (2 * math.pi)
        share = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        share = share.clamp(0, 1)
        return (1 - share) * frequency / self.factor + share * frequency

    def _yarn(self, frequency: Tensor, theta: float) -> Tensor:
        """YaRN (arXiv 2309.00071, section 3.2): a ramp between the dimensions of `beta_fast` and `beta_slow` turns."""
        count = len(frequency)

        def dimension(turns: float) -> float:
            return count * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / math.log(theta)

        first, last = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * count - 1)
        ramp = (torch.arange(count, dtype=torch.float32) - first) / (last - first or 0.001)
        stretched = ramp.clamp(0, 1)
        return frequency / self.factor * stretched + frequency * (1 - stretched)


def frequencies(rotary_dim: int, theta: float) -> Tensor:
    """Radians per position (R/2) of each pair of R rotated dimensions."""
    return theta ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)


class RotaryPositions(nn.Module):
    """Table of angles, looked up by position; `rotary_dim` says how many of a head's first dimensions are rotated."""

    cos: Tensor
    sin: Tensor

    def __init__(self, rotary_dim: int, max_seq_len: int, theta: float, scaling: RopeScaling | None = None) -> None:
        super().__init__()
        frequency = frequencies(rotary_dim, theta)
        if scaling is not None:
            frequency = scaling.scaled(frequency, theta)
        angle = torch.outer(torch.arange(max_seq_len, dtype=torch.float32), frequency)  # (T, R/2)
        cos, sin = angle.cos(), angle.sin()
        if scaling is not None:
            cos, sin = cos * scaling.attention_factor, sin * scaling.attention_factor
        # The first half of the sine is negative, so that turning is x * cos + swap(x) * sin with no sign to flip.
        self.register_buffer("cos", torch.cat([cos, cos], dim=-1), persistent=False)
        self.register_buffer("sin", torch.cat([-sin, sin], dim=-1), persistent=False)

    def forward(self, position_ids: Tensor) -> Rotary:
        """Look up position_ids (B, T), or (B) for one token a row: (B, 1, R)."""
        return self.cos[position_ids].unsqueeze(-2), self.sin[position_ids].unsqueeze(-2)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate x (B, T, heads, D) by its positions, its first R dimensions where the table has R."""
    cos, sin = rotary
    if (width := cos.shape[-1]) < x.shape[-1]:
        return torch.cat([rotate(x[..., :width], rotary), x[..., width:]], dim=-1)
    if torch.is_grad_enabled() or x.is_cuda:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([second, first], dim=-1) * sin
    return rotate_into(torch.empty_like(x), x, cos, sin)


def rotate_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` in three passes and no new memory, for use without gradients."""
    half = x.shape[-1] // 2
    torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(x[..., half:], sin[..., :half])
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


class RelativeBias(nn.Module):
    """One learned number per head and bucket of distances, added to the scores of every layer.

    Half of the buckets hold one near distance each, the others ranges that grow with it up to `max_distance`; a
    bidirectional bias has as many for the keys before a query as for those after it.
    """

    def __init__(self, num_buckets: int, max_distance: int, num_heads: int, bidirectional: bool) -> None:
        super().__init__()
        self.num_buckets, self.max_distance, self.bidirectional = num_buckets, max_distance, bidirectional
        self.table = nn.Embedding(num_buckets, num_heads)

    def forward(self, length: int, span: int) -> Tensor:
        """(1, H, T, S) for T = `length` queries, the last of which is key S - 1 where there are `span` = S keys."""
        device = self.table.weight.device
        keys = torch.arange(span, device=device)
        distance = keys - keys[span - length :].unsqueeze(1)
        bias: Tensor = self.table(self._bucket(distance))  # (T, S, H)
        return bias.permute(2, 0, 1).unsqueeze(0)

    def _bucket(self, distance: Tensor) -> Tensor:
        count = self.num_buckets // 2 if self.bidirectional else self.num_buckets
        first = (distance > 0) * count if self.bidirectional else 0
        distance = distance.abs() if self.bidirectional else (-distance).clamp(min=0)
        near = count // 2
        # How far between `near` and `max_distance`, on a scale of logarithms.
        far = (distance.clamp(min=1).float() / near).log() / math.log(self.max_distance / near) * (count - near)
        far = (near + far.long()).clamp(max=count - 1)
        return first + torch.where(distance < near, distance, far)
