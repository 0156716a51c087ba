"""The encoder: BERT's architecture (arXiv 1810.04805), with the heads that it is pretrained with or classifies with.

Shapes: B batch, T tokens, E embed_dim, V vocab_size, L labels, N positions to compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from components.config.model_settings import EncoderModelConfig
from components.models.attention import Attention, padding_mask
from components.models.blocks import ACTIVATIONS, FeedForward, PostNormBlock, dropout


@dataclass(frozen=True)
class EncoderConfig:
    """Shape of an encoder; the names are those of `params.yaml: model.encoder`."""

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    hidden_dim: int
    max_seq_len: int
    num_segments: int = 2
    """Kinds of segment that token_type_ids may name."""
    dropout: float = 0.0
    """Share of the numbers added to the stream that training leaves out."""
    attention_dropout: float = 0.0
    """Share of attention's weights that training leaves out."""
    head_dropout: float | None = None
    """Share of the pooled vector that training drops before the classification head; None: as `dropout`."""
    activation: str = "gelu"
    norm_eps: float = 1e-12
    labels: tuple[str, ...] = ()
    """A classifier's labels, in the order of its logits."""

    @classmethod
    def from_params(cls, model: EncoderModelConfig, vocab_size: int) -> EncoderConfig:
        return cls(vocab_size=vocab_size, **model.model_dump())


class Encoder(nn.Module):
    """Token ids in, a vector for each token and one for the whole text out."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.embed_dim)
        self.position_embed = nn.Embedding(config.max_seq_len, config.embed_dim)
        self.segment_embed = nn.Embedding(config.num_segments, config.embed_dim)
        self.embed_norm = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.blocks = nn.ModuleList(self._block() for _ in range(config.num_layers))
        self.pooler = nn.Linear(config.embed_dim, config.embed_dim)
        self._add_heads()
        self.init_weights()

    def _block(self) -> PostNormBlock:
        c = self.config
        head_dim = c.embed_dim // c.num_heads
        attention = Attention(c.embed_dim, c.num_heads, c.num_heads, head_dim, bias=True, dropout=c.attention_dropout)
        mlp = FeedForward(c.embed_dim, c.hidden_dim, c.activation, bias=True)
        return PostNormBlock(attention, mlp, c.embed_dim, c.norm_eps, c.dropout)

    def _add_heads(self) -> None:
        """Add the heads; none here."""

    def init_weights(self) -> None:
        """Draw weights from torch's random state, as BERT does."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def hidden(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """A vector (B, T, E) for each token of input_ids (B, T).

        `token_type_ids` (B, T): the segment of each, the first one where not given. `attention_mask` (B, T): true at
        tokens that are not padding. `rows` (N): the B * T positions to compute; the result is (N, E).
        """
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        segments = token_type_ids if token_type_ids is not None else torch.zeros_like(input_ids)
        x: Tensor = self.embed(input_ids) + self.segment_embed(segments) + self.position_embed(positions)
        x = dropout(self.embed_norm(x), self.config.dropout, self.training)
        mask = padding_mask(attention_mask, x.dtype) if attention_mask is not None else None
        last = len(self.blocks) - 1
        for index, block in enumerate(self.blocks):
            x = block(x, mask=mask, rows=rows if index == last else None)
        return x

    def pooled(self, hidden: Tensor) -> Tensor:
        """One vector (B, E) of a text from those of its tokens (B, T, E), or from its first token's (B, E)."""
        first = hidden[:, 0] if hidden.dim() == 3 else hidden
        pooled: Tensor = self.pooler(first).tanh()
        return pooled

    @property
    def num_parameters(self) -> int:
        return sum(weight.numel() for weight in self.parameters())


class EncoderForPretraining(Encoder):
    """An encoder that predicts masked tokens, and whether the second segment follows the first."""

    def _add_heads(self) -> None:
        c = self.config
        self.transform = nn.Linear(c.embed_dim, c.embed_dim)
        self.transform_norm = nn.LayerNorm(c.embed_dim, eps=c.norm_eps)
        self.head = nn.Linear(c.embed_dim, c.vocab_size)
        self.head.weight = self.embed.weight
        self.next_sentence = nn.Linear(c.embed_dim, 2)

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits of each token (B, T, V), and of the second segment following (0) or not (1) the first (B, 2)."""
        hidden = self.hidden(input_ids, token_type_ids, attention_mask)
        return self.head(self.transformed(hidden)), self.next_sentence(self.pooled(hidden))

    def transformed(self, hidden: Tensor) -> Tensor:
        """The head's input from hidden (..., E): logits are head(transformed(hidden))."""
        normed: Tensor = self.transform_norm(ACTIVATIONS[self.config.activation](self.transform(hidden)))
        return normed


class Classifier(Encoder):
    """An encoder that predicts the label of a text."""

    def _add_heads(self) -> None:
        self.head = nn.Linear(self.config.embed_dim, len(self.config.labels))

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        return self.logits(input_ids, token_type_ids, attention_mask)

    def logits(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Logits (B, L) in the order of `config.labels`; for the arguments see `hidden`."""
        batch, length = input_ids.shape
        firsts = torch.arange(0, batch * length, length, device=input_ids.device)
        pooled = self.pooled(self.hidden(input_ids, token_type_ids, attention_mask, rows=firsts))
        share = self.config.dropout if self.config.head_dropout is None else self.config.head_dropout
        logits: Tensor = self.head(dropout(pooled, share, self.training))
        return logits


def classifier_from(encoder: Encoder, labels: Sequence[str], dropout: float | None = None) -> Classifier:
    """A classifier with an encoder's weights, and a head drawn from torch's random state.

    `dropout` replaces that of the encoder where given.
    """
    config = replace(encoder.config, labels=tuple(labels), head_dropout=None)
    if dropout is not None:
        config = replace(config, dropout=dropout, attention_dropout=dropout)
    classifier = Classifier(config)
    known = {name: weight for name, weight in encoder.state_dict().items() if not name.startswith("head.")}
    missing = classifier.load_state_dict(known, strict=False).missing_keys
    assert missing == ["head.weight", "head.bias"]
    return classifier
