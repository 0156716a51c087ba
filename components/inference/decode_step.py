"""One decode step for many rows: the forward pass for one token each.

The forward pass avoids module calls, which cost more than its kernels.

A row's result depends neither on the other rows nor on the number of positions attended beyond its own: torch's fused
attention is used where it processes a row's keys in order (`mixes_alone`).
Shapes: B rows, S positions attended, E embed_dim, H query heads, K key/value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from components.inference.slot_cache import flat, row_strides
from components.models.blocks import Block
from components.models.decoder import Decoder
from components.models.positions import Rotary, rotate, rotate_into

Ints = NDArray[np.int64]
CAPTURED = 64
"""Positions of the smallest CUDA graph; each larger graph has twice as many."""
MEASURED_ROWS, MEASURED_SPANS = 8, (16, 64, 272)
"""Rows, and positions attended, by which `mixes_alone` is measured."""


class Step:
    """Decode steps of a model with a cache of keys and values (layers, 2, slots, K, span, D), row b in slot b."""

    def __init__(self, model: Decoder, whole: Tensor, captured: bool = True) -> None:
        """`captured`: run CUDA graphs where the model is on a GPU; products must then be the same at every step."""
        c = model.config
        self._model, self._whole = model, whole
        self._flat = [flat(layer) for layer in whole]
        self._device = whole.device
        both, slot, head, self._position = row_strides(whole[0])
        keys = np.arange(whole.shape[2])[:, None] * slot + np.arange(c.num_kv_heads) * head
        self._starts = np.concatenate([keys, keys + both], axis=1)
        """(slots, 2K): the first vector of each head's keys, then values, of a slot within a layer."""
        blocks = (block for block in model.blocks if isinstance(block, Block))
        self._layers = [_Layer.of(block, whole.dtype, whole.device) for block in blocks]
        self._norm_gain = _norm_gain(model.norm.gain)
        self._floor = torch.tensor((c.norm_eps * c.embed_dim) ** 0.5, device=whole.device)
        self._lowest = torch.finfo(whole.dtype).min
        self.fixed = whole.is_cuda
        """Static shapes, as CUDA graphs need: one per number of rows, and attention to padding."""
        self.run: Callable[..., Tensor] = Captured(self.walk) if whole.is_cuda and captured else self.walk

    @torch.inference_mode()
    def __call__(self, tokens: Ints, positions: Ints, places: Ints, seen: int, real: int) -> Tensor:
        """The normed hidden states (B, E) of tokens (B) at positions (B), whose keys and values go to `places` (B).

        Rows after the first `real` ones are padding, which the matrix products need and attention does not.
        """
        if self.fixed:
            seen = min(graph_span(seen), self._whole.shape[4])
        slots = np.arange(len(tokens))
        slots[real:] = 0  # padding is written behind the context of the first slot
        vectors = self._starts[slots] + places[:, None] * self._position
        where = torch.from_numpy(vectors.ravel()).to(self._device)
        at = torch.from_numpy(positions).to(self._device)
        hidden = torch.arange(seen, device=self._device) > at[:, None]
        mask = torch.zeros(hidden.shape, dtype=self._whole.dtype, device=self._device)
        mask.masked_fill_(hidden, self._lowest)
        masks = [mask if self.fixed else mask[:real]]  # (real, S)
        if self._model.config.windowed_layers:
            keys = torch.arange(seen, device=self._device)
            masks.append(self._model.windowed(masks[0][:, None, None], at[: len(masks[0]), None, None], keys)[:, 0, 0])
        return self.run(torch.from_numpy(tokens).to(self._device), at, where, *masks)

    def walk(self, tokens: Tensor, at: Tensor, where: Tensor, *masks: Tensor) -> Tensor:
        """The forward pass: tokens and positions `at` (B), cache indices `where` (B * 2K), masks (real, S).

        The second mask is that of layers with a window.
        """
        model, floor = self._model, self._floor
        x = model.scaled(F.embedding(tokens, model.embed.weight))
        masks = tuple(mask[:, None, None] for mask in masks)  # (B, 1, 1, S)
        for number, (layer, (rotary, windowed)) in enumerate(zip(self._layers, model.layers(at), strict=True)):
            attended = self._attend(number, layer, _norm(x, layer.gain, floor), rotary, where, masks[windowed])
            x += _norm(layer.out(attended), layer.post_gain, floor)
            x += _norm(layer.mlp(_norm(x, layer.mlp_gain, floor)), layer.mlp_post_gain, floor)
        return _norm(x, self._norm_gain, floor)

    def _attend(
        self, number: int, layer: _Layer, x: Tensor, rotary: Rotary | None, where: Tensor, mask: Tensor
    ) -> Tensor:
        """Self-attention of x (B, E) to the cache, after writing its keys and values."""
        c = self._model.config
        turned = c.num_heads + c.num_kv_heads
        heads = layer.qkv(x).view(-1, turned + c.num_kv_heads, c.head_dim)
        both = layer.scaled(heads[:, :turned], c.num_heads, c.norm_eps)
        if rotary is None:
            heads = torch.cat([both, heads[:, turned:]], dim=1)
        elif self.fixed or rotary[0].shape[-1] < c.head_dim:
            heads = torch.cat([rotate(both, rotary), heads[:, turned:]], dim=1)
        else:
            rotate_into(heads[:, :turned], both, *rotary)
        self._flat[number].index_copy_(0, where, heads[:, c.num_heads :].reshape(-1, c.head_dim))
        real = mask.shape[0]
        keys, values = self._whole[number, :, :real, :, : mask.shape[-1]]  # (real, K, S, D) each
        shape = c.num_heads, c.num_kv_heads, c.head_dim
        mix = _mixed if self.fixed or mixes_alone(torch.get_num_threads(), *shape, keys.dtype) else _mixed_alone
        mixed = mix(heads[:real, : c.num_heads].unsqueeze(2), keys, values, mask)
        return F.pad(mixed, (0, 0, 0, x.shape[0] - real)) if real < x.shape[0] else mixed


@dataclass(frozen=True)
class _Layer:
    """A block as a step reads it; a gain is None where the block has no such norm."""

    qkv: nn.Module
    out: nn.Module
    mlp: nn.Module
    joint_norm: bool | None
    """Whether queries and keys are normed over all heads at once; None: they are not normed."""
    gain: Tensor | None
    post_gain: Tensor | None
    mlp_gain: Tensor | None
    mlp_post_gain: Tensor | None
    heads_gain: Tensor
    """Factors of queries and keys (H + K, D): the gains of their norms, and the scale of the attention scores."""

    @classmethod
    def of(cls, block: Block, dtype: torch.dtype, device: torch.device) -> _Layer:
        attention = block.attention
        norms = (block.attention_norm, block.attention_post_norm, block.mlp_norm, block.mlp_post_norm)
        before, behind, mlp_before, mlp_behind = (_norm_gain(norm.gain) if norm is not None else None for norm in norms)
        heads, kv_heads = attention.num_heads, attention.num_kv_heads
        heads_gain = torch.ones(heads + kv_heads, attention.head_dim, dtype=dtype, device=device)
        if attention.q_norm is not None and attention.k_norm is not None:
            # Of each head, or of all heads at once.
            heads_gain[:heads] = attention.q_norm.gain.detach().view(-1, attention.head_dim)
            heads_gain[heads:] = attention.k_norm.gain.detach().view(-1, attention.head_dim)
        heads_gain[:heads] *= attention.scale
        joint = attention.joint_norm if attention.q_norm is not None else None
        gains = before, behind, mlp_before, mlp_behind, heads_gain
        return cls(attention.qkv, attention.out, block.mlp, joint, *gains)

    def scaled(self, heads: Tensor, queries: int, eps: float) -> Tensor:
        """Queries and keys (B, H + K, D) normed and scaled."""
        if self.joint_norm is None:
            return heads * self.heads_gain
        if not self.joint_norm:
            return F.rms_norm(heads, heads.shape[-1:], None, eps) * self.heads_gain
        parts = (heads[:, :queries], heads[:, queries:])
        normed = [F.rms_norm(part.flatten(1), (part[0].numel(),), None, eps).view(part.shape) for part in parts]
        return torch.cat(normed, dim=1) * self.heads_gain


class Graph(Protocol):
    """A CUDA graph: reads and writes the tensors that it was captured with."""

    def replay(self) -> None: ...


Recording = tuple[Graph, tuple[Tensor, ...], Tensor]
"""A graph, its input tensors and its output."""


class Captured:
    """A function of tensors as CUDA graphs, one captured for each shape of its last argument.

    Launching the kernels of a small model one by one takes longer than running them. The next call overwrites the
    returned tensor.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self._pool: Any = None
        self._graphs: dict[tuple[int, ...], Recording] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        shape = tuple(inputs[-1].shape)
        if shape not in self._graphs:
            self._graphs[shape] = self.record(inputs)
        graph, buffers, output = self._graphs[shape]
        for buffer, tensor in zip(buffers, inputs, strict=True):
            buffer.copy_(tensor)
        graph.replay()
        return output

    def record(self, inputs: tuple[Tensor, ...]) -> Recording:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        buffers = tuple(tensor.clone() for tensor in inputs)
        # Warm-up: libraries select kernels and allocate memory in their first calls, which a graph must not capture.
        # Writing the same keys and values again changes nothing.
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.function(*buffers)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may load or warm another model meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = self.function(*buffers)
        return graph, buffers, output


def _mixed(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention (B, H * D) of queries (B, H, 1, D) to keys and values (B, K, S, D) with a mask (B, 1, 1, S)."""
    grouped = queries.shape[1] != keys.shape[1]
    return F.scaled_dot_product_attention(queries, keys, values, mask, scale=1.0, enable_gqa=grouped).flatten(1)


@cache
def mixes_alone(threads: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether `_mixed` gives a row the same bits beside few others and many, on so many threads as are set.

    Threads may divide a row's keys among them, by how many rows there are: above as many threads as heads, and on some
    processors already with two. Measured once for each shape.
    """
    if threads == 1:
        return True
    generator = torch.Generator().manual_seed(0)
    for span in MEASURED_SPANS:
        queries, keys, values = (
            torch.randn(MEASURED_ROWS, count, length, head_dim, generator=generator).to(dtype)
            for count, length in ((heads, 1), (kv_heads, span), (kv_heads, span))
        )
        mask = torch.zeros(MEASURED_ROWS, 1, 1, span, dtype=dtype)
        whole = _mixed(queries, keys, values, mask)
        for rows in range(1, MEASURED_ROWS):
            if not torch.equal(_mixed(queries[:rows], keys[:rows], values[:rows], mask[:rows]), whole[:rows]):
                return False
    return True


def _mixed_alone(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """`_mixed`, bit-identical for a row whatever the other rows, on several threads too."""
    heads, kv_heads = queries.shape[1], keys.shape[1]
    queries = queries.view(-1, kv_heads, heads // kv_heads, 1, queries.shape[-1])  # (B, K, H / K, 1, D)
    weights = (keys.unsqueeze(2) * queries).sum(-1).add_(mask).softmax(-1)  # (B, K, H / K, S)
    return (values.unsqueeze(2) * weights.unsqueeze(-1)).sum(-2).flatten(1)


def graph_span(seen: int) -> int:
    """Positions of the smallest graph for `seen`."""
    return max(CAPTURED, 1 << (seen - 1).bit_length())


def _norm_gain(gain: Tensor) -> Tensor:
    """A gain (E) in fp32 for vectors of length one instead of root mean square one."""
    return gain.detach().float().mul(gain.shape[-1] ** 0.5)


def _norm(x: Tensor, gain: Tensor | None, floor: Tensor) -> Tensor:
    """RMSNorm in four kernels: x / hypot(|x|, floor) * gain, with a `_norm_gain` and floor sqrt(eps * E)."""
    if gain is None:
        return x
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return (x / length.hypot_(floor)).mul_(gain).to(x.dtype)
