"""Low-rank adaptation (LoRA, arXiv 2106.09685): frozen weights and a trained low-rank pair per product of a block.

h = W x + (alpha / rank) B A x (section 4.1), with B zero at first, so that training starts from the unchanged model.
A product that Hugging Face stores as several (query, key, value) has a pair for each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from components.config.params import InputError
from components.models.attention import FusedLinear
from components.models.base_store import Base
from components.models.formats import FORMATS, architecture_of, hub_modules
from components.models.fused import low_rank_linear, should_fuse


@dataclass(frozen=True)
class LoraSettings:
    """What `add_lora` made of a model."""

    rank: int
    alpha: float
    modules: tuple[str, ...]
    """Modules that are trained fully."""
    base: Base | None


class LowRankLinear(FusedLinear):
    """A frozen product with low-rank pairs; the outputs of each are those of a part, or all."""

    def __init__(self, product: nn.Linear, rank: int, alpha: float, joint: bool = False) -> None:
        """`joint`: one pair for all parts of a fused product."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = product.in_features, product.out_features
        self.fused = isinstance(product, FusedLinear)
        self.parts = product.parts if isinstance(product, FusedLinear) else (product.out_features,)
        self.widths = (product.out_features,) if joint else self.parts
        self.weight, self.bias = product.weight, product.bias
        self.quantized: nn.Module | None = None
        """What computes the frozen product in place of `weight`."""
        self.rank, self.scale = rank, alpha / rank
        like = product.weight
        self.lora_a = nn.Parameter(like.new_empty(len(self.widths) * rank, self.in_features))
        self.lora_b = nn.Parameter(like.new_zeros(self.out_features, rank))
        nn.init.normal_(self.lora_a, std=self.in_features**-0.5)

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """A (rank, in) and B (width, rank) of each pair, as views."""
        return zip(torch.split(self.lora_a, self.rank), torch.split(self.lora_b, list(self.widths)), strict=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.quantized is not None:
            product: Tensor = self.quantized(x)
            return product + self._added(x, 0, self.out_features)
        if not should_fuse(x):
            return super().forward(x) + self._added(x, 0, self.out_features)
        joined = cast(Callable[..., Tensor], torch.block_diag)(*torch.split(self.lora_b, list(self.widths)))
        return low_rank_linear(x, self.weight, self.bias, self.lora_a, joined, self.scale)

    def some(self, x: Tensor, first: int, stop: int) -> Tensor:
        return super().some(x, first, stop) + self._added(x, sum(self.parts[:first]), sum(self.parts[:stop]))

    def _added(self, x: Tensor, start: int, stop: int) -> Tensor:
        """What the pairs add to the outputs from `start` to before `stop`; pairs may be of higher precision than x."""
        added, offset = [], 0
        for a, b in self.pairs():
            rows = slice(max(start - offset, 0), max(stop - offset, 0))
            if len(part := b[rows]):
                added.append(F.linear(F.linear(x, a.to(x.dtype)) * self.scale, part.to(x.dtype)))
            offset += len(b)
        return torch.cat(added, dim=-1)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain product that computes the same, in the dtype of the weight."""
        weight = self.weight + (torch.cat([b.float() @ a.float() for a, b in self.pairs()]) * self.scale)
        has_bias = self.bias is not None
        plain = (
            FusedLinear(self.in_features, self.parts, has_bias)
            if self.fused
            else nn.Linear(self.in_features, self.out_features, has_bias)
        )
        plain.weight, plain.bias = nn.Parameter(weight.to(self.weight.dtype)), self.bias
        return plain


def add_lora(
    model: nn.Module, rank: int, alpha: float, modules: tuple[str, ...] = (), base: Base | None = None
) -> None:
    """Freeze `model` and put a pair of rank `rank` beside every product of its blocks, attention's and feed-forward's.

    `modules` are trained fully, such as a new head. `base`: whose weights the model has.
    """
    model.requires_grad_(False)
    for path, product, names in list(_products(model)):
        owner, _, name = path.rpartition(".")
        joint = len(names) == 1 and isinstance(product, FusedLinear)
        setattr(model.get_submodule(owner), name, LowRankLinear(product, rank, alpha, joint))
    for name in modules:
        model.get_submodule(name).requires_grad_(True)
    model.__dict__["lora"] = LoraSettings(rank, alpha, tuple(sorted(modules)), base)


def quantize_base(model: nn.Module, kind: Literal["int8", "nf4"]) -> None:
    """Keep the frozen products of a model with low-rank pairs in 8 or 4 bits; it can be trained, and its pairs saved.

    NF4 is QLoRA's (arXiv 2305.14314), int8 that of LLM.int8() (arXiv 2208.07339); both by bitsandbytes.

    Raises: InputError when bitsandbytes is missing.
    """
    try:
        import bitsandbytes.nn as bnb
    except ImportError:
        raise InputError('quantize_base: bitsandbytes is missing; pip install "loopwright[quantized]"') from None
    for product, _ in low_rank_products(model):
        shape = product.in_features, product.out_features, product.bias is not None
        weight, device = product.weight.detach(), product.weight.device
        module: nn.Module
        if kind == "nf4":
            module = bnb.Linear4bit(*shape, compute_dtype=weight.dtype, quant_type="nf4")
            module.weight = bnb.Params4bit(weight, requires_grad=False, quant_type="nf4")
        else:
            module = bnb.Linear8bitLt(*shape, has_fp16_weights=False)
            module.weight = bnb.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        module.bias = product.bias
        product.quantized = module.requires_grad_(False).to(device)
        product.register_parameter("weight", None)


def merge_lora(model: nn.Module) -> None:
    """Merge the pairs into plain products, and unfreeze every weight; train a copy, if others share the base."""
    for path, product, _ in list(_products(model)):
        if isinstance(product, LowRankLinear):
            owner, _, name = path.rpartition(".")
            setattr(model.get_submodule(owner), name, product.merged())
    model.requires_grad_(True)
    for name in ("lora", "base"):
        model.__dict__.pop(name, None)


def lora_of(model: nn.Module) -> LoraSettings | None:
    """What `add_lora` made of a model; None of a plain one."""
    settings: LoraSettings | None = model.__dict__.get("lora")
    return settings


def low_rank_products(model: nn.Module) -> Iterator[tuple[LowRankLinear, tuple[str, ...]]]:
    """Each product with pairs, and the Hugging Face name of each pair's module."""
    for _, product, names in _products(model):
        if isinstance(product, LowRankLinear):
            yield product, names


def _products(model: nn.Module) -> Iterator[tuple[str, nn.Linear, tuple[str, ...]]]:
    """Path of each product of the blocks, a vision tower's left out, and the Hugging Face names of its modules."""
    names = FORMATS[architecture_of(model)].names(model.config)
    for path, module in model.named_modules():
        in_block = "blocks." in path and not path.startswith("vision.")
        if isinstance(module, nn.Linear) and in_block and not path.endswith(".quantized"):
            yield path, module, hub_modules(names, path)
