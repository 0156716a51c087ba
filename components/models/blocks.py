"""The transformer block: attention and a gated feed-forward, each behind a norm and added to the stream."""

from __future__ import annotations

from torch import Tensor, nn

from components.models.attention import Attention, FusedLinear, LayerCache
from components.models.fused import RMSNorm, swiglu
from components.models.positions import Rotary


class SwiGLU(nn.Module):
    """Gated feed-forward (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_up = FusedLinear(embed_dim, (hidden_dim, hidden_dim))
        self.down = nn.Linear(hidden_dim, embed_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.down(swiglu(self.gate_up(x)))
        return added


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, attention: Attention, embed_dim: int, hidden_dim: int, norm_eps: float) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(embed_dim, eps=norm_eps)
        self.attention = attention
        self.mlp_norm = RMSNorm(embed_dim, eps=norm_eps)
        self.mlp = SwiGLU(embed_dim, hidden_dim)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
        rotary: Rotary | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """x (B, T, E) -> (B, T, E); with `rows`, only these of the B * T positions go on behind attention: (N, E)."""
        attended = self.attention(self.attention_norm(x), mask=mask, cache=cache, rotary=rotary)
        if rows is not None:
            x, attended = (each.flatten(0, 1).index_select(0, rows) for each in (x, attended))
        x = x + attended
        added: Tensor = self.mlp(self.mlp_norm(x))
        return x + added
