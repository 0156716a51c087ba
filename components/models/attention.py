"""One attention for every model: self-, cross- and vision attention, with grouped queries.

Shapes: B batch, T queries, S keys, E embed_dim, H query heads, K key/value heads, D head_dim.
The cache of keys and values is an argument and lives outside of the modules.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from components.models.fused import RMSNorm, self_attention, should_fuse
from components.models.positions import Rotary, rotate

Pair = tuple[Tensor, Tensor]
"""Keys and values, each (B, K, S, D)."""
SHORT = 1024 * 1024
"""Scores per head up to which plain batched products beat the fused kernel on a CPU."""


class PackedDocuments(NamedTuple):
    """The documents of packed rows, in place of a mask: a query sees the keys of its document up to its own."""

    bounds: Tensor
    """(N + 1) int32: where each of the N documents begins among the B * T positions, then B * T."""
    longest: int
    """Tokens that no document exceeds: T."""
    window: int | None = None
    """Tokens that a query sees at most, its own among them."""


class FusedLinear(nn.Linear):
    """Several projections of one input as one product; `parts` are their output widths."""

    def __init__(self, in_features: int, parts: tuple[int, ...], bias: bool = False) -> None:
        super().__init__(in_features, sum(parts), bias=bias)
        self.parts = parts

    def some(self, x: Tensor, first: int, stop: int) -> Tensor:
        """The projections from `first` to before `stop` alone."""
        rows = slice(sum(self.parts[:first]), sum(self.parts[:stop]))
        return F.linear(x, self.weight[rows], self.bias[rows] if self.bias is not None else None)


class LayerCache:
    """Keys and values of one layer, filled from the left."""

    def __init__(
        self, owner: KVCache, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.owner = owner
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # (B, K, max_len, D)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, K, T, D) and return all of both."""
        start = self.owner.length
        end = start + keys.shape[2]
        self.keys[:, :, start:end] = keys
        self.values[:, :, start:end] = values
        return self.keys[:, :, :end], self.values[:, :, :end]


class KVCache:
    """Keys and values of a batch whose rows have the same length (shorter ones padded on the left).

    An engine may have its own: the decoder uses `length`, `layers[i].extend` and `advance` alone.
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
    """Multi-head attention (Vaswani et al. 2017, section 3.2.2): queries from x; keys and values from x or `context`.

    MultiHead(Q, K, V) = Concat(head_1, ..., head_H) W^O, head_i = Attention(Q W_i^Q, K W_i^K, V W_i^V).
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        bias: bool = False,
        scale: float | None = None,
        dropout: float = 0.0,
        out_bias: bool | None = None,
        joint_norm: bool = False,
        norm_offset: bool = False,
        causal: bool = True,
    ) -> None:
        """`scale` of the scores: 1 / sqrt(D) unless given. `dropout`: share of the weights left out in training.

        `bias` of queries, keys and values, and of the output unless `out_bias` says otherwise. `qk_norm`: of each
        head's queries and keys, with `joint_norm` of all heads' as one vector (OLMo 2). `causal`: masks given with
        rotary positions let each query see its own key and none behind it, as the fused training on a CPU asks for.
        """
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.scale, self.dropout = scale if scale is not None else head_dim**-0.5, dropout
        kv_dim = num_kv_heads * head_dim
        self.qkv = FusedLinear(embed_dim, (num_heads * head_dim, kv_dim, kv_dim), bias)
        self.out = nn.Linear(num_heads * head_dim, embed_dim, bias=bias if out_bias is None else out_bias)
        q_width, k_width = (num_heads * head_dim, kv_dim) if joint_norm else (head_dim, head_dim)
        self.q_norm = RMSNorm(q_width, norm_eps, norm_offset) if qk_norm else None
        self.k_norm = RMSNorm(k_width, norm_eps, norm_offset) if qk_norm else None
        self.joint_norm = joint_norm
        self._fusable = causal and not joint_norm and self.scale == head_dim**-0.5

    def forward(
        self,
        x: Tensor,
        context: Tensor | Pair | None = None,
        mask: Tensor | PackedDocuments | None = None,
        cache: LayerCache | None = None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """x (B, T, E), context (B, S, E) -> (B, T, E).

        `mask` broadcasts to (B, H, T, S): boolean (true: may attend) or added to the scores; without it every
        query sees every key. `rotary` rotates queries and keys. `cache` is extended by this call's keys and values.
        `context` may be the result of `project_context`, so that decoding projects a context once.
        """
        alone = self._fusable and should_fuse(x) and context is None and cache is None
        if alone and isinstance(mask, Tensor) and rotary is not None and rotary[0].shape[-1] == self.head_dim:
            return self._train_on_cpu(x, mask, rotary)
        if context is None:
            queries, keys, values = self._project(x, rotary)
            if cache is not None:
                keys, values = cache.extend(keys, values)
        else:
            queries = self._normed(self._heads(self.qkv.some(x, 0, 1)), self.q_norm).transpose(1, 2)
            keys, values = self.project_context(context) if isinstance(context, Tensor) else context
        if isinstance(mask, PackedDocuments):
            mixed = attend_within(queries, keys, values, mask, self.scale)
        else:
            mixed = attend(queries, keys, values, mask, self.scale, self.dropout if self.training else 0.0)
        added: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return added

    def project_context(self, context: Tensor) -> Pair:
        """Keys and values (B, K, S, D) of a context (B, S, E) to attend to."""
        keys, values = self._heads(self.qkv.some(context, 1, 3)).chunk(2, dim=2)
        return self._normed(keys, self.k_norm).transpose(1, 2), values.transpose(1, 2)

    def _train_on_cpu(self, x: Tensor, mask: Tensor, rotary: Rotary) -> Tensor:
        gains, eps = None, 0.0
        if self.q_norm is not None and self.k_norm is not None:
            gains, eps = (self.q_norm.gain, self.k_norm.gain), self.q_norm.eps or 0.0
        mixed = self_attention(self._heads(self.qkv(x)), gains, eps, rotary, additive(mask, x.dtype), self.num_heads)
        added: Tensor = self.out(mixed)
        return added

    def _project(self, x: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, D), keys and values (B, K, T, D), the former two normed and rotated."""
        heads = self._heads(self.qkv(x))  # (B, T, H + 2K, D)
        queries, keys, values = torch.split(heads, [self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=2)
        queries, keys = self._normed(queries, self.q_norm), self._normed(keys, self.k_norm)
        if rotary is not None:
            queries, keys = rotate(queries, rotary), rotate(keys, rotary)
        return queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)

    def _normed(self, heads: Tensor, norm: RMSNorm | None) -> Tensor:
        """Heads (..., n, D) behind a norm of each, or of all of them as one vector."""
        if norm is None:
            return heads
        normed: Tensor = norm(heads.flatten(-2)).view(heads.shape) if self.joint_norm else norm(heads)
        return normed

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.head_dim)


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, dropout: float = 0.0
) -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1): softmax(Q K^T * scale + mask) V.

    Queries (B, H, T, D), keys and values (B, K, S, D) -> (B, H, T, D).
    """
    batch, heads, length, head_dim = queries.shape
    kv_heads, span = keys.shape[1], keys.shape[2]
    if queries.is_cuda or length * span > SHORT:
        grouped = heads != kv_heads
        return F.scaled_dot_product_attention(queries, keys, values, mask, dropout, scale=scale, enable_gqa=grouped)
    grouped_queries = (queries * scale).reshape(batch, kv_heads, -1, head_dim)  # of one key head in a row
    scores = (grouped_queries @ keys.transpose(-1, -2)).view(batch, heads, length, span)
    if mask is not None:
        scores = scores + additive(mask, scores.dtype)
    weights = scores.softmax(-1)
    if dropout:
        weights = F.dropout(weights, dropout)
    mixed: Tensor = (weights.view(batch, kv_heads, -1, span) @ values).view(batch, heads, length, head_dim)
    return mixed


def attend_within(queries: Tensor, keys: Tensor, values: Tensor, documents: PackedDocuments, scale: float) -> Tensor:
    """`attend` causally within packed documents, by flash attention's variable-length kernel: no mask, no scores.

    (FlashAttention-2, arXiv 2307.08691.) For what `takes_packed` allows.
    """
    from torch.nn.attention.varlen import varlen_attn  # imports torch's compiler, which takes seconds

    bounds, longest, window = documents
    q, k, v = (each.transpose(1, 2).flatten(0, 1) for each in (queries, keys, values))  # (B * T, heads, D)
    span, grouped = (-1 if window is None else window - 1, 0), queries.shape[1] != keys.shape[1]
    mixed = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=span, enable_gqa=grouped)
    assert isinstance(mixed, Tensor)
    return mixed.view(queries.shape[0], -1, *mixed.shape[1:]).transpose(1, 2)


def takes_packed(x: Tensor, head_dim: int) -> bool:
    """Whether `attend_within` takes heads of x: in half precision on a GPU from Ampere on.

    On the meta device, where trainings are planned, half precision stands for such a GPU. Wider heads have no backward
    pass on each of these GPUs.
    """
    if x.dtype not in (torch.bfloat16, torch.float16) or head_dim % 8 or head_dim > 192:
        return False
    return x.is_meta or (x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 0))


def packed_documents(segment_ids: Tensor) -> PackedDocuments:
    """Those of rows (B, T): a run of equal ids in a row is a document, padding too. On the meta device: one a row."""
    batch, length = segment_ids.shape
    if segment_ids.is_meta:
        starts = torch.arange(0, batch * length, length, device=segment_ids.device)
    else:
        begins = torch.ones_like(segment_ids, dtype=torch.bool)
        begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
        starts = begins.flatten().nonzero().squeeze(1)  # waits for the device, as the targets of an objective do
    return PackedDocuments(F.pad(starts, (0, 1), value=batch * length).int(), length)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask (true: may attend) as numbers to add to scores; others stay as they are."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def causal_mask(length: int, span: int, device: torch.device) -> Tensor:
    """(T, S) true where query t, the last of which is key S - 1, may see key s."""
    return torch.ones(length, span, dtype=torch.bool, device=device).tril(span - length)


def padding_mask(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, S), true at tokens that are not padding, as numbers to add to scores: (B, 1, 1, S)."""
    return additive(attention_mask.bool()[:, None, None, :], dtype)


def segment_mask(segment_ids: Tensor) -> Tensor:
    """(B, T, T) true where two tokens of a packed row belong to one document."""
    return segment_ids.unsqueeze(2) == segment_ids.unsqueeze(1)
