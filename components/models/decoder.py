"""The decoder: Llama's architecture, and what its relatives do otherwise (`decoder_formats.py` says which does what).

Shapes: B batch, T tokens, S tokens with those in the cache, E embed_dim, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from components.config.model_settings import DecoderModelConfig
from components.models.attention import (
    Attention,
    KVCache,
    PackedDocuments,
    additive,
    causal_mask,
    packed_documents,
    segment_mask,
    takes_packed,
)
from components.models.blocks import Block, GatedFeedForward, Norms
from components.models.fused import RMSNorm
from components.models.positions import RopeScaling, Rotary, RotaryPositions


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder; the names are those of `params.yaml: model`."""

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_dim: int
    max_seq_len: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    qk_norm: bool = False
    tie_embeddings: bool = False
    joint_norm: bool = False
    """Queries and keys are normed over all heads at once instead of head by head."""
    norms: Norms = "pre"
    norm_offset: bool = False
    """Norms' gains are 1 + weight."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"
    scale_embedding: bool = False
    """By sqrt(embed_dim)."""
    attention_scale: float | None = None
    """Of the scores; 1 / sqrt(head_dim) where None."""
    rotary_dim: int | None = None
    """Rotated dimensions of a head; all where None."""
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None
    """Of layers with a window, which then have no scaling; as the others where None."""
    window: int | None = None
    """Tokens that a query of a windowed layer sees, its own among them."""
    windowed_layers: tuple[bool, ...] = ()
    """Which layers have that window; none where empty."""
    unrotated_layers: tuple[bool, ...] = ()
    """Which layers have no positions (SmolLM3); none where empty."""
    architecture: str = field(default="", compare=False)
    """Hugging Face's name for it; Llama's or Qwen3's where empty."""
    source: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)
    """The config.json it was read from: fields that are not ours to change are written as they were."""

    @classmethod
    def from_params(cls, model: DecoderModelConfig, vocab_size: int) -> DecoderConfig:
        return cls(vocab_size=vocab_size, **model.model_dump())


class Decoder(nn.Module):
    """Token ids in, logits of the next token out."""

    sees_pictures = False

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.embed_dim)
        rotary_dim, length = config.rotary_dim or config.head_dim, config.max_seq_len
        self.positions = RotaryPositions(rotary_dim, length, config.rope_theta, config.rope_scaling)
        theta = config.local_rope_theta
        self.local_positions = RotaryPositions(rotary_dim, length, theta) if theta is not None else None
        self.blocks = nn.ModuleList(self._block() for _ in range(config.num_layers))
        self.norm = RMSNorm(config.embed_dim, config.norm_eps, config.norm_offset)
        self.head = nn.Linear(config.embed_dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.init_weights()

    def _block(self) -> Block:
        c = self.config
        attention = Attention(
            c.embed_dim,
            c.num_heads,
            c.num_kv_heads,
            c.head_dim,
            c.qk_norm,
            c.norm_eps,
            c.qkv_bias,
            c.attention_scale,
            out_bias=c.out_bias,
            joint_norm=c.joint_norm,
            norm_offset=c.norm_offset,
        )
        mlp = GatedFeedForward(c.embed_dim, c.hidden_dim, c.activation, c.mlp_bias)
        return Block(attention, mlp, c.embed_dim, c.norm_eps, norms=c.norms, norm_offset=c.norm_offset)

    def init_weights(self) -> None:
        """Draw weights from torch's random state; as in GPT-2, what adds to the stream starts smaller with depth."""
        for name, weight in self.named_parameters():
            if weight.dim() == 1:
                nn.init.constant_(weight, 0.0 if self.config.norm_offset or name.endswith("bias") else 1.0)
                continue
            adds = name.endswith(("attention.out.weight", "mlp.down.weight"))
            nn.init.normal_(weight, std=0.02 / (2 * self.config.num_layers) ** 0.5 if adds else 0.02)

    def forward(
        self,
        input_ids: Tensor,
        segment_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V) of the token after each; see `hidden` for the arguments."""
        logits: Tensor = self.head(self.hidden(input_ids, segment_ids, position_ids, cache, attention_mask))
        return logits

    def hidden(
        self,
        input_ids: Tensor,
        segment_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        attention_mask: Tensor | None = None,
        rows: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """The normed stream (B, T, E) that the head reads.

        input_ids (B, T). `segment_ids` (B, T): attention stays within equal ids (packed documents).
        `position_ids` (B, T): counted from the cache's length where not given.
        `attention_mask`: (B, S) true at tokens that are not padding, or a complete mask (B, T, S),
        boolean or added to the scores; the latter two replace the causal rule.
        `rows` (N): the B * T positions to compute; the result is (N, E), and the last block's
        feed-forward is skipped for the others.
        `inputs_embeds` (B, T, E): read in place of the embeddings of input_ids.
        """
        c, past = self.config, cache.length if cache is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        x = self.scaled(self.embed(input_ids)) if inputs_embeds is None else inputs_embeds
        masks: Sequence[Tensor | PackedDocuments]
        if cache is None and attention_mask is None and segment_ids is not None and takes_packed(x, c.head_dim):
            documents = packed_documents(segment_ids)
            masks = documents, documents._replace(window=c.window)
        else:
            masks = self._masks(x, position_ids, cache, segment_ids, attention_mask)
        last = len(self.blocks) - 1
        for index, (block, (rotary, windowed)) in enumerate(zip(self.blocks, self.layers(position_ids), strict=True)):
            layer = cache.layers[index] if cache is not None else None
            x = block(x, mask=masks[windowed], cache=layer, rotary=rotary, rows=rows if index == last else None)
        if cache is not None:
            cache.advance(input_ids.shape[1])
        normed: Tensor = self.norm(x)
        return normed

    def scaled(self, embedded: Tensor) -> Tensor:
        """Embeddings as the first block reads them."""
        if not self.config.scale_embedding:
            return embedded
        return embedded * torch.tensor(self.config.embed_dim**0.5, dtype=embedded.dtype)

    def layers(self, position_ids: Tensor) -> Iterator[tuple[Rotary | None, bool]]:
        """Of each layer: its rotary table at these positions, None where it has none, and whether it has a window."""
        c = self.config
        rotary = self.positions(position_ids)
        if not (c.windowed_layers or c.unrotated_layers):
            return repeat((rotary, False), c.num_layers)
        local = self.local_positions(position_ids) if self.local_positions is not None else rotary
        windowed = c.windowed_layers or (False,) * c.num_layers
        unrotated = c.unrotated_layers or (False,) * c.num_layers
        tables = (None if none else local if near else rotary for none, near in zip(unrotated, windowed, strict=True))
        return zip(tables, windowed, strict=True)

    def windowed(self, mask: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        """A mask (B, 1, T, S) that also hides keys at positions (.., S) beyond the window of queries (B, 1, T)."""
        assert self.config.window is not None
        hidden = queries.unsqueeze(-1) - keys.view(-1, 1, 1, keys.shape[-1]) >= self.config.window
        return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)

    def _masks(
        self,
        x: Tensor,
        position_ids: Tensor,
        cache: KVCache | None,
        segment_ids: Tensor | None,
        attention_mask: Tensor | None,
    ) -> list[Tensor]:
        """Dense masks (B, 1, T, S) to add to the scores: of layers without a window, and of those with one."""
        past = cache.length if cache is not None else 0
        visible = self._mask(x, past, segment_ids, attention_mask)
        masks = [additive(visible, x.dtype).unsqueeze(1)]
        if self.config.windowed_layers:
            # Keys in an engine's cache lie at their positions; elsewhere queries and keys are as far apart as in x.
            stored = cache is not None and attention_mask is not None and attention_mask.dim() == 3
            keys = torch.arange(visible.shape[-1], device=x.device)
            queries = position_ids if stored else torch.arange(past, past + x.shape[1], device=x.device).unsqueeze(0)
            if cache is None:
                keys = queries = position_ids
            masks.append(self.windowed(masks[0], queries.unsqueeze(1), keys))
        return masks

    def _mask(self, x: Tensor, past: int, segment_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        if attention_mask is not None and attention_mask.dim() == 3:
            return attention_mask
        length = x.shape[1]
        mask = causal_mask(length, past + length, x.device).unsqueeze(0)
        if segment_ids is not None:
            mask = mask & segment_mask(segment_ids)
        if attention_mask is not None:
            mask = mask & attention_mask.bool().unsqueeze(1)
        return mask

    def new_cache(self, batch: int, max_len: int) -> KVCache:
        """An empty cache that fits this model."""
        c, weight = self.config, self.embed.weight
        return KVCache(c.num_layers, batch, c.num_kv_heads, max_len, c.head_dim, weight.dtype, weight.device)

    @property
    def num_parameters(self) -> int:
        return sum(weight.numel() for weight in self.parameters())
