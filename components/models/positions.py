"""Rotary positions (arXiv 2104.09864) in the half-split layout that Llama and Qwen3 use.

A head's width is split in two halves; pair (i, i + D/2) turns by an angle that grows
with the position, so that a product of query and key sees only their distance.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

Rotary = tuple[Tensor, Tensor]
"""Cosine and signed sine of every position, each (B or 1, T, 1, D)."""


class RotaryPositions(nn.Module):
    """Table of angles, looked up by position."""

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, max_seq_len: int, theta: float) -> None:
        super().__init__()
        frequency = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        angle = torch.outer(torch.arange(max_seq_len, dtype=torch.float32), frequency)  # (T, D/2)
        # The first half of the sine is negative, so that turning is x * cos + swap(x) * sin with no sign to flip.
        self.register_buffer("cos", torch.cat([angle.cos(), angle.cos()], dim=-1), persistent=False)
        self.register_buffer("sin", torch.cat([-angle.sin(), angle.sin()], dim=-1), persistent=False)

    def forward(self, position_ids: Tensor) -> Rotary:
        """Look up position_ids (B, T)."""
        return self.cos[position_ids].unsqueeze(2), self.sin[position_ids].unsqueeze(2)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn x (B, T, heads, D) by its positions."""
    cos, sin = rotary
    if torch.is_grad_enabled() or x.is_cuda:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([second, first], dim=-1) * sin
    return rotate_into(torch.empty_like(x), x, cos, sin)


def rotate_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` in three passes and no new memory, for where no gradient is asked for."""
    half = x.shape[-1] // 2
    torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(x[..., half:], sin[..., :half])
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out
