"""Low-rank adaptation (LoRA, arXiv 2106.09685): frozen weights and a trained low-rank pair per product of a block.

h = W x + (alpha / rank) B A x (section 4.1), with B zero at first, so that training starts from the unchanged model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from components.models.attention import FusedLinear
from components.models.fused import low_rank_linear, should_fuse


class LowRankLinear(FusedLinear):
    """A frozen product with a low-rank pair for each of its parts."""

    def __init__(self, product: nn.Linear, rank: int, alpha: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = product.in_features, product.out_features
        self.fused = isinstance(product, FusedLinear)
        self.parts = product.parts if isinstance(product, FusedLinear) else (product.out_features,)
        self.weight, self.bias = product.weight, product.bias
        self.rank, self.scale = rank, alpha / rank
        like = product.weight
        self.lora_a = nn.Parameter(like.new_empty(len(self.parts) * rank, self.in_features))
        self.lora_b = nn.Parameter(like.new_zeros(self.out_features, rank))
        nn.init.normal_(self.lora_a, std=self.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        if not should_fuse(x):
            return super().forward(x) + self._added(x, 0, len(self.parts))
        joined = cast(Callable[..., Tensor], torch.block_diag)(*torch.split(self.lora_b, list(self.parts)))
        return low_rank_linear(x, self.weight, self.bias, self.lora_a, joined, self.scale)

    def some(self, x: Tensor, first: int, stop: int) -> Tensor:
        return super().some(x, first, stop) + self._added(x, first, stop)

    def _added(self, x: Tensor, first: int, stop: int) -> Tensor:
        inner = F.linear(x, self.lora_a[first * self.rank : stop * self.rank]) * self.scale
        outs = torch.split(self.lora_b, list(self.parts))[first:stop]
        pieces = torch.split(inner, self.rank, dim=-1)
        return torch.cat([F.linear(piece, out) for piece, out in zip(pieces, outs, strict=True)], dim=-1)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain product that computes the same."""
        pairs = zip(torch.split(self.lora_b, list(self.parts)), torch.split(self.lora_a, self.rank), strict=True)
        weight = self.weight + torch.cat([b @ a for b, a in pairs]) * self.scale
        has_bias = self.bias is not None
        plain = (
            FusedLinear(self.in_features, self.parts, has_bias)
            if self.fused
            else nn.Linear(self.in_features, self.out_features, has_bias)
        )
        plain.weight, plain.bias = nn.Parameter(weight), self.bias
        return plain


def add_lora(model: nn.Module, rank: int, alpha: float, also: tuple[str, ...] = ()) -> None:
    """Freeze `model` and put a pair of rank `rank` beside every product of its blocks, attention's and feed-forward's.

    `also` names modules that are trained fully, such as a new head.
    """
    model.requires_grad_(False)
    for owner, name, product in list(_products(model)):
        setattr(owner, name, LowRankLinear(product, rank, alpha))
    for name in also:
        model.get_submodule(name).requires_grad_(True)


def merge_lora(model: nn.Module) -> None:
    """Merge the pairs into plain products, and unfreeze every weight."""
    for owner, name, product in list(_products(model)):
        if isinstance(product, LowRankLinear):
            setattr(owner, name, product.merged())
    model.requires_grad_(True)


def _products(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Each product of the blocks, with its owner and its name there."""
    for block in cast(Iterable[nn.Module], model.blocks):
        for owner in block.modules():
            for name, child in owner.named_children():
                if isinstance(child, nn.Linear):
                    yield owner, name, child
