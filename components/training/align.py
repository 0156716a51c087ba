"""Stage: align the deployed model with user feedback, starting from its own weights.

Instruction tuning on demonstrations, replay of earlier conversations, DPO on pairs and KTO on unpaired labels in one
forward pass: Rafailov et al. 2023 (arXiv 2305.18290), Ethayarajh et al. 2024 (arXiv 2402.01306). The reference model
is frozen: its log-probabilities are computed once, before the first step.
"""

from __future__ import annotations

import json

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from components.config.loop_settings import AlignConfig
from components.config.paths import AGENT, CURATED, ORIGIN, TOOLS, TRAINED_ON_FILE
from components.models.base_store import is_adapter, store_base
from components.models.checkpoint import check_model, load_decoder, save_decoder, sharing
from components.models.decoder import Decoder
from components.models.devices import best_device, compute_dtype, configure_cpu
from components.models.lora import add_lora, lora_of, low_rank_products
from components.models.vision import VisionLanguageModel
from components.runtime.stage import StageRun, digest
from components.token_rows.batches import IGNORED, Batch, TokenRows
from components.token_rows.preference_rows import AlignRows, PreferenceRows, Role, trimmed
from components.training.defaults import fit_to_base
from components.training.distributed import agreed, join
from components.training.from_base import quantize_frozen
from components.training.loop import refuse_bad_masks, train
from components.training.objectives import Loss, Objective, hidden_rows, linear_cross_entropy, row_losses
from components.training.report import describe, report


def align(run: StageRun) -> None:
    """Train data/models/start on data/curated, save data/models/candidate.

    Raises: InputError when model and rows do not fit, when there is nothing to learn, or when saving fails.
    """
    configure_cpu()
    join()
    config, curated, start = run.params.align, run.paths.curated, run.paths.start
    replay = TokenRows(curated / "replay", "train")
    refuse_bad_masks(replay, tuning=True)
    device = best_device()
    dtype = agreed(compute_dtype(config.precision, device, check_model(start)))
    reference = load_decoder(start, dtype, device).eval()
    torch.manual_seed(run.params.seed)
    if config.lora_rank and lora_of(reference) is None:  # pairs that add nothing at first
        add_lora(reference, config.lora_rank, config.lora_alpha, base=store_base(start, run.paths.home))
    quantize_frozen(run, config.quantize_base, reference)
    reference.requires_grad_(False)
    model = _trained_model(run, reference)
    preferences = PreferenceRows(curated / "preferences-rows", "train")
    rows = AlignRows(TokenRows(curated / "sft", "train"), replay, preferences)
    if is_adapter(start) and (adapter := lora_of(reference)) is not None:
        config = config.model_copy(update={"lora_rank": adapter.rank})
        config = fit_to_base(run, config, reference, rows, _parent(run))
    reference_log_probs(reference, preferences, config.micro_batch_size)
    torch.manual_seed(run.params.seed)
    describe(run, model, model.config.max_seq_len, rows)
    measured = train(run, config, model, rows, align_objective(config, reference))
    # knowledge.sqlite: of a model that was saved before tools were saved with models.
    files = {name: start / name for name in (AGENT, TOOLS, "knowledge.sqlite") if (start / name).exists()}
    save_decoder(model, run.paths.candidate, start, {**files, TRAINED_ON_FILE: _origin(run)})
    report(run, config, model, measured, run.paths.candidate, {})


def _trained_model(run: StageRun, reference: Decoder) -> Decoder:
    """The model that is trained; with low-rank pairs its frozen weights are those of the reference, in memory once."""
    config, start = run.params.align, run.paths.start
    if lora_of(reference) is None:
        model = load_decoder(start)
        freeze(model, config.trained_share)
        return model
    model = sharing(reference)
    for product, _ in low_rank_products(model):
        product.lora_a = nn.Parameter(product.lora_a.detach().clone())
        product.lora_b = nn.Parameter(product.lora_b.detach().clone())
    return model


def freeze(model: Decoder, trained_share: float) -> None:
    """Let only the last blocks learn, and the final norm; a share of 1 trains everything but a vision tower."""
    if trained_share == 1:
        if isinstance(model, VisionLanguageModel):
            model.train_vision(False)
        return
    model.requires_grad_(False)
    model.norm.requires_grad_(True)
    for block in model.blocks[-max(1, round(len(model.blocks) * trained_share)) :]:
        block.requires_grad_(True)


def _origin(run: StageRun) -> str:
    """The candidate's parent version and the feedback it is trained on, as JSON."""
    curated = json.loads((run.paths.curated / CURATED).read_text(encoding="utf-8"))
    lineage = {"parent": _parent(run), "feedback": curated["feedback"], "curated": digest(run.paths.curated)}
    return json.dumps(lineage, indent=2) + "\n"


def _parent(run: StageRun) -> str:
    """The version that training starts from."""
    origin = json.loads((run.paths.start / ORIGIN).read_text(encoding="utf-8"))
    return str(origin["version"])


def dpo_losses(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float
) -> Tensor:
    """Equation 7 of the DPO paper for each pair, from summed log-probabilities (N,)."""
    return -F.logsigmoid(beta * ((chosen - reference_chosen) - (rejected - reference_rejected)))


def kto_losses(policy: Tensor, reference: Tensor, liked: Tensor, kl: Tensor, beta: float) -> Tensor:
    """Equation 8 of the KTO paper for each label with both lambdas 1; `kl` is the reference point z0, not trained."""
    sign = torch.where(liked, 1.0, -1.0)
    return 1 - torch.sigmoid(sign * beta * (policy - reference - kl.detach()))


def preference_loss(log_probs: Tensor, batch: Batch, beta: float) -> tuple[Tensor, int]:
    """Sum of the losses of all pairs and unpaired labels of a batch, and their number; log_probs (R,)."""
    role, reference = batch["role"], batch["reference"]
    chosen, rejected = role == Role.CHOSEN, role == Role.REJECTED
    pairs = dpo_losses(log_probs[chosen], log_probs[rejected], reference[chosen], reference[rejected], beta)
    labelled = (role == Role.LIKED) | (role == Role.DISLIKED)
    mismatched = role == Role.MISMATCHED
    ratios = (log_probs - reference)[mismatched].detach()
    kl = ratios.mean().clamp(min=0) if len(ratios) else torch.zeros((), device=role.device)
    unpaired = kto_losses(log_probs[labelled], reference[labelled], role[labelled] == Role.LIKED, kl, beta)
    return pairs.sum() + unpaired.sum(), len(pairs) + len(unpaired)


def align_objective(config: AlignConfig, reference: Decoder) -> Objective[Decoder]:
    """User feedback without forgetting.

    Cross-entropy on demonstrations; on replayed conversations the cross-entropy to the frozen `reference` (Hinton et
    al. 2015, arXiv 1503.02531), whose gradient is zero where nothing has changed; and `preference_weight` times the
    losses of pairs and unpaired labels.
    """

    def cross_entropy_to_reference(logits: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            probabilities = F.softmax((target @ reference.head.weight.T).float(), dim=-1)
        return -(probabilities * F.log_softmax(logits, dim=-1)).sum(-1)

    def objective(model: Decoder, batch: Batch) -> Loss:
        role, width = batch["role"], batch["labels"].shape[1]
        labels = batch["labels"].flatten()
        positions = (labels != IGNORED).nonzero().squeeze(1)
        row = positions // width
        stream = hidden_rows(model, batch, positions)
        sft, replay = (role == Role.SFT)[row], (role == Role.REPLAY)[row]
        loss = Loss(stream.sum() * 0, 0.0)
        if sft.any():
            loss = plus(loss, linear_cross_entropy(stream[sft], model.head.weight, labels[positions][sft]), sft.sum())
        if replay.any():
            with torch.no_grad():
                target = hidden_rows(reference, batch, positions[replay])
            distance = row_losses(cross_entropy_to_reference, stream[replay], model.head.weight, target).sum()
            loss = plus(loss, config.replay_weight * distance, config.replay_weight * replay.sum())
        preference = ~(sft | replay)
        if preference.any():
            losses = row_losses(
                negative_log_probs, stream[preference], model.head.weight, labels[positions][preference]
            )
            log_probs = -torch.zeros(len(role), device=role.device).index_add(0, row[preference], losses)
            preferred, count = preference_loss(log_probs, batch, config.beta)
            loss = plus(loss, config.preference_weight * preferred, config.preference_weight * count)
        return loss

    return objective


def plus(loss: Loss, total: Tensor, targets: Tensor | float) -> Loss:
    """The sum of two losses."""
    return Loss(loss.total + total, loss.targets + float(targets))


def negative_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each label (N,) under its logits (N, V)."""
    return F.cross_entropy(logits, labels, reduction="none")


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
    positions = (labels != IGNORED).nonzero().squeeze(1)
    stream = hidden_rows(model, batch, positions)
    losses = row_losses(negative_log_probs, stream, model.head.weight, labels[positions])
    return -torch.zeros(len(labels) // width, device=losses.device).index_add_(0, positions // width, losses)
