"""Weights laid out or rounded for serving give the products they did, and rounding is refused where it shows."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from components.config.params import InputError
from components.inference.packed_weights import PackedLinear, RoundedLinear, pack, round_checked
from components.models.decoder import Decoder, DecoderConfig

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
def test_zeros_round_to_zeros() -> None:
    assert torch.equal(RoundedLinear(torch.zeros(8, 8))(torch.zeros(4, 8)), torch.zeros(4, 8))


@torch.inference_mode()
def test_packed_model_is_the_model() -> None:
    ids = torch.randint(0, 61, (3, 20), generator=torch.Generator().manual_seed(1))
    plain, packed = model(0.3), model(0.3)
    pack(packed)
    torch.testing.assert_close(packed(ids), plain(ids), rtol=1e-4, atol=1e-4)


def test_rounding_is_refused_where_it_changes_the_answers() -> None:
    sequences = [list(range(1, 40)), list(range(20, 60))]
    assert round_checked(model(0.3), sequences, 0.8) > 0.8
    with pytest.raises(InputError, match=r"serve\.int8: quantized, the model chooses the same token in \d"):
        round_checked(model(0.3), sequences, 1.01)
