"""Decoder weights prepared for serving on a CPU: packed in fp32, bf16 or fp16, or quantized to int8.

A plain product may repack its weight at each call, which for few rows of a large weight costs more than the product;
whether packing is faster depends on processor and size, so it is measured. Both kinds are bit-identical for a row
whatever the other rows: the packed one as measured (`rows_are_independent` checks it), the quantized one
because integer sums are exact and each row has its own scale.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from components.config.params import InputError
from components.inference.adapter_bank import AdaptedLinear
from components.inference.cache_plan import EVEN_ROWS
from components.models.blocks import Block, GatedFeedForward
from components.models.decoder import Decoder

TRIED_ROWS, TRIALS = (4, 32), 8
"""Batch sizes and repetitions of the measurement in `should_pack`."""
INT8_MAX, INT8_ZERO = 127, 128
FINE_BITS, FINE_STEPS = 7, 128
"""What numbers of 15 bits have beyond 8."""
FINE_ZERO = INT8_ZERO * FINE_STEPS + FINE_STEPS // 2
SMALLEST = torch.finfo(torch.float32).tiny
DECODE_SIZES = tuple(range(EVEN_ROWS, 65, EVEN_ROWS))
PROMPT_SIZES = tuple(range(64, 513, 64))
"""Rows of the products whose bits are compared: each number that occurs, as any may have a kernel of its own."""
_LIMITS: dict[tuple[tuple[int, int], torch.dtype, tuple[int, ...], int], int] = {}
"""Rows of the largest parts, by the weight's shape, dtype, sizes and number of threads."""


class Agreement(NamedTuple):
    """The share of cases in which two models choose the same token, and how many cases there are."""

    share: float
    cases: int


class PackedLinear(nn.Module):
    """x (..., in) to (..., out), with the weight in the layout of a library; the rest stays in x's dtype.

    In fp32 and bf16 (`dtype`) the product is oneDNN's. In fp16 it is FBGEMM's, of inputs in fp32: the weights alone are
    rounded, and a row has the same bits beside any number of others.

    In bf16 the number of rows selects a kernel, and the kernels differ in the last bits. So the products of decode
    steps, x (rows, in), are computed in parts of up to as many rows as were measured to give equal bits; those of
    prompts, x (B, T, in), too, padded to a multiple of `PROMPT_SIZES[0]` rows.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = dtype or weight.dtype
        self._packed: Any
        if self.dtype == torch.float16:
            bias = bias.detach().float() if bias is not None else None
            self._packed = torch.ops.quantized.linear_prepack_fp16(weight.detach().float().contiguous(), bias)
        else:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(self.dtype).contiguous(), None)
            self._bias = bias.detach().to(self.dtype) if bias is not None else None

    def forward(self, x: Tensor) -> Tensor:
        if self.dtype == torch.float16:
            product: Tensor = torch.ops.quantized.linear_dynamic_fp16(x.float(), self._packed)
            return product.to(x.dtype)
        if self.dtype != torch.bfloat16:
            return self._product(x)
        rows = x.to(self.dtype).reshape(-1, self.in_features)
        if x.dim() == 2:
            return self._in_parts(rows, DECODE_SIZES).to(x.dtype)
        padding = -len(rows) % PROMPT_SIZES[0]
        whole = self._in_parts(F.pad(rows, (0, 0, 0, padding)) if padding else rows, PROMPT_SIZES)
        return whole[: len(rows)].view(*x.shape[:-1], -1).to(x.dtype)

    def _in_parts(self, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
        if len(x) <= sizes[0]:
            return self._product(x)
        kind = (self.out_features, self.in_features), x.dtype, sizes, torch.get_num_threads()
        if (limit := _LIMITS.get(kind)) is None:
            limit = _LIMITS[kind] = self._limit(sizes, x.dtype)
        if len(x) <= limit:
            return self._product(x)
        return torch.cat([self._product(part) for part in torch.split(x, limit)])

    def _product(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return product

    @torch.inference_mode()
    def _limit(self, sizes: Sequence[int], dtype: torch.dtype) -> int:
        """The largest of these sizes up to which each gives the rows of a product the bits that the first does."""
        weight, x = _cancelling((self.out_features, self.in_features), sizes[-1], dtype)
        product = PackedLinear(weight)._product
        reference, limit = torch.cat([product(part) for part in torch.split(x, sizes[0])]), 0
        for size in sizes:
            parts = [part for part in torch.split(x, size) if len(part) == size]
            if not torch.equal(torch.cat([product(part) for part in parts]), reference[: len(parts) * size]):
                break
            limit = size
        return limit or sizes[0]


class RoundedLinear(nn.Module):
    """x (..., in) to (..., out) in int8: a scale for each output of the weight and for each row of x.

    Where it is `fine`, x has 15 bits, as two rows of 8 that are multiplied side by side: the weights are read once.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.in_features, self.fine = weight.shape[1], False
        self._bias = bias.detach() if bias is not None else None
        self._scale = (weight.detach().float().abs().amax(1) / INT8_MAX).clamp_(min=SMALLEST)
        rounded = (weight.detach() / self._scale.unsqueeze(1)).round_().to(torch.int8)
        self._is_packed = packs_int8()
        self._rounded = torch.ops.onednn.qlinear_prepack(rounded, None) if self._is_packed else rounded.t()
        self._zeros, self._ones = torch.zeros(len(weight), dtype=torch.long), torch.ones(len(weight))
        self._offset, self._fine_offset = torch.tensor(INT8_ZERO + 0.5), torch.tensor(FINE_ZERO + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).float()
        largest = torch.linalg.vector_norm(rows, float("inf"), dim=1, keepdim=True).clamp_(min=SMALLEST)
        # The conversion to whole numbers cuts off what is behind the point, hence the half in the offsets.
        if self.fine:
            steps = INT8_MAX * FINE_STEPS
            whole = torch.addcdiv(self._fine_offset, rows, largest, value=steps).to(torch.int16)
            parts = torch.cat([whole >> FINE_BITS, (whole & FINE_STEPS - 1) + FINE_STEPS // 2]).to(torch.uint8)
            high, low = self._sums(parts, 1 / steps).chunk(2)
            sums = torch.add(low, high, alpha=FINE_STEPS)
        else:
            sums = self._sums(torch.addcdiv(self._offset, rows, largest, value=INT8_MAX).to(torch.uint8), 1 / INT8_MAX)
        product = sums.mul_(largest).view(*x.shape[:-1], -1).to(x.dtype)
        return product if self._bias is None else product.add_(self._bias)

    def _sums(self, rows: Tensor, scale: float) -> Tensor:
        """The products of rows (N, in) uint8, of which INT8_ZERO is zero, with the weights."""
        if self._is_packed:
            # Whole numbers: oneDNN's kernels, which it chooses by the number of rows, apply scales in different orders.
            sums = _int8_sums(rows, self._rounded, self._ones, self._zeros)
        else:
            sums = torch._int_mm((rows ^ INT8_ZERO).view(torch.int8), self._rounded).float()
        return sums.mul_(self._scale * scale)


def _int8_sums(rows: Tensor, packed: Tensor, ones: Tensor, zeros: Tensor) -> Tensor:
    """By oneDNN, which multiplies unsigned rows faster than signed ones."""
    kinds = ones, zeros, None, 1.0, 0, torch.float32
    sums: Tensor = torch.ops.onednn.qlinear_pointwise(rows, 1.0, INT8_ZERO, packed, *kinds, "none", [], "")
    return sums


@cache
def packs_int8() -> bool:
    """Whether oneDNN's int8 products are exact here: without VNNI, pairs of products saturate."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    rows = torch.full((EVEN_ROWS, 64), INT8_ZERO + INT8_MAX, dtype=torch.uint8)
    packed = torch.ops.onednn.qlinear_prepack(torch.full((16, 64), INT8_MAX, dtype=torch.int8), None)
    sums = _int8_sums(rows, packed, torch.ones(16), torch.zeros(16, dtype=torch.long))
    return bool((sums == 64 * INT8_MAX**2).all())


def packs_fp16() -> bool:
    """Whether FBGEMM is here, for weights in fp16."""
    return torch.backends.quantized.engine in ("x86", "fbgemm")


def pack(model: Decoder, dtype: torch.dtype | None = None) -> None:
    """Pack a model's weights where oneDNN is available; the model can no longer be trained or saved.

    `dtype` of the products; the stream, the norms, attention and the cache keep the model's own.
    """
    if _packable(model):
        _replace(model, partial(PackedLinear, dtype=dtype))


def _packable(model: Decoder) -> bool:
    return not model.embed.weight.is_cuda and bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


@torch.inference_mode()
def should_pack(model: Decoder) -> bool:
    """Whether packed weights make the model's products faster, for few rows and many.

    All products are run in turn, so that weights are not in the processor's caches.
    """
    if not _packable(model):
        return False
    plain = [*(module for module in model.blocks.modules() if isinstance(module, nn.Linear)), model.head]
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
def agreement(model: Decoder, sequences: Sequence[Sequence[int]], change: Callable[[Decoder], None]) -> Agreement:
    """Change a model, and compare the greedy tokens behind all prefixes of the sequences with those before."""
    before = _greedy_tokens(model, sequences)
    change(model)
    return Agreement((before == _greedy_tokens(model, sequences)).double().mean().item(), len(before))


@torch.inference_mode()
def _greedy_tokens(model: Decoder, sequences: Sequence[Sequence[int]]) -> Tensor:
    return torch.cat([model(torch.tensor([list(sequence)])).argmax(-1).flatten() for sequence in sequences])


def round_checked(model: Decoder, sequences: Sequence[Sequence[int]], min_agreement: float) -> float:
    """`round_weights`, if the greedy token stays the same after nearly all prefixes of the sequences.

    Inputs have 8 bits, or 15 where those change too much. Returns the share of prefixes that agree.

    Raises: InputError when it is below `min_agreement`; the model is quantized even then.
    """
    before = _greedy_tokens(model, sequences)
    round_weights(model)
    share, cases = 0.0, len(before)
    for fine in (False, True):
        for product in model.modules():
            if isinstance(product, RoundedLinear):
                product.fine = fine
        share = (before == _greedy_tokens(model, sequences)).double().mean().item()
        if share >= min_agreement:
            break
    else:
        raise InputError(
            f"params.yaml: serve.int8: quantized, the model chooses the same token in {share:.1%} of {cases} cases; at "
            f"least {min_agreement:.0%} are needed; set serve.int8: false"
        )
    return share


def _replace(root: nn.Module, kind: Callable[[Tensor, Tensor | None], nn.Module]) -> None:
    for path, parent in list(root.named_modules()):
        if path.partition(".")[0] in ("vision", "projector"):  # read a whole picture at a time
            continue
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, kind(child.weight, child.bias))


def rows_are_independent(model: Decoder, multiple: int = EVEN_ROWS) -> bool:
    """Whether products of a multiple of so many rows with this model's weights give a row the same bits in each.

    Measured on a CPU; on CUDA they are not, as the number of rows selects the kernel.
    """
    if model.embed.weight.is_cuda:
        return False
    block = model.blocks[0]
    assert isinstance(block, Block)
    mlp = block.mlp
    assert isinstance(mlp, GatedFeedForward)
    products = (block.attention.qkv, block.attention.out, mlp.gate_up, mlp.down, model.head)
    return all(_even(each, model.embed.weight.dtype, multiple) for each in products)


@torch.inference_mode()
def _even(module: nn.Module, dtype: torch.dtype, multiple: int) -> bool:
    """Whether the rows of a product have the same bits in parts of it.

    Kernels do not depend on the numbers: a plain or packed weight is replaced by one that shows their order of sums.
    """
    if isinstance(module, AdaptedLinear):
        module = module.product
    width: int = module.in_features  # type: ignore[assignment]
    outputs = module.out_features if isinstance(module, nn.Linear | PackedLinear) else 1
    weight, rows = _cancelling((outputs, width), 16 * EVEN_ROWS, dtype)
    product: Callable[[Tensor], Tensor] = module
    if isinstance(module, nn.Linear):
        product = partial(F.linear, weight=weight)
    elif isinstance(module, PackedLinear):
        product = PackedLinear(weight, dtype=module.dtype)
    whole = product(rows)
    parts = ((start, start + count * multiple) for start in (0, 3, 20) for count in (1, 2, 3, 9, 36 // multiple))
    return all(torch.equal(product(rows[start:stop]), whole[start:stop]) for start, stop in parts)


def _cancelling(shape: tuple[int, int], rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A weight (out, in) and inputs (rows, in) whose products are zero but for rounding, the same ones each time.

    Another order of the sums changes nearly each of them, where it would change one of thousands of common products
    rounded to bf16. A few outputs are repeated: a weight of the model's size would take seconds to draw.
    """
    generator = torch.Generator().manual_seed(0)
    half = shape[1] // 2
    order = torch.randperm(half, generator=generator)
    weight, x = (torch.randn(count, half, generator=generator).to(dtype) for count in (64, rows))
    rest = torch.zeros(64, shape[1] % 2, dtype=dtype), torch.zeros(rows, shape[1] % 2, dtype=dtype)
    weight = torch.cat([weight, -weight[:, order], rest[0]], dim=1).repeat(-(-shape[0] // 64), 1)[: shape[0]]
    return weight, torch.cat([x, x[:, order], rest[1]], dim=1)
