"""The encoder: BERT's architecture (arXiv 1810.04805), and what its relatives do otherwise (`encoder_formats.py` says
which does what), with the heads that it is pretrained with or classifies with.

Shapes: B batch, T tokens, E embed_dim, V vocab_size, L labels, N positions to compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from components.config.model_settings import EncoderModelConfig
from components.models.attention import Attention, additive, padding_mask
from components.models.blocks import ACTIVATIONS, FeedForward, PostNormBlock, PreNormBlock, dropout, normed
from components.models.positions import RotaryPositions

Poolers = Literal["always", "base and classifier", "classifier"]
POOLER_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, **ACTIVATIONS}


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
    """Kinds of segment that token_type_ids may name; 0: segments have no embedding."""
    dropout: float = 0.0
    """Share of the numbers added to the stream that training leaves out; pre-norm: of the feed-forward's inside."""
    attention_dropout: float = 0.0
    """Share of attention's weights that training leaves out; pre-norm: of what attention adds too."""
    head_dropout: float | None = None
    """Share of the pooled vector that training drops before the classification head; None: as `dropout`."""
    activation: str = "gelu"
    norm_eps: float = 1e-12
    labels: tuple[str, ...] = ()
    """A classifier's labels, in the order of its logits."""
    embed_dropout: float | None = None
    """Share of the embeddings that training leaves out; None: as `dropout`."""
    pad_id: int | None = None
    """Padding that positions do not count: they begin at `pad_id` + 1 (RoBERTa); None: all are counted from 0."""
    pooler: Poolers = "always"
    """Which models have a pooler: all (BERT), all but that with a masked-token head (RoBERTa), the classifier alone."""
    pooler_activation: str = "tanh"
    pooler_dropout: bool = False
    """Whether training drops `head_dropout` of the input of the classifier's pooler too (RoBERTa)."""
    pooled_tokens: Literal["cls", "mean"] = "cls"
    """What a classifier's pooler reads: the first token's vector, or the mean over tokens that are not padding."""
    transform_activation: str | None = None
    """Of the masked-token head; None: as `activation`."""
    pre_norm: bool = False
    """ModernBERT: norms before each part and behind the last block, gated feed-forward, rotary positions, and a norm in
    the pooler."""
    qkv_bias: bool = True
    """Of attention's products, the output's among them."""
    mlp_bias: bool = True
    norm_bias: bool = True
    transform_bias: bool = True
    """Of the first product of the masked-token head; pre-norm: of the pooler, which is the same."""
    head_bias: bool = True
    """Of the logits of masked tokens."""
    rope_theta: float = 10_000.0
    local_rope_theta: float = 10_000.0
    """Of layers with a window."""
    window: int = 0
    """Distance in tokens up to which queries of windowed layers see keys on both sides."""
    windowed_layers: tuple[bool, ...] = ()
    """Which layers have that window; none where empty."""
    architecture: str = field(default="Bert", compare=False)
    """Beginning of Hugging Face's names for the models."""
    source: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)
    """The config.json it was read from: fields that are not ours to change are written as they were."""

    @classmethod
    def from_params(cls, model: EncoderModelConfig, vocab_size: int) -> EncoderConfig:
        return cls(vocab_size=vocab_size, **model.model_dump())

    @property
    def num_positions(self) -> int:
        """Rows of the table of learned positions."""
        return self.max_seq_len + (self.pad_id + 1 if self.pad_id is not None else 0)


class Encoder(nn.Module):
    """Token ids in, a vector for each token and one for the whole text out."""

    pooler_without: tuple[Poolers, ...] = ("classifier",)
    """Values of `config.pooler` for which this model has none."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        c = self.config = config
        self.embed = nn.Embedding(c.vocab_size, c.embed_dim)
        self.position_embed = None if c.pre_norm else nn.Embedding(c.num_positions, c.embed_dim)
        self.segment_embed = nn.Embedding(c.num_segments, c.embed_dim) if c.num_segments else None
        self.embed_norm = nn.LayerNorm(c.embed_dim, eps=c.norm_eps, bias=c.norm_bias)
        head_dim = c.embed_dim // c.num_heads
        self.positions = RotaryPositions(head_dim, c.max_seq_len, c.rope_theta) if c.pre_norm else None
        self.local_positions = RotaryPositions(head_dim, c.max_seq_len, c.local_rope_theta) if c.pre_norm else None
        self.blocks = nn.ModuleList(self._block(index) for index in range(c.num_layers))
        self.final_norm = nn.LayerNorm(c.embed_dim, c.norm_eps, bias=c.norm_bias) if c.pre_norm else None
        pooled = c.pooler not in self.pooler_without
        bias = c.transform_bias or not c.pre_norm
        self.pooler = nn.Linear(c.embed_dim, c.embed_dim, bias=bias) if pooled else None
        self.pooler_norm = nn.LayerNorm(c.embed_dim, c.norm_eps, bias=c.norm_bias) if pooled and c.pre_norm else None
        self._add_heads()
        self.init_weights()

    def _block(self, index: int) -> nn.Module:
        c = self.config
        attention = Attention(
            c.embed_dim,
            c.num_heads,
            c.num_heads,
            c.embed_dim // c.num_heads,
            bias=c.qkv_bias,
            dropout=c.attention_dropout,
            causal=False,
        )
        if c.pre_norm:
            gated = FeedForward(c.embed_dim, c.hidden_dim, c.activation, True, c.mlp_bias, c.dropout)
            return PreNormBlock(attention, gated, c.embed_dim, c.norm_eps, c.norm_bias, first_norm=index > 0)
        mlp = FeedForward(c.embed_dim, c.hidden_dim, c.activation, bias=c.mlp_bias)
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
        c = self.config
        x = self.embed_norm(self._embedded(input_ids, token_type_ids))
        x = dropout(x, c.dropout if c.embed_dropout is None else c.embed_dropout, self.training)
        mask = padding_mask(attention_mask, x.dtype) if attention_mask is not None else None
        layers = self._layers(input_ids, mask, x.dtype)
        last = len(self.blocks) - 1
        for index, (block, more) in enumerate(zip(self.blocks, layers, strict=True)):
            x = block(x, rows=rows if index == last else None, **more)
        return normed(x, self.final_norm)

    def _embedded(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        x: Tensor = self.embed(input_ids)
        if self.segment_embed is not None:
            x = x + self.segment_embed(token_type_ids if token_type_ids is not None else torch.zeros_like(input_ids))
        if self.position_embed is None:
            return x
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        if (pad := self.config.pad_id) is not None:
            real = input_ids != pad
            positions = real.cumsum(1) * real + pad
        embedded: Tensor = x + self.position_embed(positions)
        return embedded

    def _layers(self, input_ids: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
        """Of each layer: its mask (B or 1, 1, 1 or T, T), and its rotary table where it has one."""
        c = self.config
        if self.positions is None or self.local_positions is None:
            yield from ({"mask": mask} for _ in self.blocks)
            return
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        tables = self.positions(positions.unsqueeze(0)), self.local_positions(positions.unsqueeze(0))
        near = additive((positions - positions.unsqueeze(1)).abs() <= c.window, dtype)[None, None]
        masks = mask, near if mask is None else torch.minimum(mask, near)
        for windowed in c.windowed_layers or (False,) * c.num_layers:
            yield {"mask": masks[windowed], "rotary": tables[windowed]}

    def pooled(self, hidden: Tensor) -> Tensor:
        """One vector (B, E) of a text from those of its tokens (B, T, E), or from what is pooled of them (B, E).

        The first token's own where the model has no pooler.
        """
        pooled = hidden[:, 0] if hidden.dim() == 3 else hidden
        if self.pooler is not None:
            pooled = POOLER_ACTIVATIONS[self.config.pooler_activation](self.pooler(pooled))
        return normed(pooled, self.pooler_norm)

    @property
    def num_parameters(self) -> int:
        return sum(weight.numel() for weight in self.parameters())


class EncoderForPretraining(Encoder):
    """An encoder that predicts masked tokens, and in BERT whether the second segment follows the first."""

    pooler_without = ("base and classifier", "classifier")

    def _add_heads(self) -> None:
        c = self.config
        self.transform = nn.Linear(c.embed_dim, c.embed_dim, bias=c.transform_bias)
        self.transform_norm = nn.LayerNorm(c.embed_dim, eps=c.norm_eps, bias=c.norm_bias)
        self.head = nn.Linear(c.embed_dim, c.vocab_size, bias=c.head_bias)
        self.head.weight = self.embed.weight
        self.next_sentence = nn.Linear(c.embed_dim, 2) if self.pooler is not None else None

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of each token (B, T, V), and of the second segment following (0) or not (1) the first (B, 2).

        The latter are None where the architecture has no such head.
        """
        hidden = self.hidden(input_ids, token_type_ids, attention_mask)
        follows = self.next_sentence(self.pooled(hidden)) if self.next_sentence is not None else None
        return self.head(self.transformed(hidden)), follows

    def transformed(self, hidden: Tensor) -> Tensor:
        """The head's input from hidden (..., E): logits are head(transformed(hidden))."""
        activation = ACTIVATIONS[self.config.transform_activation or self.config.activation]
        transformed: Tensor = self.transform_norm(activation(self.transform(hidden)))
        return transformed


class Classifier(Encoder):
    """An encoder that predicts the label of a text."""

    pooler_without = ()

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
        c = self.config
        share = c.dropout if c.head_dropout is None else c.head_dropout
        text = self._text(input_ids, token_type_ids, attention_mask)
        pooled = self.pooled(dropout(text, share, self.training) if c.pooler_dropout else text)
        logits: Tensor = self.head(dropout(pooled, share, self.training))
        return logits

    def _text(self, input_ids: Tensor, token_type_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
        """What the pooler reads of each text: (B, E)."""
        batch, length = input_ids.shape
        if self.config.pooled_tokens == "mean":
            hidden = self.hidden(input_ids, token_type_ids, attention_mask)
            real = (attention_mask if attention_mask is not None else torch.ones_like(input_ids)).unsqueeze(-1)
            return (hidden * real).sum(1) / real.sum(1)
        firsts = torch.arange(0, batch * length, length, device=input_ids.device)
        return self.hidden(input_ids, token_type_ids, attention_mask, rows=firsts)


def classifier_from(encoder: Encoder, labels: Sequence[str], dropout: float | None = None) -> Classifier:
    """A classifier with an encoder's weights, and what the encoder lacks drawn from torch's random state.

    `dropout` replaces that of the encoder where given.
    """
    config = replace(encoder.config, labels=tuple(labels), head_dropout=None)
    if dropout is not None:
        config = replace(config, dropout=dropout, attention_dropout=dropout, embed_dropout=None)
    classifier = Classifier(config)
    known = {name: weight for name, weight in encoder.state_dict().items() if not name.startswith("head.")}
    if config.pre_norm and isinstance(encoder, EncoderForPretraining):  # ModernBERT's pooler is the head's first part
        known = {name.replace("transform", "pooler"): weight for name, weight in known.items()}
    missing = classifier.load_state_dict(known, strict=False).missing_keys
    assert set(missing) >= {"head.weight", "head.bias"}
    assert all(name.startswith(("head.", "pooler")) for name in missing)
    return classifier
