"""Weights laid out or rounded for serving give the products they did, and rounding is refused where it shows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from components.config.params import InputError
from components.inference import packed_weights, served_model
from components.inference.packed_weights import (
    PackedLinear,
    RoundedLinear,
    agreement,
    pack,
    packs_fp16,
    packs_int8,
    round_checked,
    round_weights,
)
from components.inference.served_model import load_served
from components.models.decoder import Decoder, DecoderConfig
from components.tokenization.hf_tokenizer import load_chat_tokenizer
from tests.feedback.project import write_project

CONFIG = DecoderConfig(61, 32, 2, 4, 2, 8, 48, 64, qk_norm=True)


def model(scale: float) -> Decoder:
    torch.manual_seed(0)
    made = Decoder(CONFIG).eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(torch.randn_like(weight) * scale + (weight.dim() == 1))
    return made


@torch.inference_mode()
def test_products_are_those_of_the_plain_weight() -> None:
    weight, x = torch.randn(48, 32), torch.randn(2, 7, 32)
    plain = F.linear(x, weight)
    torch.testing.assert_close(PackedLinear(weight)(x), plain)
    rounded = RoundedLinear(weight)(x)
    assert rounded.shape == plain.shape
    assert (rounded - plain).norm() < 0.02 * plain.norm()


@torch.inference_mode()
def test_biases_are_added() -> None:
    weight, bias, x = torch.randn(48, 32), torch.randn(48), torch.randn(8, 32)
    plain = F.linear(x, weight, bias)
    torch.testing.assert_close(PackedLinear(weight, bias)(x), plain)
    assert (RoundedLinear(weight, bias)(x) - plain).norm() < 0.02 * plain.norm()


@pytest.mark.parametrize("shape", [(4, 576), (36, 576), (100, 576), (1, 20, 576), (5, 60, 576), (1, 600, 576)])
@torch.inference_mode()
def test_packed_in_bf16_a_row_has_its_bits_alone_and_beside_others(shape: tuple[int, ...]) -> None:
    weight, x = torch.randn(576, 576).bfloat16(), torch.randn(shape).bfloat16()
    packed = PackedLinear(weight)
    product = packed(x)
    torch.testing.assert_close(product, F.linear(x, weight))
    alone = [packed(part) for part in torch.split(x.view(-1, 576), 4)] if len(shape) == 2 else None
    alone = alone or [packed(part.unsqueeze(0)) for part in torch.split(x.view(-1, 576), 20)]
    assert torch.equal(torch.cat([part.view(-1, 576) for part in alone]), product.view(-1, 576))


@pytest.mark.parametrize("fine", [False, True])
@torch.inference_mode()
def test_rounded_a_row_has_its_bits_alone_and_beside_others(fine: bool) -> None:
    rounded, x = RoundedLinear(torch.randn(48, 96)), torch.randn(9, 96)
    rounded.fine = fine
    product = rounded(x)
    assert all(torch.equal(rounded(part), product[start : start + len(part)]) for start, part in parts_of(x))


def parts_of(x: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    return [(start, x[start : start + size]) for size in (1, 2, 3, 5) for start in range(len(x) - size + 1)]


@torch.inference_mode()
def test_inputs_of_15_bits_leave_the_error_of_the_weights() -> None:
    weight, x = torch.randn(48, 96), torch.randn(8, 96) * torch.logspace(0, 2, 96)
    rounded = RoundedLinear(weight)
    scale = weight.abs().amax(1, keepdim=True) / 127
    of_weights = F.linear(x, (weight / scale).round() * scale)
    assert (rounded(x) - of_weights).norm() > 5e-3 * of_weights.norm()
    rounded.fine = True
    assert (rounded(x) - of_weights).norm() < 5e-4 * of_weights.norm()


@pytest.mark.skipif(not packs_int8(), reason="oneDNN's int8 products are not exact here")
@torch.inference_mode()
def test_int8_products_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of processors without VNNI, whose products saturate."""
    weight, bias, x = torch.randn(48, 96), torch.randn(48), torch.randn(8, 96)
    packed = RoundedLinear(weight, bias)
    monkeypatch.setattr(packed_weights, "packs_int8", lambda: False)
    plain = RoundedLinear(weight, bias)
    for packed.fine in (False, True):
        plain.fine = packed.fine
        torch.testing.assert_close(packed(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not packs_fp16(), reason="FBGEMM is not here")
@torch.inference_mode()
def test_in_fp16_the_weights_alone_are_rounded() -> None:
    weight, bias, x = torch.randn(48, 96), torch.randn(48), torch.randn(9, 96)
    packed = PackedLinear(weight, bias, torch.float16)
    product = packed(x)
    torch.testing.assert_close(product, F.linear(x, weight.half().float(), bias), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(packed(part), product[start : start + len(part)]) for start, part in parts_of(x))


@torch.inference_mode()
def test_zeros_round_to_zeros() -> None:
    for rounded in (RoundedLinear(torch.zeros(8, 8)), RoundedLinear(torch.randn(8, 8))):
        for rounded.fine in (False, True):
            assert torch.equal(rounded(torch.zeros(4, 8)), torch.zeros(4, 8))


@torch.inference_mode()
def test_packed_model_is_the_model() -> None:
    ids = torch.randint(0, 61, (3, 20), generator=torch.Generator().manual_seed(1))
    plain, packed = model(0.3), model(0.3)
    pack(packed)
    torch.testing.assert_close(packed(ids), plain(ids), rtol=1e-4, atol=1e-4)


def test_inputs_get_15_bits_where_8_change_too_many_tokens() -> None:
    sequences = [list(range(1, 40)), list(range(20, 60))]
    coarse = agreement(model(0.3), sequences, round_weights).share
    finer = model(0.3)
    assert round_checked(finer, sequences, coarse + 0.01) > coarse
    rounded = finer.blocks[0].attention.out
    assert isinstance(rounded, RoundedLinear)
    assert rounded.fine


def test_rounding_is_refused_where_it_changes_the_answers() -> None:
    sequences = [list(range(1, 40)), list(range(20, 60))]
    assert round_checked(model(0.3), sequences, 0.8) > 0.8
    with pytest.raises(InputError, match=r"serve\.int8: quantized, the model chooses the same token in \d"):
        round_checked(model(0.3), sequences, 1.01)


@pytest.mark.skipif(not packs_fp16(), reason="FBGEMM is not here")
def test_a_base_that_is_not_in_bf16_has_weights_in_fp16_where_its_tokens_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_project(tmp_path).start
    monkeypatch.setattr(served_model, "SMALL_MODEL", 0)
    monkeypatch.setattr(served_model, "compute_dtype", lambda *_: torch.float32)
    monkeypatch.setattr(served_model, "threads_for", lambda _: 1)
    assert getattr(load_served(folder, load_chat_tokenizer(folder)).head, "dtype", None) == torch.float16
    monkeypatch.setattr(served_model, "MIN_AGREEMENT", 1.01)
    assert getattr(load_served(folder, load_chat_tokenizer(folder)).head, "dtype", None) != torch.float16
    assert "not in float16, in which it agrees in " in caplog.text
