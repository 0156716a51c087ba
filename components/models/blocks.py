"""The transformer block: attention and a feed-forward, each after a norm and added to the residual stream.

Shapes: B batch, T tokens, S tokens of the context, E embed_dim, N positions to compute.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from components.models.attention import Attention, FusedLinear, LayerCache, PackedDocuments, Pair
from components.models.fused import RMSNorm, swiglu
from components.models.positions import Rotary

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}
"""Under Hugging Face's names."""
Norms = Literal["pre", "post", "both"]


class GatedFeedForward(nn.Module):
    """Gated feed-forward (arXiv 2002.05202): down(activation(gate(x)) * up(x)); SwiGLU with silu, GeGLU with gelu."""

    def __init__(self, embed_dim: int, hidden_dim: int, activation: str = "silu", bias: bool = False) -> None:
        super().__init__()
        self.activation = None if activation == "silu" else ACTIVATIONS[activation]
        self.gate_up = FusedLinear(embed_dim, (hidden_dim, hidden_dim), bias)
        self.down = nn.Linear(hidden_dim, embed_dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up(x)
        if self.activation is None:
            inner = swiglu(gate_up)
        else:
            gate, up = gate_up.chunk(2, dim=-1)
            inner = self.activation(gate) * up
        added: Tensor = self.down(inner)
        return added


class FeedForward(nn.Module):
    """Position-wise feed-forward (Vaswani et al. 2017, eq. 2): FFN(x) = max(0, x W1 + b1) W2 + b2, for any activation.

    Gated (arXiv 2002.05202, eq. 6): (activation(x W) * x V) W2.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        activation: str,
        gated: bool = False,
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.activation, self.gated, self.dropout = ACTIVATIONS[activation], gated, dropout
        self.up = FusedLinear(embed_dim, (hidden_dim,) * (2 if gated else 1), bias)
        self.down = nn.Linear(hidden_dim, embed_dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.up(x)
        if self.gated:
            gate, up = inner.chunk(2, dim=-1)
            inner = self.activation(gate) * up
        else:
            inner = self.activation(inner)
        added: Tensor = self.down(dropout(inner, self.dropout, self.training))
        return added


class Block(nn.Module):
    """x + attention(norm(x)), where there is a context x + attention(norm(x), context), x + feed-forward(norm(x)).

    `norms` says where they are: before a part ("pre": Llama), behind it ("post": x + norm(attention(x)), OLMo 2), or
    "both" (Gemma 3).
    """

    def __init__(
        self,
        attention: Attention,
        mlp: nn.Module,
        embed_dim: int,
        norm_eps: float,
        cross_attention: Attention | None = None,
        dropout: float = 0.0,
        norms: Norms = "pre",
        norm_offset: bool = False,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        pre, post = norms != "post", norms != "pre"
        self.attention_norm = RMSNorm(embed_dim, norm_eps, norm_offset) if pre else None
        self.attention = attention
        self.attention_post_norm = RMSNorm(embed_dim, norm_eps, norm_offset) if post else None
        if cross_attention is not None:
            self.cross_attention_norm = RMSNorm(embed_dim, norm_eps)
            self.cross_attention = cross_attention
        self.mlp_norm = RMSNorm(embed_dim, norm_eps, norm_offset) if pre else None
        self.mlp = mlp
        self.mlp_post_norm = RMSNorm(embed_dim, norm_eps, norm_offset) if post else None

    def forward(
        self,
        x: Tensor,
        mask: Tensor | PackedDocuments | None = None,
        cache: LayerCache | None = None,
        rotary: Rotary | None = None,
        rows: Tensor | None = None,
        context: Tensor | Pair | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """x (B, T, E) -> (B, T, E); with `rows`, only these of the B * T positions after attention: (N, E)."""
        attended = self.attention(normed(x, self.attention_norm), mask=mask, cache=cache, rotary=rotary)
        if context is not None:
            x = x + dropout(attended, self.dropout, self.training)
            attended = self.cross_attention(self.cross_attention_norm(x), context=context, mask=context_mask)
        if rows is not None:
            x, attended = select_rows(x, rows), select_rows(attended, rows)
        x = x + dropout(normed(attended, self.attention_post_norm), self.dropout, self.training)
        added = normed(self.mlp(normed(x, self.mlp_norm)), self.mlp_post_norm)
        return x + dropout(added, self.dropout, self.training)


class PostNormBlock(nn.Module):
    """norm(x + attention(x)), then norm(x + feed-forward(x)): as in Vaswani et al. 2017, section 3.1, and BERT."""

    def __init__(
        self, attention: Attention, mlp: nn.Module, embed_dim: int, norm_eps: float, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.attention = attention
        self.attention_norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.mlp = mlp
        self.mlp_norm = nn.LayerNorm(embed_dim, eps=norm_eps)

    def forward(self, x: Tensor, mask: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """x (B, T, E) -> (B, T, E); with `rows`, only these of the B * T positions after attention: (N, E)."""
        attended = self.attention(x, mask=mask)
        if rows is not None:
            x, attended = select_rows(x, rows), select_rows(attended, rows)
        x = self.attention_norm(x + dropout(attended, self.dropout, self.training))
        out: Tensor = self.mlp_norm(x + dropout(self.mlp(x), self.dropout, self.training))
        return out


class PreNormBlock(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)), the norms LayerNorm: as in ModernBERT (arXiv 2412.13663).

    Without `first_norm` attention reads x itself: that of the first block, whose input is normed already.
    """

    def __init__(
        self,
        attention: Attention,
        mlp: nn.Module,
        embed_dim: int,
        norm_eps: float,
        norm_bias: bool,
        first_norm: bool = True,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.attention_norm = nn.LayerNorm(embed_dim, norm_eps, bias=norm_bias) if first_norm else None
        self.mlp = mlp
        self.mlp_norm = nn.LayerNorm(embed_dim, norm_eps, bias=norm_bias)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, rotary: Rotary | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """x (B, T, E) -> (B, T, E); with `rows`, only these of the B * T positions after attention: (N, E)."""
        attended = self.attention(normed(x, self.attention_norm), mask=mask, rotary=rotary)
        if rows is not None:
            x, attended = select_rows(x, rows), select_rows(attended, rows)
        x = x + dropout(attended, self.attention.dropout, self.training)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


def normed(x: Tensor, norm: nn.Module | None) -> Tensor:
    """x behind a norm, where there is one."""
    return norm(x) if norm is not None else x


def dropout(x: Tensor, share: float, training: bool) -> Tensor:
    """Dropout with probability `share` in training, else x."""
    return F.dropout(x, share) if share and training else x


def select_rows(x: Tensor, rows: Tensor) -> Tensor:
    """The positions `rows` (N,) of the B * T of x (B, T, E): (N, E)."""
    return x.flatten(0, 1).index_select(0, rows)
