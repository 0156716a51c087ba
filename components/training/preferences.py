"""Preference training: DPO on pairs, KTO on unpaired labels, beside instruction tuning in one forward pass.

Rafailov et al. 2023 (arXiv 2305.18290), Ethayarajh et al. 2024 (arXiv 2402.01306). The reference model is frozen:
its log-probabilities are measured once, before the first step.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from components.config.loop_settings import AlignConfig
from components.models.decoder import Decoder
from components.token_rows.batches import IGNORED, Batch
from components.token_rows.preference_rows import PreferenceRows, Role, trimmed
from components.training.objectives import Loss, Objective, linear_cross_entropy


def dpo_losses(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float
) -> Tensor:
    """Equation 7 of the DPO paper for each pair, from summed log-probabilities (N,)."""
    return -F.logsigmoid(beta * ((chosen - reference_chosen) - (rejected - reference_rejected)))


def kto_losses(policy: Tensor, reference: Tensor, liked: Tensor, kl: Tensor, beta: float) -> Tensor:
    """Equation 8 of the KTO paper for each vote with both lambdas 1; `kl` is the reference point z0, not trained."""
    sign = torch.where(liked, 1.0, -1.0)
    return 1 - torch.sigmoid(sign * beta * (policy - reference - kl.detach()))


def preference_loss(log_probs: Tensor, batch: Batch, beta: float) -> tuple[Tensor, int]:
    """Sum of the losses of all pairs and unpaired labels of a batch, and how many they are; log_probs (R,)."""
    role, reference = batch["role"], batch["reference"]
    chosen, rejected = role == Role.CHOSEN, role == Role.REJECTED
    pairs = dpo_losses(log_probs[chosen], log_probs[rejected], reference[chosen], reference[rejected], beta)
    votes = (role == Role.LIKED) | (role == Role.DISLIKED)
    mismatched = role == Role.MISMATCHED
    ratios = (log_probs - reference)[mismatched].detach()
    kl = ratios.mean().clamp(min=0) if len(ratios) else torch.zeros((), device=role.device)
    lone = kto_losses(log_probs[votes], reference[votes], role[votes] == Role.LIKED, kl, beta)
    return pairs.sum() + lone.sum(), len(pairs) + len(lone)


def align_objective(config: AlignConfig, reference: Decoder) -> Objective[Decoder]:
    """What people said, without unlearning the rest.

    Cross-entropy on demonstrations; on earlier conversations the cross-entropy to the frozen `reference` (Hinton et
    al. 2015, arXiv 1503.02531), whose gradient is zero where nothing has changed; and `preference_weight` times the
    losses of pairs and unpaired labels.
    """

    def align(model: Decoder, batch: Batch) -> Loss:
        role, width = batch["role"], batch["labels"].shape[1]
        labels = batch["labels"].flatten()
        learned = (labels != IGNORED).nonzero().squeeze(1)
        row = learned // width
        inputs = (batch["input_ids"], batch["segment_ids"], batch["position_ids"])
        stream = model.hidden(*inputs, rows=learned)
        told, kept = (role == Role.SFT)[row], (role == Role.REPLAY)[row]
        loss = Loss(stream.sum() * 0, 0.0)
        if told.any():
            loss = plus(loss, linear_cross_entropy(stream[told], model.head.weight, labels[learned][told]), told.sum())
        if kept.any():
            with torch.no_grad():
                known = reference.hidden(*inputs, rows=learned[kept]) @ reference.head.weight.T
            said = F.log_softmax((stream[kept] @ model.head.weight.T).float(), dim=-1)
            distance = -(F.softmax(known.float(), dim=-1) * said).sum()
            loss = plus(loss, config.replay_weight * distance, config.replay_weight * kept.sum())
        voted = ~(told | kept)
        if voted.any():
            losses = target_nll(stream[voted], model.head.weight, labels[learned][voted])
            log_probs = -torch.zeros(len(role), device=role.device).index_add(0, row[voted], losses)
            preferred, count = preference_loss(log_probs, batch, config.beta)
            loss = plus(loss, config.preference_weight * preferred, config.preference_weight * count)
        return loss

    return align


def plus(loss: Loss, total: Tensor, targets: Tensor | float) -> Loss:
    """The sum of a loss and one more."""
    return Loss(loss.total + total, loss.targets + float(targets))


def target_nll(stream: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Negative log-probability of each label (N,) in float32, with gradients; answers are short, so all at once."""
    return F.cross_entropy((stream @ weight.T).float(), labels, reduction="none")


@torch.no_grad()
def reference_log_probs(model: Decoder, rows: PreferenceRows, batch_size: int) -> None:
    """Fill `rows.reference` with the log-probabilities under `model` as it is now."""
    device = model.embed.weight.device
    for start in range(0, len(rows.tokens), batch_size):
        numbers = np.arange(start, min(start + batch_size, len(rows.tokens)))
        batch = {name: value.to(device) for name, value in trimmed(rows.batch(numbers)).items()}
        rows.reference[numbers] = row_log_probs(model, batch).float().cpu().numpy()


@torch.no_grad()
def row_log_probs(model: Decoder, batch: Batch) -> Tensor:
    """Log-probability of the labels of each row (R,) float32."""
    width = batch["labels"].shape[1]
    labels = batch["labels"].flatten()
    learned = (labels != IGNORED).nonzero().squeeze(1)
    stream = model.hidden(batch["input_ids"], batch["segment_ids"], batch["position_ids"], rows=learned)
    losses = target_nll(stream, model.head.weight, labels[learned])
    return -torch.zeros(len(labels) // width, device=losses.device).index_add_(0, learned // width, losses)
