"""One decode step for many rows: the forward pass for one token each, constraint masks, and sampling.

The forward pass avoids module calls, which cost more than its kernels.

A row's result depends neither on the other rows nor on the number of positions attended beyond its own: on one thread
torch's fused attention processes a row's keys in order.
Shapes: B rows, S positions attended, E embed_dim, H query heads, K key/value heads, D head_dim.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from components.models.blocks import Block
from components.models.decoder import Decoder
from components.models.positions import Rotary, rotate, rotate_into

Ints = NDArray[np.int64]
CAPTURED = 64
"""Positions of the smallest CUDA graph; each larger graph has twice as many."""

Allowed = NDArray[np.bool_]
"""One entry per token of the vocabulary."""


@dataclass(frozen=True)
class Sampling:
    max_new_tokens: int
    temperature: float = 0.0
    """0: greedy."""
    top_p: float = 1.0
    """Nucleus sampling: the most probable tokens that together reach this probability."""
    seed: int | None = None
    """The same seed gives the same tokens; None: random."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end a row; the one that did is the row's last."""


class Step:
    """Decode steps of a model with a cache of keys and values (layers, 2, slots, K, span, D), row b in slot b."""

    def __init__(self, model: Decoder, whole: Tensor) -> None:
        c = model.config
        self._model, self._whole = model, whole
        self._flat = [layer.view(-1, c.head_dim) for layer in whole]
        self._device = whole.device
        slots, span = whole.shape[2], whole.shape[4]
        starts = np.arange(slots * c.num_kv_heads).reshape(slots, c.num_kv_heads) * span
        self._starts = np.concatenate([starts, starts + slots * c.num_kv_heads * span], axis=1)
        """(slots, 2K): offset of each head's keys, then values, of a slot within a layer."""
        self._blocks = [block for block in model.blocks if isinstance(block, Block)]
        self._gains = [self._gain(block) for block in self._blocks]
        self._lowest = torch.finfo(whole.dtype).min
        self.fixed = whole.is_cuda
        """Static shapes, as CUDA graphs need: one per number of rows, and attention to padding."""
        self.run: Callable[..., Tensor] = Captured(self.walk) if whole.is_cuda else self.walk

    def _gain(self, block: Block) -> Tensor:
        """Factors of queries and keys (H + K, D): the gains of their norms, and the scale of the attention scores."""
        c, attention = self._model.config, block.attention
        gain = torch.ones(c.num_heads + c.num_kv_heads, c.head_dim, dtype=self._whole.dtype, device=self._device)
        if attention.q_norm is not None and attention.k_norm is not None:
            gain[: c.num_heads], gain[c.num_heads :] = attention.q_norm.weight, attention.k_norm.weight
        gain[: c.num_heads] *= c.head_dim**-0.5
        return gain.detach()

    @torch.inference_mode()
    def __call__(self, tokens: Ints, positions: Ints, places: Ints, seen: int, real: int) -> Tensor:
        """The normed hidden states (B, E) of tokens (B) at positions (B), whose keys and values go to `places` (B).

        Rows after the first `real` ones are padding, which the matrix products need and attention does not.
        """
        if self.fixed:
            seen = min(graph_span(seen), self._whole.shape[4])
        where = torch.from_numpy((self._starts[: len(tokens)] + places[:, None]).ravel()).to(self._device)
        at = torch.from_numpy(positions).to(self._device)
        hidden = torch.arange(seen, device=self._device) > at[:, None]
        mask = torch.zeros(hidden.shape, dtype=self._whole.dtype, device=self._device)
        mask.masked_fill_(hidden, self._lowest)
        if not self.fixed:
            mask = mask[:real]
        return self.run(torch.from_numpy(tokens).to(self._device), at, where, mask)

    def walk(self, tokens: Tensor, at: Tensor, where: Tensor, mask: Tensor) -> Tensor:
        """The forward pass: tokens and positions `at` (B), cache indices `where` (B * 2K), mask (real, S)."""
        model, c = self._model, self._model.config
        x = F.embedding(tokens, model.embed.weight)
        rotary = model.positions.cos[at][:, None], model.positions.sin[at][:, None]  # (B, 1, D)
        mask = mask[:, None, None]  # (B, 1, 1, S)
        for number, block in enumerate(self._blocks):
            mixed = self._attend(number, block, _norm(x, block.attention_norm.weight, c.norm_eps), rotary, where, mask)
            x += block.attention.out(mixed)
            x += block.mlp(_norm(x, block.mlp_norm.weight, c.norm_eps))
        return _norm(x, model.norm.weight, c.norm_eps)

    def _attend(self, number: int, block: Block, x: Tensor, rotary: Rotary, where: Tensor, mask: Tensor) -> Tensor:
        """Self-attention of x (B, E) to the cache, after writing its keys and values."""
        c = self._model.config
        turned = c.num_heads + c.num_kv_heads
        heads = block.attention.qkv(x).view(-1, turned + c.num_kv_heads, c.head_dim)
        both = heads[:, :turned]
        gain = self._gains[number]
        both = _norm(both, gain, c.norm_eps) if block.attention.q_norm is not None else both * gain
        if self.fixed:
            heads = torch.cat([rotate(both, rotary), heads[:, turned:]], dim=1)
        else:
            rotate_into(heads[:, :turned], both, *rotary)
        self._flat[number].index_copy_(0, where, heads[:, c.num_heads :].reshape(-1, c.head_dim))
        real = mask.shape[0]
        keys, values = self._whole[number, :, :real, :, : mask.shape[-1]]  # (real, K, S, D) each
        # Several threads split a row's keys where there are few rows, which changes the order of summation.
        mix = _mixed if self.fixed or torch.get_num_threads() == 1 else _mixed_alone
        mixed = mix(heads[:real, : c.num_heads].unsqueeze(2), keys, values, mask)
        return F.pad(mixed, (0, 0, 0, x.shape[0] - real)) if real < x.shape[0] else mixed


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


def _mixed_alone(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """`_mixed`, bit-identical for a row whatever the other rows, on several threads too."""
    heads, kv_heads = queries.shape[1], keys.shape[1]
    queries = queries.view(-1, kv_heads, heads // kv_heads, 1, queries.shape[-1])  # (B, K, H / K, 1, D)
    weights = (keys.unsqueeze(2) * queries).sum(-1).add_(mask).softmax(-1)  # (B, K, H / K, S)
    return (values.unsqueeze(2) * weights.unsqueeze(-1)).sum(-2).flatten(1)


def graph_span(seen: int) -> int:
    """Positions of the smallest graph for `seen`."""
    return max(CAPTURED, 1 << (seen - 1).bit_length())


def _norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, gain.shape[-1:], None, eps) * gain


class Constraint(Protocol):
    """The constraint of one row.

    From the row's first token on, `allowed` gives the mask of the next token and `advance` takes the chosen one.
    """

    @property
    def finished(self) -> bool:
        """No token may follow: the row ends here, whether or not its last token is a stop token."""

    @property
    def fallback_tokens(self) -> tuple[list[int], list[int]] | None:
        """Forbidden tokens, and the allowed tokens that get their probability; None: none."""

    def allowed(self, left: int) -> Allowed | None:
        """Mask of the tokens that may come next, at least one; None: all.

        `left` is the number of tokens the row may still get, the next one included: near its limit a constraint ends
        the text where possible.
        """

    def advance(self, token_id: int) -> None:
        """Consume the chosen token, one of those allowed."""


def mask_logits(logits: Tensor, constraints: Sequence[Constraint | None], left: Sequence[int]) -> Tensor:
    """The logits (B, vocab_size) with minus infinity where a row's constraint forbids a token.

    Logits beyond a constraint's vocabulary (a padded embedding) are forbidden too. The probability of the forbidden
    tokens that a constraint names is given to its fallback tokens, in proportion to theirs. Without masks the logits
    are returned unchanged.
    """
    masks = {
        row: mask
        for row, constraint in enumerate(constraints)
        if constraint is not None and (mask := constraint.allowed(left[row])) is not None
    }
    if not masks:
        return logits
    forbidden = torch.ones(len(masks), logits.shape[1], dtype=torch.bool)
    for place, mask in enumerate(masks.values()):
        forbidden[place, : len(mask)] = torch.from_numpy(~mask)
    rows = torch.tensor(list(masks), device=logits.device)
    masked = logits[rows].masked_fill_(forbidden.to(logits.device), -torch.inf)
    for place, row in enumerate(masks):
        constraint = constraints[row]
        if constraint is not None and (fallback_tokens := constraint.fallback_tokens) is not None:
            replaced, fallback = fallback_tokens
            masked[place, fallback] += logits[row, replaced + fallback].logsumexp(0) - logits[row, fallback].logsumexp(
                0
            )
    return logits.index_put((rows,), masked)


def greedy(logits: Tensor) -> Tensor:
    """The id of each row's largest logit (B, V) -> (B)."""
    if logits.is_cuda:
        return logits.argmax(-1)
    return torch.from_numpy(logits.numpy().argmax(-1))  # twenty times as fast as torch's on a CPU


def sampled(logits: Tensor, temperature: Tensor | float, top_p: Tensor | float, numbers: Tensor) -> Tensor:
    """The sampled id of each row (B, V) -> (B), by its random number in [0, 1).

    temperature and top_p are scalars or (B, 1); numbers (B, 1). A row's id depends on that row alone.
    """
    probabilities = (logits / temperature).softmax(-1)
    ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    reached = ordered.cumsum(-1)
    # A token is kept while those before it have less than top_p; the most probable one always is.
    kept = ordered * (reached - ordered < top_p)
    sums = kept.cumsum(-1)
    place = torch.searchsorted(sums, numbers * sums[:, -1:], right=True).clamp_(max=sums.shape[1] - 1)
    tokens: Tensor = ids.gather(1, place).squeeze(1)
    return tokens


def random_stream(seed: int | None) -> np.random.Generator:
    """The random numbers of one row, from its seed; without a seed, different each time."""
    return np.random.default_rng([secrets.randbits(64) if seed is None else seed % 2**64, 0])
