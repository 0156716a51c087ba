"""One attention for every model: self-, cross- and vision attention, with grouped queries.

Shapes: B batch, T queries, S keys, E embed_dim, H query heads, K key/value heads, D head_dim.
The cache of keys and values is an argument and lives outside of the modules.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from components.models.fused import RMSNorm, pays, self_attention
from components.models.positions import Rotary, rotate

SHORT = 1024 * 1024
"""Scores per head up to which plain batched products beat the fused kernel on a CPU."""


class FusedLinear(nn.Linear):
    """Several projections of one input as one product; `parts` are their output widths."""

    def __init__(self, in_features: int, parts: tuple[int, ...]) -> None:
        super().__init__(in_features, sum(parts), bias=False)
        self.parts = parts


class LayerCache:
    """Keys and values of one layer, filled from the left."""

    def __init__(
        self, owner: KVCache, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.owner = owner
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # (B, K, max_len, D)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values (B, K, T, D) behind what is there and return all of both."""
        start = self.owner.length
        end = start + keys.shape[2]
        self.keys[:, :, start:end] = keys
        self.values[:, :, start:end] = values
        return self.keys[:, :, :end], self.values[:, :, :end]


class KVCache:
    """Keys and values of a batch whose rows have the same length (shorter ones padded on the left).

    An engine may bring its own: the decoder asks for `length`, `layers[i].extend` and `advance` alone.
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        num_kv_heads: int,
        max_len: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (batch, num_kv_heads, max_len, head_dim)
        self.length = 0
        self.layers = [LayerCache(self, shape, dtype, torch.device(device)) for _ in range(num_layers)]

    def advance(self, count: int) -> None:
        """Count `count` more positions as filled, once every layer has extended itself by them."""
        self.length += count

    def keep(self, rows: Tensor) -> None:
        """Drop every row of the batch but these."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]


class Attention(nn.Module):
    """Queries from x; keys and values from x, or from `context` (cross-attention)."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        kv_dim = num_kv_heads * head_dim
        self.qkv = FusedLinear(embed_dim, (num_heads * head_dim, kv_dim, kv_dim))
        self.out = nn.Linear(num_heads * head_dim, embed_dim, bias=False)
        self.q_norm = RMSNorm(head_dim, eps=norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, eps=norm_eps) if qk_norm else None

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """x (B, T, E), context (B, S, E) -> (B, T, E).

        `mask` broadcasts to (B, H, T, S): boolean (true: may attend) or added to the scores; without it every
        query sees every key. `rotary` turns queries and keys. `cache` is extended by this call's keys and values.
        """
        if pays(x) and context is None and cache is None and mask is not None and rotary is not None:
            return self._train_on_cpu(x, mask, rotary)
        queries, keys, values = self._project(x, context)
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        if rotary is not None:
            queries, keys = rotate(queries, rotary), rotate(keys, rotary)
        queries, keys, values = (each.transpose(1, 2) for each in (queries, keys, values))  # (B, H, T, D)
        if cache is not None:
            keys, values = cache.extend(keys, values)
        mixed = attend(queries, keys, values, mask)
        added: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return added

    def _train_on_cpu(self, x: Tensor, mask: Tensor, rotary: Rotary) -> Tensor:
        gains, eps = None, 0.0
        if self.q_norm is not None and self.k_norm is not None:
            gains, eps = (self.q_norm.weight, self.k_norm.weight), self.q_norm.eps or 0.0
        mixed = self_attention(self._heads(self.qkv(x)), gains, eps, rotary, additive(mask, x.dtype), self.num_heads)
        added: Tensor = self.out(mixed)
        return added

    def _project(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if context is None:
            projected = self._heads(self.qkv(x))  # (B, T, H + 2K, D)
            queries, keys, values = torch.split(
                projected, [self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=2
            )
            return queries, keys, values
        q_dim = self.qkv.parts[0]
        queries = self._heads(F.linear(x, self.qkv.weight[:q_dim]))
        keys, values = self._heads(F.linear(context, self.qkv.weight[q_dim:])).chunk(2, dim=2)
        return queries, keys, values

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.head_dim)


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax of scaled products over keys: queries (B, H, T, D), keys and values (B, K, S, D) -> (B, H, T, D)."""
    batch, heads, length, head_dim = queries.shape
    kv_heads, span = keys.shape[1], keys.shape[2]
    if queries.is_cuda or length * span > SHORT:
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=heads != kv_heads)
    grouped = (queries * head_dim**-0.5).reshape(batch, kv_heads, -1, head_dim)  # query heads of one key head in a row
    scores = (grouped @ keys.transpose(-1, -2)).view(batch, kv_heads, -1, length, span)
    if mask is not None:
        scores = scores + additive(mask, scores.dtype).unsqueeze(2)
    weights = scores.softmax(-1).view(batch, kv_heads, -1, span)
    mixed: Tensor = (weights @ values).view(batch, heads, length, head_dim)
    return mixed


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask (true: may attend) as numbers to add to scores; others stay as they are."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def causal_mask(length: int, span: int, device: torch.device) -> Tensor:
    """(T, S) true where query t, the last of which is key S - 1, may see key s."""
    return torch.ones(length, span, dtype=torch.bool, device=device).tril(span - length)


def segment_mask(segment_ids: Tensor) -> Tensor:
    """(B, T, T) true where two tokens of a packed row belong to one document."""
    return segment_ids.unsqueeze(2) == segment_ids.unsqueeze(1)
