"""DPO and KTO against the papers' formulas on numbers worked out by hand, and on the preferences that they train."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from components.config.loop_settings import AlignConfig
from components.config.params import load_params
from components.models.decoder import Decoder, DecoderConfig
from components.token_rows.batches import IGNORED, Batch
from components.token_rows.preference_rows import Role
from components.training.align import align_objective, dpo_losses, kto_losses, preference_loss, row_log_probs
from components.training.objectives import causal_lm
from tests.training.conftest import SOURCE

CONFIG = DecoderConfig(
    vocab_size=31, embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, hidden_dim=24, max_seq_len=32
)


@pytest.fixture
def config() -> AlignConfig:
    return load_params(SOURCE / "params.yaml", {"scale": "smoke"}).align


def new_model(seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(CONFIG)


def batch(roles: list[Role], length: int = 9, prompt: int = 4, padding: int = 0) -> Batch:
    """A row per role: a prompt of `prompt` tokens that is not learned, the rest an answer."""
    random = torch.Generator().manual_seed(len(roles))
    ids = torch.randint(1, 31, (len(roles), length), generator=random)
    labels = torch.full_like(ids, IGNORED)
    labels[:, prompt - 1 : -1] = ids[:, prompt:]
    made = {
        "input_ids": ids,
        "labels": labels,
        "segment_ids": torch.ones_like(ids),
        "position_ids": torch.arange(length).expand_as(ids).contiguous(),
    }
    fill = {"input_ids": 0, "labels": IGNORED, "segment_ids": 0, "position_ids": 0}
    padded = {
        name: torch.cat([value, torch.full((len(roles), padding), fill[name])], dim=1) for name, value in made.items()
    }
    return padded | {"role": torch.tensor([int(role) for role in roles]), "reference": torch.zeros(len(roles))}


def with_reference(model: Decoder, given: Batch) -> Batch:
    return given | {"reference": row_log_probs(model, given)}


def test_dpo_is_equation_seven_of_its_paper() -> None:
    losses = dpo_losses(*(torch.tensor([value]) for value in (-10.0, -14.0, -11.0, -12.0)), beta=0.5)
    # 0.5 * ((-10 + 11) - (-14 + 12)) = 1.5
    assert losses.item() == pytest.approx(-math.log(1 / (1 + math.exp(-1.5))))


def test_kto_is_equation_eight_of_its_paper() -> None:
    losses = kto_losses(
        torch.tensor([-10.0, -10.0]), torch.tensor([-11.0, -11.0]), torch.tensor([True, False]), torch.tensor(0.4), 0.5
    )
    # rewards less the reference point: 0.5 * (1 - 0.4) = 0.3, the other way round for what is disliked
    wanted = [1 - 1 / (1 + math.exp(-0.3)), 1 - 1 / (1 + math.exp(0.3))]
    assert losses.tolist() == pytest.approx(wanted)


def test_at_the_reference_a_pair_costs_log_two_and_a_vote_one_half() -> None:
    model = new_model()
    roles = [Role.CHOSEN, Role.REJECTED, Role.LIKED, Role.MISMATCHED]
    given = with_reference(model, batch(roles))
    loss, count = preference_loss(row_log_probs(model, given), given, beta=0.3)
    assert count == 2
    assert loss.item() == pytest.approx(math.log(2) + 0.5, abs=1e-5)


def test_the_kl_of_mismatched_rows_is_measured_and_not_trained() -> None:
    given = batch([Role.LIKED, Role.MISMATCHED, Role.MISMATCHED])
    log_probs = torch.tensor([-3.0, 2.0, 1.0], requires_grad=True)
    loss, _ = preference_loss(log_probs, given, beta=1.0)
    assert loss.item() == pytest.approx(1 - 1 / (1 + math.exp(3.0 + 1.5)))
    (slope,) = torch.autograd.grad(loss, log_probs)
    assert slope[0] < 0, "the liked answer is to become more probable"
    assert slope[1:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("mismatched", "kl"), [([2.0, 1.0], 1.5), ([-1.0, 1.5], 0.25), ([-2.0, 1.0], 0.0), ([-2.0, -1.0], 0.0)]
)
def test_the_kl_is_the_mean_over_mismatched_rows_and_never_below_zero(mismatched: list[float], kl: float) -> None:
    given = batch([Role.DISLIKED, Role.MISMATCHED, Role.MISMATCHED])
    given["reference"] = torch.tensor([-4.0, -7.0, -7.0])
    loss, count = preference_loss(torch.tensor([-3.0, *(value - 7.0 for value in mismatched)]), given, beta=0.5)
    assert count == 1
    assert loss.item() == pytest.approx(1 - 1 / (1 + math.exp(0.5 * (1.0 - kl))))


def test_micro_batches_add_up_to_the_large_batch(config: AlignConfig) -> None:
    model, reference = new_model(), new_model(1)
    pairs = with_reference(reference, batch([Role.CHOSEN, Role.REJECTED] * 2))
    told = with_reference(reference, batch([Role.SFT, Role.REPLAY]))
    objective = align_objective(config, reference)
    apart = [objective(model, part) for part in (pairs, told)]
    whole = objective(model, {name: torch.cat([pairs[name], told[name]]) for name in pairs})
    assert whole.targets == sum(part.targets for part in apart)
    torch.testing.assert_close(whole.total, apart[0].total + apart[1].total)


def test_padding_changes_nothing(config: AlignConfig) -> None:
    model, reference = new_model(), new_model(1)
    roles = [Role.SFT, Role.REPLAY, Role.CHOSEN, Role.REJECTED, Role.DISLIKED, Role.MISMATCHED]
    objective = align_objective(config, reference)
    plain, padded = (objective(model, batch(roles, padding=padding)) for padding in (0, 7))
    torch.testing.assert_close(plain.total, padded.total)
    assert plain.targets == padded.targets


def test_demonstrations_alone_are_instruction_tuning(config: AlignConfig) -> None:
    model = new_model()
    given = batch([Role.SFT, Role.SFT])
    ours, plain = align_objective(config, new_model(1))(model, given), causal_lm(model, given)
    torch.testing.assert_close(ours.total, plain.total)
    assert ours.targets == plain.targets


def test_replay_has_no_gradient_where_nothing_has_changed(config: AlignConfig) -> None:
    model = new_model()
    align_objective(config, new_model())(model, batch([Role.REPLAY, Role.REPLAY])).total.backward()
    largest = max(float(weight.grad.abs().max()) for weight in model.parameters() if weight.grad is not None)
    assert largest < 1e-5


@pytest.mark.parametrize("weight", [1.0, 3.0, 0.25])
def test_a_replayed_token_counts_for_its_weight(config: AlignConfig, weight: float) -> None:
    model, reference, given = new_model(), new_model(1), batch([Role.REPLAY, Role.REPLAY])
    loss = align_objective(config.model_copy(update={"replay_weight": weight}), reference)(model, given)
    learned = given["labels"] != IGNORED
    inputs = (given["input_ids"], given["segment_ids"], given["position_ids"])
    ours, theirs = ((one.hidden(*inputs) @ one.head.weight.T)[learned] for one in (model, reference))
    torch.testing.assert_close(loss.total, weight * F.cross_entropy(ours, theirs.softmax(-1), reduction="sum"))
    assert loss.targets == weight * int(learned.sum())


@pytest.mark.parametrize("weight", [1.0, 8.0, 0.0])
def test_a_preference_counts_for_its_weight(config: AlignConfig, weight: float) -> None:
    model = new_model()
    roles = [Role.CHOSEN, Role.REJECTED, Role.LIKED, Role.MISMATCHED, Role.DISLIKED, Role.MISMATCHED]
    given = with_reference(new_model(1), batch(roles))
    loss = align_objective(config.model_copy(update={"preference_weight": weight}), new_model(1))(model, given)
    preferred, count = preference_loss(row_log_probs(model, given), given, config.beta)
    assert count == 3
    torch.testing.assert_close(loss.total, weight * preferred)
    assert loss.targets == weight * 3


def test_what_is_told_replayed_and_preferred_adds_up(config: AlignConfig) -> None:
    """Each token told counts for one, a replayed one and a preference for what the project says."""
    model, reference = new_model(), new_model(1)
    roles = [Role.SFT, Role.REPLAY, Role.CHOSEN, Role.REJECTED]
    given = with_reference(reference, batch(roles))
    tokens = int((given["labels"][0] != IGNORED).sum())
    loss = align_objective(config, reference)(model, given)
    assert loss.targets == tokens + config.replay_weight * tokens + config.preference_weight
    assert config.replay_weight != 1 != config.preference_weight


def test_a_preference_flips_and_the_reference_stays(config: AlignConfig) -> None:
    model, reference = new_model(), new_model()
    roles = [Role.CHOSEN, Role.REJECTED, Role.LIKED, Role.DISLIKED]
    given = with_reference(reference, batch(roles))
    before, frozen = given["reference"].clone(), [weight.clone() for weight in reference.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    objective = align_objective(config, reference)
    for _ in range(40):
        optimizer.zero_grad()
        loss = objective(model, given)
        (loss.total / loss.targets).backward()
        optimizer.step()
    gained = row_log_probs(model, given) - before
    assert gained[0] > gained[1] + 1
    assert gained[2] > 0 > gained[3]
    assert all(torch.equal(ours, kept) for ours, kept in zip(reference.parameters(), frozen, strict=True))
