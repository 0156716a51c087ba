"""Sight: SigLIP's vision tower (arXiv 2303.15343) and LLaVA's projector (arXiv 2304.08485) before a decoder.

A picture becomes one embedding a patch; they stand where the prompt has image tokens, and the decoder reads on as ever.

Shapes: P pictures, N patches of a picture, E embed_dim of the tower, D embed_dim of the decoder, B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from components.models.attention import Attention, KVCache
from components.models.blocks import ACTIVATIONS, FeedForward, PreNormBlock
from components.models.decoder import Decoder, DecoderConfig

MEAN, STD = 0.5, 0.5
"""Of the pixels, from 0 to 1, that a tower reads: SigLIP's."""


@dataclass(frozen=True)
class VisionConfig:
    """Shape of a vision tower; the names are those of `params.yaml: model.vision`."""

    image_size: int
    """Height and width in pixels that pictures are resized to."""
    patch_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    hidden_dim: int
    activation: str = "gelu_pytorch_tanh"
    norm_eps: float = 1e-6
    pooled: bool = True
    """Whether it has the attention pooling head that image-text pretraining reads."""
    source: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)
    """The vision_config it was read from."""

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class VisionLanguageConfig(DecoderConfig):
    """Shape of a decoder with sight."""

    vision: VisionConfig = field(kw_only=True)
    image_token_id: int = field(kw_only=True)
    """The token whose embeddings are replaced by a picture's, one for each patch."""
    feature_layer: int = -2
    """Which hidden state of the tower is read: 0 is the embedding, -1 the last block's."""
    projector_activation: str = "gelu"
    projector_bias: bool = True


class VisionTower(nn.Module):
    """Pixels in, a vector for each patch out."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        c = self.config = config
        self.patch_embed = nn.Conv2d(3, c.embed_dim, c.patch_size, stride=c.patch_size)
        self.position_embed = nn.Embedding(c.num_patches, c.embed_dim)
        self.blocks = nn.ModuleList(self._block() for _ in range(c.num_layers))
        self.final_norm = nn.LayerNorm(c.embed_dim, c.norm_eps)
        self.pooling = PoolingHead(c) if c.pooled else None
        self.init_weights()

    def _block(self) -> PreNormBlock:
        c = self.config
        mlp = FeedForward(c.embed_dim, c.hidden_dim, c.activation, bias=True)
        return PreNormBlock(_attention(c), mlp, c.embed_dim, c.norm_eps, norm_bias=True)

    def init_weights(self) -> None:
        """Draw weights from torch's random state, of a variance by fan-in and fan-out, as SigLIP does."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
                nn.init.zeros_(module.bias) if module.bias is not None else None
        nn.init.normal_(self.position_embed.weight, std=self.config.embed_dim**-0.5)
        if self.pooling is not None:
            nn.init.normal_(self.pooling.probe, std=0.02)

    def features(self, pixel_values: Tensor, layer: int = -1) -> Tensor:
        """The hidden state (P, N, E) behind a layer, unnormed; pixel_values (P, 3, image_size, image_size)."""
        x: Tensor = self.patch_embed(pixel_values).flatten(2).transpose(1, 2) + self.position_embed.weight
        for block in self.blocks[: self.depth(layer)]:
            x = block(x)
        return x

    def depth(self, layer: int) -> int:
        """Blocks before a hidden state."""
        return layer + len(self.blocks) + 1 if layer < 0 else layer

    def forward(self, pixel_values: Tensor) -> Tensor:
        """The normed vectors (P, N, E) of a picture's patches."""
        normed: Tensor = self.final_norm(self.features(pixel_values))
        return normed

    def pooled(self, pixel_values: Tensor) -> Tensor:
        """A vector (P, E) for each picture."""
        assert self.pooling is not None
        vector: Tensor = self.pooling(self(pixel_values))
        return vector

    @property
    def num_parameters(self) -> int:
        return sum(weight.numel() for weight in self.parameters())


class PoolingHead(nn.Module):
    """Multi-head attention pooling (arXiv 2106.04560): a learned query reads the patches."""

    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, c.embed_dim))
        self.attention = _attention(c)
        self.norm = nn.LayerNorm(c.embed_dim, c.norm_eps)
        self.mlp = FeedForward(c.embed_dim, c.hidden_dim, c.activation, bias=True)

    def forward(self, patches: Tensor) -> Tensor:
        """patches (P, N, E) -> (P, E)."""
        x: Tensor = self.attention(self.probe.expand(len(patches), -1, -1), context=patches)
        pooled: Tensor = (x + self.mlp(self.norm(x)))[:, 0]
        return pooled


class Projector(nn.Module):
    """Two products that turn the tower's vectors into embeddings of the decoder."""

    def __init__(self, vision_dim: int, embed_dim: int, activation: str, bias: bool) -> None:
        super().__init__()
        self.up = nn.Linear(vision_dim, embed_dim, bias)
        self.activation = ACTIVATIONS[activation]
        self.down = nn.Linear(embed_dim, embed_dim, bias)

    def init_weights(self) -> None:
        """Pictures begin as small as tokens: larger ones leave the blocks nothing to add to their stream."""
        nn.init.normal_(self.down.weight, std=0.02 * self.down.in_features**-0.5)

    def forward(self, patches: Tensor) -> Tensor:
        """(P, N, E) -> (P, N, D)."""
        embeddings: Tensor = self.down(self.activation(self.up(patches)))
        return embeddings


class VisionLanguageModel(Decoder):
    """A decoder that reads pictures: those of a batch stand, in order, at its image tokens."""

    sees_pictures = True
    config: VisionLanguageConfig

    def __init__(self, config: VisionLanguageConfig) -> None:
        super().__init__(config)
        self.vision = VisionTower(config.vision)
        c = config
        self.projector = Projector(c.vision.embed_dim, c.embed_dim, c.projector_activation, c.projector_bias)

    def train_vision(self, trained: bool) -> None:
        """Let the parts of the tower that are read learn or not; the projector learns."""
        self.vision.requires_grad_(False)
        self.vision.patch_embed.requires_grad_(trained)
        self.vision.position_embed.requires_grad_(trained)
        self.vision.blocks[: self.vision.depth(self.config.feature_layer)].requires_grad_(trained)
        self.projector.requires_grad_(True)

    def encode_pictures(self, pixel_values: Tensor) -> Tensor:
        """The embeddings (P, N, D) of pictures (P, 3, image_size, image_size), as the first block reads them."""
        embeddings: Tensor = self.projector(self.vision.features(pixel_values, self.config.feature_layer))
        return embeddings

    def hidden(
        self,
        input_ids: Tensor,
        segment_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        attention_mask: Tensor | None = None,
        rows: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
    ) -> Tensor:
        """As the decoder's; pixel_values (P, 3, image_size, image_size) of the pictures of all rows, in order."""
        if pixel_values is not None:
            inputs_embeds = self.embedded(input_ids, self.encode_pictures(pixel_values))
        return super().hidden(input_ids, segment_ids, position_ids, cache, attention_mask, rows, inputs_embeds)

    def forward(
        self,
        input_ids: Tensor,
        segment_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: KVCache | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, T, V) of the token after each; see `hidden` for the arguments."""
        stream = self.hidden(input_ids, segment_ids, position_ids, cache, attention_mask, pixel_values=pixel_values)
        logits: Tensor = self.head(stream)
        return logits

    def embedded(self, input_ids: Tensor, pictures: Tensor) -> Tensor:
        """Embeddings (B, T, D) of input_ids (B, T), those of `pictures` (.., D) in order at the image tokens."""
        x = self.scaled(self.embed(input_ids))
        places = (input_ids == self.config.image_token_id).unsqueeze(-1).expand_as(x)
        return x.masked_scatter(places, pictures.to(x.dtype))


def vision_language_from(
    decoder: Decoder, tower: VisionTower, image_token_id: int, vocab_size: int, feature_layer: int = -2
) -> VisionLanguageModel:
    """A decoder and a tower joined by a new projector; the embedding grows to `vocab_size` tokens.

    New weights are drawn from torch's random state; those of new tokens are the mean of the others.
    """
    values = {name: value for name, value in vars(decoder.config).items() if name != "vocab_size"}
    config = VisionLanguageConfig(
        vocab_size=max(vocab_size, decoder.config.vocab_size),
        vision=tower.config,
        image_token_id=image_token_id,
        feature_layer=feature_layer,
        **values,
    )
    model = VisionLanguageModel(config)
    model.projector.init_weights()
    weights = decoder.state_dict()
    for name in ("embed.weight", "head.weight"):
        old = weights[name]
        new = old.mean(0, keepdim=True).expand(config.vocab_size - len(old), -1)
        weights[name] = torch.cat([old, new])
    weights |= {f"vision.{name}": weight for name, weight in tower.state_dict().items()}
    missing = model.load_state_dict(weights, strict=False).missing_keys
    assert all(name.startswith("projector.") for name in missing)
    return model


def normalized(pixels: Tensor) -> Tensor:
    """Pixels (P, H, W, 3) of 0 to 255 as a tower reads them: (P, 3, H, W)."""
    return (pixels.permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


def _attention(c: VisionConfig) -> Attention:
    head_dim = c.embed_dim // c.num_heads
    return Attention(c.embed_dim, c.num_heads, c.num_heads, head_dim, bias=True, causal=False)
