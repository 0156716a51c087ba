"""Training objectives: `objective(model, batch) -> Loss`, a sum over targets.

A sum and a count, not a mean, so that micro-batches with different numbers of targets add up to one large batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from components.models.decoder import Decoder
from components.models.encoder import Classifier, EncoderForPretraining
from components.models.encoder_decoder import EncoderDecoder
from components.models.vision import VisionLanguageModel, normalized
from components.token_rows.batches import IGNORED, Batch

MAX_ROWS = {"cpu": 1024, "cuda": 8192}
"""Rows of logits in memory at a time; larger products are faster on a GPU."""
MAX_LOGITS = {"cpu": 2**26, "cuda": 2**28}
"""Logits of these rows: 0.25 and 1 GiB in fp32, to which `budget.py` adds what is made of them."""
ROW_MULTIPLE = 128
TARGET_MULTIPLE = 64
"""Rows of targets are padded to a multiple: a matrix product of a new shape is prepared anew, which takes a CPU as long
as a small product itself, and each batch has another number of targets."""


class Loss(NamedTuple):
    """Sum of the losses of a batch, and the number of targets."""

    total: Tensor
    targets: float
    """A preference may count as several."""


M = TypeVar("M", bound=nn.Module)
Objective = Callable[[M, Batch], Loss]


def causal_lm(model: Decoder, batch: Batch) -> Loss:
    """Causal language modelling: -sum_t log p(x_t | x_<t), where `labels` names x_t; attention stays in `segment_ids`.

    (GPT, Radford et al. 2018, eq. 1.) With the mask of the chat template in the labels this is instruction tuning.
    """
    rows, targets, count = target_rows(batch["labels"])
    stream = hidden_rows(model, batch, rows)
    return Loss(linear_cross_entropy(stream, model.head.weight, targets, count=count), count)


def target_rows(labels: Tensor) -> tuple[Tensor, Tensor, int]:
    """The positions (N,) of labels (B, T) that are no padding, the labels there, and their count: N is a multiple of
    TARGET_MULTIPLE, and the rows behind the count repeat a position."""
    flat = labels.flatten()
    rows = (flat != IGNORED).nonzero().squeeze(1)
    count = len(rows)
    padded = torch.cat([rows, rows[-1:].expand(-count % TARGET_MULTIPLE)])
    return padded, flat[padded], count


def hidden_rows(model: Decoder, batch: Batch, rows: Tensor) -> Tensor:
    """The normed stream (N, E) at `rows` (N) of the B * T positions of packed rows, which may have pictures."""
    inputs = batch["input_ids"], batch["segment_ids"], batch["position_ids"]
    if "pixel_values" not in batch or not isinstance(model, VisionLanguageModel):
        return model.hidden(*inputs, rows=rows)
    values = normalized(batch["pixel_values"]).to(model.embed.weight.dtype)
    return model.hidden(*inputs, rows=rows, pixel_values=values)


def masked_lm_next_sentence(model: EncoderForPretraining, batch: Batch) -> Loss:
    """BERT's pretraining loss (arXiv 1810.04805, appendix A.2): -log p(x_t | x with t masked), the mean over the masked
    tokens, which `labels` names, plus -log p(whether B follows A), the mean over the pairs.

    The sum counts masked tokens, so each pair weighs as much as its share of them. A pair whose
    `next_sentence_labels` (B,) is IGNORED, for it has no second segment, is left out of the second mean; so are all
    where the architecture has no such head (RoBERTa, arXiv 1907.11692).
    """
    follows = batch["next_sentence_labels"]
    pairs, length = batch["input_ids"].shape
    masked, targets, count = target_rows(batch["labels"])
    firsts = torch.arange(0, pairs * length, length, device=masked.device)
    rows = torch.cat([masked, firsts])
    stream = model.hidden(batch["input_ids"], batch["token_type_ids"], batch["attention_mask"], rows=rows)
    transformed = model.transformed(stream[: len(masked)])
    tokens = linear_cross_entropy(transformed, model.head.weight, targets, model.head.bias, count)
    if model.next_sentence is None:
        return Loss(tokens, count)
    logits = model.next_sentence(model.pooled(stream[len(masked) :])).float()
    followed = F.cross_entropy(logits, follows, ignore_index=IGNORED, reduction="sum")
    weight = count / (follows != IGNORED).sum().clamp(min=1)
    return Loss(tokens + weight * followed, count)


def sequence_to_sequence(model: EncoderDecoder, batch: Batch) -> Loss:
    """-sum_t log p(y_t | y_<t, x): targets from sources; on corrupted spans it is T5's pretraining (arXiv 1910.10683).

    `input_ids` and `attention_mask` (B, S); `decoder_input_ids` and `labels` (B, T), IGNORED at padding.
    """
    rows, targets, count = target_rows(batch["labels"])
    context = model.encode(batch["input_ids"], batch["attention_mask"])
    stream = model.decode(batch["decoder_input_ids"], context, batch["attention_mask"], rows=rows)
    return Loss(linear_cross_entropy(stream * model.head.scale, model.head.weight, targets, count=count), count)


def classification(weights: Tensor, label_smoothing: float) -> Objective[Classifier]:
    """Cross-entropy of each text's label, which counts as its weight (L,) says; `label_smoothing` of it goes to all
    labels alike (arXiv 1512.00567, section 7)."""

    def classify(model: Classifier, batch: Batch) -> Loss:
        labels = batch["labels"]
        logits = model.logits(batch["input_ids"], batch["token_type_ids"], batch["attention_mask"]).float()
        total = F.cross_entropy(logits, labels, weights, reduction="sum", label_smoothing=label_smoothing)
        return Loss(total, float(weights[labels].sum()))

    return classify


def chunk_rows(vocab_size: int, device: str) -> int:
    """Rows whose logits are made at a time on a device of this type."""
    fitting = MAX_LOGITS[device] // vocab_size // ROW_MULTIPLE * ROW_MULTIPLE
    return min(MAX_ROWS[device], max(ROW_MULTIPLE, fitting))


def linear_cross_entropy(
    stream: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, count: int | None = None
) -> Tensor:
    """Sum of cross-entropies of the first `count` rows of stream (N, E) against weight (V, E); None: of all.

    Logits are made a chunk of rows at a time.
    """
    count = len(labels) if count is None else count
    if not torch.is_grad_enabled():
        stream, labels = stream[:count], labels[:count]
        size = chunk_rows(len(weight), stream.device.type)
        chunks = zip(torch.split(stream, size), torch.split(labels, size), strict=True)
        logits = ((F.linear(rows, weight, bias).float(), targets) for rows, targets in chunks)
        parts = [F.cross_entropy(rows, targets, reduction="sum") for rows, targets in logits]
        return torch.stack(parts).sum() if parts else stream.sum() * 0
    apply = cast(Callable[..., Tensor], _LinearCrossEntropy.apply)
    return apply(stream, weight, labels, bias, count)


def row_losses(loss: Callable[..., Tensor], stream: Tensor, weight: Tensor, *targets: Tensor) -> Tensor:
    """`loss(logits, *targets)` of each row of stream (N, E) against weight (V, E): (N,) float32, with gradients.

    Logits are made a chunk of rows at a time, and again in the backward pass where there are several chunks.
    """

    def losses(rows: Tensor, *targets: Tensor) -> Tensor:
        return loss((rows @ weight.T).float(), *targets)

    size = chunk_rows(len(weight), stream.device.type)
    if len(stream) <= size:
        return losses(stream, *targets)
    chunks = zip(*(torch.split(part, size) for part in (stream, *targets)), strict=True)
    recomputed = (checkpoint(losses, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks)
    return torch.cat(list(cast(Iterable[Tensor], recomputed)))


class _LinearCrossEntropy(torch.autograd.Function):
    """Loss and gradients chunk by chunk in the forward pass, so that logits are computed once and never stored."""

    @staticmethod
    def forward(ctx: Any, stream: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, count: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=stream.device)
        stream_grad = torch.empty_like(stream)
        weight_grad = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None  # None: the head is frozen by LoRA
        bias_grad = torch.zeros_like(bias) if bias is not None else None
        size = chunk_rows(len(weight), stream.device.type)
        for start in range(0, len(labels), size):
            rows, targets = stream[start : start + size], labels[start : start + size].unsqueeze(1)
            valid = max(0, count - start)
            probabilities = torch.softmax(F.linear(rows, weight, bias), dim=-1, dtype=torch.float32)
            total -= probabilities[:valid].gather(1, targets[:valid]).clamp_(min=1e-37).log_().sum()
            # d loss / d logits = probabilities, less one at the label; none of padding.
            minus_one = probabilities.new_full(targets.shape, -1.0)
            logits_grad = probabilities.scatter_add_(1, targets, minus_one).to(stream.dtype)
            logits_grad[valid:] = 0
            torch.mm(logits_grad, weight, out=stream_grad[start : start + size])
            if weight_grad is not None:
                weight_grad.addmm_(logits_grad.T, rows)
            if bias_grad is not None:
                bias_grad += logits_grad.sum(0)
        ctx.save_for_backward(stream_grad, weight_grad, bias_grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale = grads[0].to(ctx.saved_tensors[0].dtype)
        stream, weight, bias = (grad * scale if grad is not None else None for grad in ctx.saved_tensors)
        return stream, weight, None, bias, None
