"""A decoder's weights laid out for products of few rows, as steps of a batch make them: in full, or rounded to int8.

A plain product may lay its weight out anew at each call, which for few rows of a large weight costs more than the
product; whether the packed one is faster depends on processor and size, so it is tried. Both kinds
give a row the same bits whatever other rows there are: the packed one as measured (`slots.rows_are_independent` looks
again), the rounded one because sums of integers are exact and each row is rounded by its own scale.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from components.config.params import InputError
from components.models.decoder import Decoder

TRIED_ROWS, TRIALS = (4, 32), 8
"""Of the trial whether packing pays."""
LARGEST = 127
"""Of the integers that weights and activations are rounded to."""


class PackedLinear(nn.Module):
    """x (..., in) to (..., out) in fp32 with oneDNN's own layout of the weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.in_features = weight.shape[1]
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, None, "none", [], "")
        return product


class RoundedLinear(nn.Module):
    """x (..., in) to (..., out) in int8: a scale for each output of the weight and for each row of x."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.in_features = weight.shape[1]
        self._scale = weight.detach().abs().amax(1).clamp_(min=torch.finfo(weight.dtype).tiny) / LARGEST
        self._rounded = (weight.detach() / self._scale.unsqueeze(1)).round_().to(torch.int8)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        scale = rows.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(x.dtype).tiny).div_(LARGEST)
        sums = torch._int_mm((rows / scale).round_().to(torch.int8), self._rounded.t())
        return sums.to(x.dtype).mul_(scale).mul_(self._scale).view(*x.shape[:-1], -1)


def pack(model: Decoder) -> None:
    """Lay the weights of a model out for serving, where oneDNN is there for it; it cannot be trained or saved then."""
    if _packable(model):
        _replace(model, PackedLinear)


def _packable(model: Decoder) -> bool:
    weight = model.embed.weight
    return not weight.is_cuda and weight.dtype == torch.float32 and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


@torch.inference_mode()
def should_pack(model: Decoder) -> bool:
    """Whether the model's products, few rows and many, take less time with packed weights.

    All of them in turn: a weight that is still in the processor's caches would say nothing of steps.
    """
    if not _packable(model):
        return False
    plain = [module for module in model.modules() if isinstance(module, nn.Linear)]
    packed = [PackedLinear(module.weight) for module in plain]
    return sum(_seconds(packed, rows) / _seconds(plain, rows) for rows in TRIED_ROWS) < len(TRIED_ROWS)


def _seconds(products: Sequence[nn.Linear] | Sequence[PackedLinear], rows: int) -> float:
    """The shortest of some rounds: what else the machine does makes none of them shorter."""
    given = [torch.ones(rows, product.in_features) for product in products]
    found = []
    for _ in range(TRIALS):
        began = time.perf_counter()
        for product, x in zip(products, given, strict=True):
            product(x)
        found.append(time.perf_counter() - began)
    return min(found)


def round_weights(model: Decoder) -> None:
    """Round the weights of every product but the head to int8; the model can no longer be trained or saved."""
    _replace(model.blocks, RoundedLinear)


@torch.inference_mode()
def round_checked(model: Decoder, sequences: Sequence[Sequence[int]], min_agreement: float) -> float:
    """`round_weights`, if behind all beginnings of the sequences the model still takes the same token nearly always.

    Returns the share of the same ones.

    Raises: InputError when it is less than `min_agreement`; the model is then as unfit as it was found to be.
    """
    batches = [torch.tensor([list(sequence)]) for sequence in sequences]
    before = torch.cat([model(batch).argmax(-1).flatten() for batch in batches])
    round_weights(model)
    after = torch.cat([model(batch).argmax(-1).flatten() for batch in batches])
    agreement = (before == after).double().mean().item()
    if agreement < min_agreement:
        raise InputError(
            f"params.yaml: serve.int8: rounded, the model takes the same token in {agreement:.1%} of {len(before)} "
            f"cases; at least {min_agreement:.0%} are needed; set serve.int8: false"
        )
    return agreement


def _replace(root: nn.Module, kind: type[PackedLinear] | type[RoundedLinear]) -> None:
    for parent in list(root.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child.bias is None:
                setattr(parent, name, kind(child.weight))
