"""Adapters of one served base: one batch computes the base's products once, and adds to each row what its adapter adds.

The adapters' own products are small; rows with the same adapter are computed together (as in Punica, arXiv 2310.18547).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from components.models.decoder import Decoder
from components.models.lora import LowRankLinear

Group = tuple[int, Tensor | None, int]
"""An adapter, its rows (None: all), and how many of them are not padding."""


class AdaptedLinear(nn.Module):
    """A product of the base, plus for each row the low-rank product of the adapter that the bank has selected."""

    def __init__(self, product: nn.Module, bank: AdapterBank) -> None:
        super().__init__()
        self.product, self._bank = product, bank
        self.in_features: int = product.in_features  # type: ignore[assignment]
        self.pairs: dict[int, tuple[Tensor, Tensor]] = {}
        """A (R, in) and B (out, R) of each adapter; B is scaled, and block-diagonal where parts have own pairs."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, ..., in) to (B, ..., out)."""
        result: Tensor = self.product(x)
        for adapter, rows, real in self._bank.groups:
            if adapter not in self.pairs:
                continue
            a, b = self.pairs[adapter]
            if rows is None:
                result += F.linear(F.linear(x, a), b)
            else:
                result.index_add_(0, rows[:real], F.linear(F.linear(x[rows], a), b)[:real])
        return result


class AdapterBank:
    """The adapters of a base, whose blocks' products it replaces; number 0 is the base alone."""

    def __init__(self, model: Decoder) -> None:
        self._numbers = count(1)
        self._weight = model.embed.weight
        self._products: dict[str, AdaptedLinear] = {}
        self.groups: list[Group] = []
        """For the next pass over the model."""
        for owner_path, owner in list(model.blocks.named_modules()):
            for name, child in list(owner.named_children()):
                if hasattr(child, "in_features"):
                    product = AdaptedLinear(child, self)
                    setattr(owner, name, product)
                    self._products[f"{owner_path}.{name}"] = product

    @torch.no_grad()
    def add(self, adapted: Decoder) -> int:
        """Take over the pairs of a model with low-rank pairs; returns the adapter's number."""
        number = next(self._numbers)
        for path, module in adapted.blocks.named_modules():
            if isinstance(module, LowRankLinear):
                pairs = list(module.pairs())
                down = torch.cat([a for a, _ in pairs])
                up = torch.block_diag(*(b for _, b in pairs)) * module.scale  # type: ignore[no-untyped-call]
                self._products[path].pairs[number] = (down.to(self._weight), up.to(self._weight))
        return number

    def remove(self, number: int) -> None:
        """Forget an adapter that no row uses any more."""
        for product in self._products.values():
            product.pairs.pop(number, None)

    def select(self, adapters: Sequence[int], multiple: int = 1) -> None:
        """Choose the adapter of each row of the next pass; groups are padded to a multiple of rows."""
        present = set(adapters)
        if len(present) == 1:
            self.groups = [(number, None, 0) for number in present if number]
            return
        self.groups = []
        for number in sorted(present - {0}):
            rows = [row for row, adapter in enumerate(adapters) if adapter == number]
            padded = rows + rows[-1:] * (-len(rows) % multiple)
            self.groups.append((number, torch.tensor(padded, device=self._weight.device), len(rows)))
