"""Activation checkpointing: a block saves less for the backward pass, which recomputes the rest (arXiv 1604.06174).

The numbers stay the same: dropout draws again what it drew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import flop_registry

from components.config.model_settings import Checkpointing

PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm)
SCORES = (torch.ops.aten.bmm, torch.ops.aten.baddbmm)
"""Attention without a kernel of its own: results with T * S elements a head, larger than what they are made of."""
_watcher: ContextVar[Callable[[Tensor], object] | None] = ContextVar("watcher", default=None)


def checkpoint_blocks(model: nn.Module, how: Checkpointing, whole: int = 0) -> None:
    """Set what each block of `model` saves; the first `whole` blocks save everything."""
    for index, block in enumerate(getattr(model, "blocks", ())):
        vars(block).pop("forward", None)
        if how == "none" or index < whole:
            continue
        block.forward = MethodType(_recompute_some if how == "selective" else _recompute_all, block)


def _recompute_all(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # A function of ours, not torch's `checkpoint` itself, for torch.compile compiles none of torch's.
    def forward(*args: Any, **kwargs: Any) -> Any:
        return type(block).forward(block, *args, **kwargs)

    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _recompute_some(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return type(block).forward(block, *args, **kwargs)

    return checkpoint(forward, *args, use_reentrant=False, context_fn=_contexts, **kwargs)


def _policy(context: SelectiveCheckpointContext, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    """Save what takes many operations, the results of linear layers and of attention's kernels; recompute the rest."""
    packet = getattr(op, "overloadpacket", op)
    # Without gradients: within the functions of fused.py, which change results in place.
    saved = torch.is_grad_enabled() if packet in PRODUCTS else packet in flop_registry and packet not in SCORES
    if not saved:
        return CheckpointPolicy.PREFER_RECOMPUTE
    if (watch := _watcher.get()) is not None:
        for result in context.op_output if isinstance(context.op_output, tuple) else (context.op_output,):
            watch(result)
    return CheckpointPolicy.MUST_SAVE


_contexts = partial(create_selective_checkpoint_contexts, _policy)


@contextmanager
def watch_saved(watch: Callable[[Tensor], object]) -> Iterator[None]:
    """Call `watch` with each tensor that passes within save for their backward passes."""

    def pack(tensor: Tensor) -> Tensor:
        watch(tensor)
        return tensor

    token = _watcher.set(watch)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
    finally:
        _watcher.reset(token)
