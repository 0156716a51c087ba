"""The encoder-decoder: T5's architecture (arXiv 1910.10683).

Shapes: B batch, S source tokens, T target tokens, E embed_dim, V vocab_size, N positions to compute.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from components.config.model_settings import EncoderDecoderModelConfig
from components.models.attention import Attention, KVCache, Pair, additive, causal_mask, padding_mask
from components.models.blocks import Block, FeedForward, dropout
from components.models.fused import RMSNorm
from components.models.positions import RelativeBias


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """Shape of an encoder-decoder; the names are those of `params.yaml: model.encoder_decoder`."""

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_decoder_layers: int
    num_heads: int
    head_dim: int
    hidden_dim: int
    max_seq_len: int
    dropout: float = 0.0
    """Share of what blocks add, and of attention's weights, that training leaves out."""
    tie_embeddings: bool = True
    scale_outputs: bool = True
    """Whether the stream is multiplied by 1 / sqrt(E) before the head, as in the first T5 and not in version 1.1."""
    activation: str = "gelu_new"
    gated: bool = True
    num_buckets: int = 32
    """Buckets of distances that have a bias of their own."""
    max_distance: int = 128
    """Distance in tokens from which all share a bucket."""
    norm_eps: float = 1e-6
    start_id: int = 0
    """First token of the decoder's input: the padding token."""
    architecture: str = field(default="T5ForConditionalGeneration", compare=False)
    """Hugging Face's name for it."""
    source: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)
    """The config.json it was read from: fields that are not ours to change are written as they were."""

    @classmethod
    def from_params(cls, model: EncoderDecoderModelConfig, vocab_size: int, start_id: int = 0) -> EncoderDecoderConfig:
        """Version 1.1's feed-forward; as there, untied embeddings are not scaled."""
        values = model.model_dump()
        return cls(vocab_size=vocab_size, start_id=start_id, scale_outputs=model.tie_embeddings, **values)


class EncoderDecoderCache(KVCache):
    """Keys and values of a batch of targets, and those of their contexts, projected once."""

    contexts: list[Pair] | None = None
    """Keys and values of the context for each layer; None before the first step."""

    def keep(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order; a row may be repeated."""
        super().keep(rows)
        if self.contexts is not None:
            self.contexts = [(keys[rows], values[rows]) for keys, values in self.contexts]


class EncoderDecoder(nn.Module):
    """Source in, logits of each next token of its target out."""

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        c = self.config = config
        self.embed = nn.Embedding(c.vocab_size, c.embed_dim)
        self.encoder_bias = RelativeBias(c.num_buckets, c.max_distance, c.num_heads, bidirectional=True)
        self.encoder_blocks = nn.ModuleList(self._block(False) for _ in range(c.num_layers))
        self.encoder_norm = RMSNorm(c.embed_dim, eps=c.norm_eps)
        self.decoder_bias = RelativeBias(c.num_buckets, c.max_distance, c.num_heads, bidirectional=False)
        self.decoder_blocks = nn.ModuleList(self._block(True) for _ in range(c.num_decoder_layers))
        self.decoder_norm = RMSNorm(c.embed_dim, eps=c.norm_eps)
        self.head = Head(c.embed_dim, c.vocab_size, c.embed_dim**-0.5 if c.scale_outputs else 1.0)
        if c.tie_embeddings:
            self.head.weight = self.embed.weight
        self.init_weights()

    def _block(self, crosses: bool) -> Block:
        c = self.config
        mlp = FeedForward(c.embed_dim, c.hidden_dim, c.activation, c.gated, dropout=c.dropout)
        cross = self._attention() if crosses else None
        return Block(self._attention(), mlp, c.embed_dim, c.norm_eps, cross, c.dropout)

    def _attention(self) -> Attention:
        c = self.config
        return Attention(c.embed_dim, c.num_heads, c.num_heads, c.head_dim, scale=1.0, dropout=c.dropout)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw weights from torch's random state as T5 does: by each product's width, for its scores are not scaled."""
        c = self.config
        for name, weight in self.named_parameters():
            if weight.dim() == 1:
                nn.init.ones_(weight)
            elif name == "embed.weight":
                # Of unit size where the head scales it down again.
                nn.init.normal_(weight, std=1.0)
            elif name.endswith("qkv.weight"):
                nn.init.normal_(weight, std=c.embed_dim**-0.5)
                weight[: c.num_heads * c.head_dim].mul_(c.head_dim**-0.5)
            else:
                nn.init.normal_(weight, std=(c.embed_dim if "bias" in name else weight.shape[1]) ** -0.5)

    @property
    def blocks(self) -> list[nn.Module]:
        """The encoder's blocks, then the decoder's."""
        return [*self.encoder_blocks, *self.decoder_blocks]

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of the token after each of decoder_input_ids (B, T), having read input_ids (B, S)."""
        context = self.encode(input_ids, attention_mask)
        logits: Tensor = self.head(self.decode(decoder_input_ids, context, attention_mask))
        return logits

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The context (B, S, E) of input_ids (B, S); `attention_mask` (B, S) is true at tokens that are not padding."""
        length = input_ids.shape[1]
        x = dropout(self.embed(input_ids), self.config.dropout, self.training)
        mask = self.encoder_bias(length, length)
        if attention_mask is not None:
            mask = mask + padding_mask(attention_mask, x.dtype)
        for block in self.encoder_blocks:
            x = block(x, mask=mask)
        return dropout(self.encoder_norm(x), self.config.dropout, self.training)

    def decode(
        self,
        decoder_input_ids: Tensor,
        context: Tensor,
        context_mask: Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """The normed stream (B, T, E) that the head reads.

        decoder_input_ids (B, T): the target so far after `config.start_id`; with a cache, its new tokens.
        context (B, S, E), with its `context_mask` (B, S), true at tokens that are not padding.
        `rows` (N): the B * T positions to compute; the result is (N, E).
        """
        length, past = decoder_input_ids.shape[1], cache.length if cache is not None else 0
        x = dropout(self.embed(decoder_input_ids), self.config.dropout, self.training)
        causal = additive(causal_mask(length, past + length, x.device), x.dtype)
        mask = self.decoder_bias(length, past + length) + causal
        outside = padding_mask(context_mask, x.dtype) if context_mask is not None else None
        projected = self._project_context(context, cache) if cache is not None else None
        last = len(self.decoder_blocks) - 1
        for index, block in enumerate(self.decoder_blocks):
            x = block(
                x,
                mask=mask,
                cache=cache.layers[index] if cache is not None else None,
                rows=rows if index == last else None,
                context=projected[index] if projected is not None else context,
                context_mask=outside,
            )
        if cache is not None:
            cache.advance(length)
        return dropout(self.decoder_norm(x), self.config.dropout, self.training)

    def _project_context(self, context: Tensor, cache: EncoderDecoderCache) -> list[Pair]:
        if cache.contexts is None:
            attentions = (block.get_submodule("cross_attention") for block in self.decoder_blocks)
            cache.contexts = [each.project_context(context) for each in attentions if isinstance(each, Attention)]
        return cache.contexts

    def new_cache(self, batch: int, max_len: int) -> EncoderDecoderCache:
        """An empty cache for targets of at most `max_len` tokens."""
        c, weight = self.config, self.embed.weight
        return EncoderDecoderCache(
            c.num_decoder_layers, batch, c.num_heads, max_len, c.head_dim, weight.dtype, weight.device
        )

    @property
    def num_parameters(self) -> int:
        return sum(weight.numel() for weight in self.parameters())


class Head(nn.Linear):
    """The stream times `scale` (T5 shrinks it before a head that is the embedding), then times each token's vector."""

    def __init__(self, embed_dim: int, vocab_size: int, scale: float) -> None:
        super().__init__(embed_dim, vocab_size, bias=False)
        self.scale = scale

    def forward(self, stream: Tensor) -> Tensor:
        return super().forward(stream * self.scale)
