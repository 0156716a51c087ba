"""The decoder: Llama's architecture, and Qwen3's where queries and keys are normed.

Shapes: B batch, T tokens, S tokens with those in the cache, E embed_dim, V vocab_size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from components.config.model_settings import DecoderModelConfig
from components.models.attention import Attention, KVCache, additive, causal_mask, segment_mask
from components.models.blocks import Block, SwiGLU
from components.models.fused import RMSNorm
from components.models.positions import RotaryPositions


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

    @classmethod
    def from_params(cls, model: DecoderModelConfig, vocab_size: int) -> DecoderConfig:
        return cls(vocab_size=vocab_size, **model.model_dump())


class Decoder(nn.Module):
    """Token ids in, logits of the next token out."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.embed_dim)
        self.positions = RotaryPositions(config.head_dim, config.max_seq_len, config.rope_theta)
        self.blocks = nn.ModuleList(self._block() for _ in range(config.num_layers))
        self.norm = RMSNorm(config.embed_dim, eps=config.norm_eps)
        self.head = nn.Linear(config.embed_dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.init_weights()

    def _block(self) -> Block:
        c = self.config
        attention = Attention(c.embed_dim, c.num_heads, c.num_kv_heads, c.head_dim, c.qk_norm, c.norm_eps)
        return Block(attention, SwiGLU(c.embed_dim, c.hidden_dim), c.embed_dim, c.norm_eps)

    def init_weights(self) -> None:
        """Draw weights from torch's random state; as in GPT-2, what adds to the stream starts smaller with depth."""
        for name, weight in self.named_parameters():
            if weight.dim() == 1:
                nn.init.ones_(weight)
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
    ) -> Tensor:
        """The normed stream (B, T, E) that the head reads.

        input_ids (B, T). `segment_ids` (B, T): attention stays within equal ids (packed documents).
        `position_ids` (B, T): counted from the cache's length where not given.
        `attention_mask`: (B, S) true at tokens that are not padding, or a complete mask (B, T, S),
        boolean or added to the scores; the latter two replace the causal rule.
        `rows` (N): the B * T positions to compute; the result is (N, E), and the last block's
        feed-forward is skipped for the others.
        """
        past = cache.length if cache is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + input_ids.shape[1], device=input_ids.device).unsqueeze(0)
        x = self.embed(input_ids)
        rotary = self.positions(position_ids)
        mask = additive(self._mask(input_ids, past, segment_ids, attention_mask), x.dtype).unsqueeze(1)  # (B, 1, T, S)
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            layer = cache.layers[index] if cache is not None else None
            x = block(x, mask=mask, cache=layer, rotary=rotary, rows=rows if index == last else None)
        if cache is not None:
            cache.advance(input_ids.shape[1])
        normed: Tensor = self.norm(x)
        return normed

    def _mask(self, input_ids: Tensor, past: int, segment_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        if attention_mask is not None and attention_mask.dim() == 3:
            return attention_mask
        length = input_ids.shape[1]
        mask = causal_mask(length, past + length, input_ids.device).unsqueeze(0)
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
