"""Decoder weights prepared for products of few rows: packed in fp32, or quantized to int8.

A plain product may repack its weight at each call, which for few rows of a large weight costs more than the product;
whether packing is faster depends on processor and size, so it is measured. Both kinds are bit-identical for a row
whatever the other rows: the packed one as measured (`batching.rows_are_independent` checks it), the quantized one
because integer sums are exact and each row has its own scale.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from components.config.params import InputError
from components.models.decoder import Decoder

TRIED_ROWS, TRIALS = (4, 32), 8
"""Batch sizes and repetitions of the measurement in `should_pack`."""
INT8_MAX = 127


class PackedLinear(nn.Module):
    """x (..., in) to (..., out) in fp32, with the weight in oneDNN's layout."""

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
        self._scale = weight.detach().abs().amax(1).clamp_(min=torch.finfo(weight.dtype).tiny) / INT8_MAX
        self._rounded = (weight.detach() / self._scale.unsqueeze(1)).round_().to(torch.int8)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        scale = rows.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(x.dtype).tiny).div_(INT8_MAX)
        sums = torch._int_mm((rows / scale).round_().to(torch.int8), self._rounded.t())
        return sums.to(x.dtype).mul_(scale).mul_(self._scale).view(*x.shape[:-1], -1)


def pack(model: Decoder) -> None:
    """Pack a model's weights where oneDNN is available; the model can no longer be trained or saved."""
    if _packable(model):
        _replace(model, PackedLinear)


def _packable(model: Decoder) -> bool:
    weight = model.embed.weight
    return not weight.is_cuda and weight.dtype == torch.float32 and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


@torch.inference_mode()
def should_pack(model: Decoder) -> bool:
    """Whether packed weights make the model's products faster, for few rows and many.

    All products are run in turn, so that weights are not in the processor's caches.
    """
    if not _packable(model):
        return False
    plain = [module for module in model.modules() if isinstance(module, nn.Linear)]
    packed = [PackedLinear(module.weight) for module in plain]
    return sum(_seconds(packed, rows) / _seconds(plain, rows) for rows in TRIED_ROWS) < len(TRIED_ROWS)


def _seconds(products: Sequence[nn.Linear] | Sequence[PackedLinear], rows: int) -> float:
    """The minimum of several rounds, which other load affects least."""
    inputs = [torch.ones(rows, product.in_features) for product in products]
    rounds = []
    for _ in range(TRIALS):
        started = time.perf_counter()
        for product, x in zip(products, inputs, strict=True):
            product(x)
        rounds.append(time.perf_counter() - started)
    return min(rounds)


def round_weights(model: Decoder) -> None:
    """Quantize the weights of every product but the head to int8; the model can no longer be trained or saved."""
    _replace(model.blocks, RoundedLinear)


@torch.inference_mode()
def round_checked(model: Decoder, sequences: Sequence[Sequence[int]], min_agreement: float) -> float:
    """`round_weights`, if the greedy token stays the same after nearly all prefixes of the sequences.

    Returns the share of prefixes that agree.

    Raises: InputError when it is below `min_agreement`; the model is quantized even then.
    """
    batches = [torch.tensor([list(sequence)]) for sequence in sequences]
    before = torch.cat([model(batch).argmax(-1).flatten() for batch in batches])
    round_weights(model)
    after = torch.cat([model(batch).argmax(-1).flatten() for batch in batches])
    agreement = (before == after).double().mean().item()
    if agreement < min_agreement:
        raise InputError(
            f"params.yaml: serve.int8: quantized, the model chooses the same token in {agreement:.1%} of {len(before)} "
            f"cases; at least {min_agreement:.0%} are needed; set serve.int8: false"
        )
    return agreement


def _replace(root: nn.Module, kind: type[PackedLinear] | type[RoundedLinear]) -> None:
    for parent in list(root.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child.bias is None:
                setattr(parent, name, kind(child.weight))
