"""Adapters of one served base: one batch computes the base's products once, and adds to each row what its adapter adds.

The adapters' own products are batched over adapters, with the rows of each side by side (as in Punica, arXiv
2310.18547). Shapes: K adapters, G rows of each, P parts of a product, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor, nn

from components.models.decoder import Decoder
from components.models.lora import LowRankLinear


@dataclass(frozen=True)
class Selection:
    """Which rows of a pass use which of the adapters in the places from `first` to before `stop`."""

    first: int
    stop: int
    gathered: Tensor | None = None
    """Rows (K, G) of each adapter, repeated as padding; None: all rows use the one adapter."""
    rows: Tensor | None = None
    """The rows that have an adapter, in the order of `positions`."""
    positions: Tensor | None = None
    """Where they are among the K * G gathered rows."""


class AdaptedLinear(nn.Module):
    """A product of the base, plus for each row the low-rank product of the adapter that the bank has selected."""

    def __init__(self, product: nn.Module, bank: AdapterBank) -> None:
        super().__init__()
        self.product, self._bank = product, bank
        self.in_features: int = product.in_features  # type: ignore[assignment]
        self._down: Tensor | None = None
        """A (places, P, R, in); None before the first adapter."""
        self._up: list[Tensor] = []
        """B (places, width, R) of each part, scaled."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, ..., in) to (B, ..., out)."""
        result: Tensor = self.product(x)
        chosen = self._bank.selection
        if chosen is None or self._down is None:
            return result
        down = self._down[chosen.first : chosen.stop].flatten(1, 2)
        inputs = x if chosen.gathered is None else x[chosen.gathered]
        inner = torch.bmm(inputs.reshape(len(down), -1, self.in_features), down.mT)  # (K, G * ..., P * R)
        halves = zip(torch.split(inner, self._down.shape[2], dim=-1), self._up, strict=True)
        parts = [torch.bmm(part, up[chosen.first : chosen.stop].mT) for part, up in halves]
        added = (torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]).view(-1, *result.shape[1:])
        if chosen.rows is None:
            return result.add_(added)
        return result.index_add_(0, chosen.rows, added[chosen.positions])

    def put(self, slot: int, pairs: Sequence[tuple[Tensor, Tensor]], scale: float, like: Tensor) -> None:
        """Store an adapter's pairs, A (R, in) and B (width, R), at a slot."""
        rank = len(pairs[0][0])
        if self._down is None or slot >= len(self._down) or rank > self._down.shape[2]:
            self._grow(slot + 1, rank, pairs, like)
        assert self._down is not None
        self._down[slot] = 0
        for part, (a, b) in enumerate(pairs):
            self._down[slot, part, :rank] = a
            self._up[part][slot] = 0
            self._up[part][slot, :, :rank] = b * scale

    def clear(self, slot: int) -> None:
        if self._down is not None and slot < len(self._down):
            self._down[slot] = 0

    def _grow(self, places: int, rank: int, pairs: Sequence[tuple[Tensor, Tensor]], like: Tensor) -> None:
        """Make room for more adapters or a larger rank; a pass in progress reads the same numbers before and after."""
        old, old_up = self._down, self._up
        if old is not None:
            places, rank = max(places, len(old)), max(rank, old.shape[2])
        down = like.new_zeros(places, len(pairs), rank, self.in_features)
        up = [like.new_zeros(places, len(b), rank) for _, b in pairs]
        if old is not None:
            for new, before in ((down, old), *zip(up, old_up, strict=True)):
                new[tuple(map(slice, before.shape))] = before
        self._up, self._down = up, down


class AdapterBank:
    """The adapters of a base, whose blocks' products it replaces; number 0 is the base alone."""

    def __init__(self, model: Decoder) -> None:
        model.__dict__["bank"] = self
        self._numbers = count(1)
        self._weight = model.embed.weight.detach()
        self._products: dict[str, AdaptedLinear] = {}
        self._places: dict[int, int] = {}
        """The place of each adapter in the products."""
        self.selection: Selection | None = None
        """For the next pass over the model; None: the base alone."""
        for owner_path, owner in list(model.blocks.named_modules()):
            for name, child in list(owner.named_children()):
                if hasattr(child, "in_features"):
                    product = AdaptedLinear(child, self)
                    setattr(owner, name, product)
                    self._products[f"{owner_path}.{name}"] = product

    @torch.no_grad()
    def add(self, adapted: Decoder) -> int:
        """Take over the pairs of a model with low-rank pairs; returns the adapter's number."""
        slot = next(slot for slot in count() if slot not in self._places.values())
        for path, module in adapted.blocks.named_modules():
            if isinstance(module, LowRankLinear):
                self._products[path].put(slot, list(module.pairs()), module.scale, self._weight)
        number = next(self._numbers)
        self._places[number] = slot
        return number

    @torch.no_grad()
    def remove(self, number: int) -> None:
        """Forget an adapter that no row uses any more."""
        slot = self._places.pop(number)
        for product in self._products.values():
            product.clear(slot)

    def select(self, adapters: Sequence[int], multiple: int = 1) -> None:
        """Choose the adapter of each row of the next pass; G is a multiple of `multiple`."""
        rows: dict[int, list[int]] = {}
        for row, number in enumerate(adapters):
            if number:
                rows.setdefault(self._places[number], []).append(row)
        if not rows:
            self.selection = None
            return
        first, stop = min(rows), max(rows) + 1
        if stop - first == 1 and len(rows[first]) == len(adapters):
            self.selection = Selection(first, stop)
            return
        group = -(-max(map(len, rows.values())) // multiple) * multiple
        gathered = torch.zeros(stop - first, group, dtype=torch.long)
        positions: list[int] = []
        for slot, members in rows.items():
            gathered[slot - first, : len(members)] = torch.tensor(members)
            positions += range((slot - first) * group, (slot - first) * group + len(members))
        members = [row for group_rows in rows.values() for row in group_rows]
        indices = gathered, torch.tensor(members), torch.tensor(positions)
        self.selection = Selection(first, stop, *(index.to(self._weight.device) for index in indices))


def bank_of(model: Decoder) -> AdapterBank | None:
    """The adapters among which the rows of a model choose; None of a model without."""
    bank: AdapterBank | None = model.__dict__.get("bank")
    return bank
