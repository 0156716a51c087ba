"""The fused operations for training on a CPU equal the plain functions, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from components.models import attention, fused
from components.models.attention import Attention, additive, causal_mask
from components.models.fused import RMSNorm, low_rank_linear, swiglu
from components.models.positions import RotaryPositions

Made = tuple[Tensor, list[Tensor]]


def with_grads(function: Callable[[], Tensor], inputs: list[Tensor]) -> Made:
    out = function()
    weighted = (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum()
    return out.detach(), list(torch.autograd.grad(weighted, inputs))


def assert_equal(ours: Made, plain: Made) -> None:
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-3, atol=1e-4)
    for got, expected in zip(ours[1], plain[1], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_rms_norm() -> None:
    torch.manual_seed(0)
    norm = RMSNorm(24, eps=1e-2)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 5, 24, requires_grad=True)
    plain = with_grads(lambda: F.rms_norm(x, (24,), norm.weight, 1e-2), [x, norm.weight])
    assert_equal(with_grads(lambda: norm(x), [x, norm.weight]), plain)


def test_swiglu() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 24, requires_grad=True)
    plain = with_grads(lambda: F.silu(x[..., :12]) * x[..., 12:], [x])
    assert_equal(with_grads(lambda: swiglu(x), [x]), plain)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("learned", [True, False])
def test_low_rank_linear(biased: bool, learned: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 5, 12, requires_grad=learned), torch.randn(8, 12)
    bias = torch.randn(8) if biased else None
    a, b = torch.randn(4, 12, requires_grad=True), torch.randn(8, 4, requires_grad=True)
    inputs = [x, a, b] if learned else [a, b]
    plain = with_grads(lambda: F.linear(x, weight, bias) + 0.3 * (x @ a.T @ b.T), inputs)
    assert_equal(with_grads(lambda: low_rank_linear(x, weight, bias, a, b, 0.3), inputs), plain)


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("block", [2, 64])
def test_self_attention(
    qk_norm: bool, kv_heads: int, packed: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module = Attention(16, 4, kv_heads, 6, qk_norm=qk_norm, norm_eps=1e-2)
    for weight in module.parameters():
        torch.nn.init.normal_(weight)
    x = torch.randn(3, 7, 16, requires_grad=True)
    positions = torch.randint(0, 30, (3, 7)) if packed else torch.arange(7).unsqueeze(0)
    monkeypatch.setattr(fused, "QUERY_BLOCK", block)
    rotary = RotaryPositions(6, 30, 100.0)(positions)
    mask = causal_mask(7, 7, x.device).expand(3, 1, 7, 7)
    if packed:
        mask = mask & torch.ones(7, 7, dtype=torch.bool).triu(-2)
    inputs = [x, *module.parameters()]

    def attended() -> Tensor:
        out: Tensor = module(x, mask=additive(mask, x.dtype), rotary=rotary)
        return out

    ours = with_grads(attended, inputs)
    for place in (attention, fused):
        monkeypatch.setattr(place, "should_fuse", lambda x: False)
    assert_equal(ours, with_grads(attended, inputs))


def test_bf16_stays_bf16() -> None:
    torch.manual_seed(0)
    module = Attention(16, 4, 2, 8, qk_norm=True).bfloat16()
    x = torch.randn(2, 7, 16, dtype=torch.bfloat16, requires_grad=True)
    rotary = RotaryPositions(8, 30, 100.0).bfloat16()(torch.arange(7).unsqueeze(0))
    mask = additive(causal_mask(7, 7, x.device).expand(2, 1, 7, 7), x.dtype)
    out = module(RMSNorm(16, eps=1e-6).bfloat16()(x), mask=mask, rotary=rotary)
    swiglu(out).sum().backward()
    assert out.dtype == torch.bfloat16
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_only_what_a_causal_mask_hides_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "QUERY_BLOCK", 3)
    causal = additive(causal_mask(8, 8, torch.device("cpu")).expand(2, 1, 8, 8), torch.float32)
    assert fused._blocks(causal, 8) == [(0, 3, 3), (3, 6, 6), (6, 8, 8)]
    causal[1, 0, 2, 7] = 0.0  # one query that sees ahead
    assert fused._blocks(causal, 8) == [(0, 8, 8)]
