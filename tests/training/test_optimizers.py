"""AdamW and Muon against torch's own; fp32 masters; the schedule."""

from __future__ import annotations

import multiprocessing

import pytest
import torch
from torch import nn

from benchmarks.step_memory import step_memory
from components.config.model_settings import TrainConfig
from components.models.decoder import Decoder, DecoderConfig
from components.training.optimizers import (
    AdamW,
    Masters,
    Muon,
    build_optimizers,
    orthogonal,
    rate_factor,
    scale_and_clip,
)


def config(**changes: object) -> TrainConfig:
    values: dict[str, object] = {
        "dataset": "x",
        "optimizer": "muon",
        "max_steps": 10,
        "global_batch_size": 2,
        "micro_batch_size": 2,
        "learning_rate": 0.003,
        "muon_learning_rate": 0.02,
        "warmup_steps": 2,
        "decay_share": 0.5,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "precision": "fp32",
        "compile": "off",
        "activation_checkpointing": "none",
        "checkpoint_seconds": 1,
        "log_steps": 1,
    }
    return TrainConfig.model_validate(values | changes)


def tiny() -> Decoder:
    torch.manual_seed(0)
    return Decoder(DecoderConfig(30, 16, 2, 2, 1, 8, 24, 32, qk_norm=True, tie_embeddings=True))


SHAPES = [(24, 16), (16, 16), (8, 16), (16, 40)]


def stepped(weights: dict[str, torch.Tensor], step: int) -> None:
    for number, weight in enumerate(weights.values()):
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(100 * step + number))


def test_muon_equals_torchs() -> None:
    torch.manual_seed(0)
    ours = {str(number): torch.randn(shape) for number, shape in enumerate(SHAPES)}
    theirs = {name: nn.Parameter(weight.clone()) for name, weight in ours.items()}
    mine = Muon(ours, 0.02, momentum=0.95, weight_decay=0.1)
    reference = torch.optim.Muon(theirs.values(), lr=0.01, momentum=0.95, weight_decay=0.1)
    for step in range(6):
        stepped(ours, step)
        stepped(dict(theirs.items()), step)
        mine.step(0.5)
        reference.step()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name].detach(), rtol=0, atol=2e-3)  # both orthogonalise in bf16
        assert (weight - theirs[name]).abs().mean() < 2e-4


def test_a_step_of_muon_needs_little_beside_its_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """All updates and their orthogonal directions at once were 13 bytes a parameter more."""
    shape = DecoderConfig(256, 384, 10, 6, 6, 64, 1536, 64, qk_norm=True, tie_embeddings=True)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # what is freed goes back to the system, and is not counted
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        held, peak = pool.apply(step_memory, (shape, "muon", torch.float32))
    assert peak < held + 4


def test_muon_treats_parts_of_a_fused_product_as_matrices_of_their_own() -> None:
    torch.manual_seed(0)
    heights = (24, 8, 8)
    apart = {str(number): torch.randn(rows, 16) for number, rows in enumerate(heights)}
    fused = {"all": torch.cat(list(apart.values()))}
    fused["all"].grad = torch.randn(40, 16)
    for weight, own in zip(apart.values(), fused["all"].grad.split(heights), strict=True):
        weight.grad = own.clone()
    Muon(fused, 0.1, parts={"all": heights}, dtype=torch.float32).step(1.0)
    Muon(apart, 0.1, dtype=torch.float32).step(1.0)
    torch.testing.assert_close(fused["all"], torch.cat(list(apart.values())))


def test_orthogonal_brings_singular_values_near_one() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(3, 20, 50)))
    assert values.min() > 0.6
    assert values.max() < 1.3


@pytest.mark.parametrize("shape", [(20, 50), (20, 22)])
def test_orthogonal_equals_its_definition(shape: tuple[int, int]) -> None:
    """X <- a X + b (X X^T) X + c (X X^T)^2 X, five times, in double precision; also where singular values are tiny."""
    torch.manual_seed(0)
    matrices = torch.randn(9, *shape) * torch.logspace(-5, 0, 20).unsqueeze(1)
    a, b, c = 3.4445, -4.7750, 2.0315
    x = (matrices / matrices.norm(dim=(1, 2), keepdim=True)).double()
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + b * gram @ x + c * gram @ gram @ x
    torch.testing.assert_close(orthogonal(matrices).double(), x, rtol=0, atol=1e-5)


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    model = tiny()
    muon, adamw = build_optimizers(model, Masters(model), config(), torch.float32)
    assert isinstance(muon, Muon)
    assert isinstance(adamw, AdamW)
    matrices = {name for name, weight in model.named_parameters() if "blocks" in name and weight.dim() == 2}
    assert set(muon.weights) == matrices
    assert set(adamw.weights) == {name for name, _ in model.named_parameters()} - matrices
    assert muon.parts["blocks.1.attention.qkv.weight"] == [16, 8, 8]
    assert muon.parts["blocks.0.mlp.gate_up.weight"] == [24, 24]
    assert muon.parts["blocks.0.mlp.down.weight"] == [16]


def test_adamw_equals_torchs_plain_one_and_decays_matrices_alone() -> None:
    model, plain = tiny(), tiny()
    (adamw,) = build_optimizers(model, Masters(model), config(optimizer="adamw"), torch.float32)
    names = dict(plain.named_parameters())
    groups = [
        {"params": [w for n, w in names.items() if ("blocks" in n and w.dim() == 2) == decayed], "weight_decay": decay}
        for decayed, decay in ((True, 0.1), (False, 0.0))
    ]
    reference = torch.optim.AdamW(groups, lr=0.0015, betas=(0.9, 0.95), fused=False)
    for step in range(5):
        stepped(dict(model.named_parameters()), step)
        stepped(dict(names), step)
        adamw.step(0.5)
        reference.step()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, names[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_clipping_equals_torchs(max_norm: float) -> None:
    ours = {str(number): torch.randn(shape) for number, shape in enumerate(SHAPES)}
    stepped(ours, 0)
    theirs = [weight.clone() for weight in ours.values()]
    for a, b in zip(ours.values(), theirs, strict=True):
        assert a.grad is not None
        b.grad = a.grad * 0.25
    scale_and_clip(list(ours.values()), 0.25, max_norm)
    torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    for a, b in zip(ours.values(), theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_masters_keep_what_bf16_would_round_away() -> None:
    model = tiny().bfloat16()
    masters = Masters(model)
    weight = masters.trained()["norm.weight"]
    for _ in range(64):
        weight.data.add_(2**-12)  # less than half a step of bf16 at one
        masters.publish()
    assert torch.equal(model.norm.weight, torch.full_like(model.norm.weight, 1 + 2**-6))


def test_masters_sum_gradients_in_fp32() -> None:
    model = tiny().bfloat16()
    masters = Masters(model)
    for value in (256.0, 0.5, 0.5):
        model.norm.weight.grad = torch.full_like(model.norm.weight, value)
        masters.collect()
    grad = masters.trained()["norm.weight"].grad
    assert grad is not None
    assert torch.equal(grad, torch.full((16,), 257.0))
    assert model.norm.weight.grad is None


def test_fp32_weights_are_their_own_masters() -> None:
    model = tiny()
    masters = Masters(model)
    assert masters.trained()["norm.weight"] is model.norm.weight
    assert set(masters.trained()) == {name for name, _ in model.named_parameters()}


def test_the_rate_warms_up_holds_and_falls() -> None:
    factors = [rate_factor(step, max_steps=10, warmup_steps=2, decay_share=0.4) for step in range(10)]
    assert factors == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert rate_factor(0, 10, 0, 0) == rate_factor(9, 10, 0, 0) == 1
