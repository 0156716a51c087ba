"""What a model is trained for: `objective(model, batch) -> Loss`, a sum over its targets.

A sum and a count, not a mean, so that micro-batches with unlike numbers of targets add up
to what one large batch would give.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from components.data.batches import IGNORED, Batch
from components.models.decoder import Decoder

CHUNK = 1024
"""Rows of logits in memory at a time on a CPU; a GPU wants larger products."""
CUDA_CHUNK = 8192


class Loss(NamedTuple):
    """Sum of the losses of a batch, and over how many targets."""

    total: Tensor
    targets: float
    """A count; a preference may count for several."""


M = TypeVar("M", bound=nn.Module)
Objective = Callable[[M, Batch], Loss]


def causal_lm(model: Decoder, batch: Batch) -> Loss:
    """Cross-entropy of the next token where `labels` names one; attention stays within `segment_ids`.

    With the mask of the chat template in the labels this is instruction tuning.
    """
    labels = batch["labels"].flatten()
    rows = (labels != IGNORED).nonzero().squeeze(1)
    stream = model.hidden(batch["input_ids"], batch["segment_ids"], batch["position_ids"], rows=rows)
    return Loss(linear_cross_entropy(stream, model.head.weight, labels[rows]), len(rows))


def linear_cross_entropy(stream: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Sum of cross-entropies of stream (N, E) against weight (V, E); logits are made a chunk of rows at a time."""
    if not torch.is_grad_enabled():
        size = CUDA_CHUNK if stream.is_cuda else CHUNK
        chunks = zip(torch.split(stream, size), torch.split(labels, size), strict=True)
        parts = [F.cross_entropy((rows @ weight.T).float(), wanted, reduction="sum") for rows, wanted in chunks]
        return torch.stack(parts).sum() if parts else stream.sum() * 0
    apply = cast(Callable[..., Tensor], _LinearCrossEntropy.apply)
    return apply(stream, weight, labels)


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients chunk by chunk in the forward pass, so that logits are made once and never kept."""

    @staticmethod
    def forward(ctx: Any, stream: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=stream.device)
        stream_grad, weight_grad = torch.empty_like(stream), torch.zeros_like(weight)
        size = CUDA_CHUNK if stream.is_cuda else CHUNK
        for start in range(0, len(labels), size):
            rows, wanted = stream[start : start + size], labels[start : start + size].unsqueeze(1)
            chances = torch.softmax(rows @ weight.T, dim=-1, dtype=torch.float32)
            total -= chances.gather(1, wanted).clamp_(min=1e-37).log_().sum()
            # d loss / d logits = probabilities, less one at the label.
            logits_grad = chances.scatter_add_(1, wanted, chances.new_full(wanted.shape, -1.0)).to(stream.dtype)
            torch.mm(logits_grad, weight, out=stream_grad[start : start + size])
            weight_grad.addmm_(logits_grad.T, rows)
        ctx.save_for_backward(stream_grad, weight_grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        stream_grad, weight_grad = ctx.saved_tensors
        scale = grads[0].to(stream_grad.dtype)
        return stream_grad * scale, weight_grad * scale, None
