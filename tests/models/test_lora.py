"""LoRA on every family: no change at first, only its pairs are trained, and merged it is a plain model again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from components.models.checkpoint import load_model, save_model
from components.models.decoder import Decoder, DecoderConfig
from components.models.encoder import Classifier, EncoderConfig
from components.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from components.models.lora import LowRankLinear, add_lora, merge_lora, quantize_base

IDS = torch.randint(0, 61, (3, 12), generator=torch.Generator().manual_seed(1))
MASK = torch.arange(12) < torch.tensor([[12], [9], [5]])


def decoder() -> Decoder:
    shape = {"embed_dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    return Decoder(DecoderConfig(vocab_size=61, hidden_dim=48, max_seq_len=64, qk_norm=True, **shape))


def classifier() -> Classifier:
    labels = ("a", "b", "c")
    shape = {"vocab_size": 61, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "hidden_dim": 48, "max_seq_len": 64}
    return Classifier(EncoderConfig(labels=labels, **shape))


def encoder_decoder(gated: bool) -> EncoderDecoder:
    shape = {"embed_dim": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "head_dim": 8}
    return EncoderDecoder(EncoderDecoderConfig(vocab_size=61, hidden_dim=48, max_seq_len=64, gated=gated, **shape))


def logits(model: nn.Module) -> Tensor:
    if isinstance(model, EncoderDecoder):
        return model(IDS, IDS.flip(1), attention_mask=MASK)
    return model(IDS, attention_mask=MASK) if isinstance(model, Classifier) else model(IDS)


@pytest.fixture(
    params=[decoder, classifier, lambda: encoder_decoder(True), lambda: encoder_decoder(False)],
    ids=["decoder", "classifier", "encoder-decoder", "relu"],
)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    make: Callable[[], nn.Module] = request.param
    return make().eval()


def stir(model: nn.Module) -> None:
    """Give every pair of low rank something to add."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("lora_b"):
                weight.normal_(std=0.3)


def assert_close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grad", [True, False])
def test_lora_at_zero_equals_the_base(model: nn.Module, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        base = logits(model).detach()
        add_lora(model, rank=4, alpha=8.0)
        assert torch.equal(logits(model).detach(), base)


def test_every_product_of_a_block_learns_and_nothing_else(model: nn.Module) -> None:
    add_lora(model, rank=4, alpha=8.0)
    products = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    assert len(products) == sum(1 for name, _ in model.named_modules() if name.endswith(("qkv", "out", "down", "up")))
    learned = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert learned == {name for name, _ in model.named_parameters() if "lora" in name}
    stir(model)
    logits(model).square().mean().backward()
    for name, weight in model.named_parameters():
        assert (weight.grad is not None and bool(weight.grad.any())) == (name in learned), name


def test_merged_equals_unmerged(model: nn.Module, tmp_path: Path) -> None:
    before, names = logits(model).detach(), [name for name, _ in model.named_parameters()]
    add_lora(model, rank=4, alpha=8.0)
    stir(model)
    unmerged = logits(model).detach()
    assert not torch.allclose(before, unmerged, atol=1e-2)
    merge_lora(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(weight.requires_grad for weight in model.parameters())
    assert_close(logits(model).detach(), unmerged)
    save_model(model, tmp_path / "model")
    assert_close(logits(load_model(tmp_path / "model").eval()).detach(), unmerged)


def test_each_part_of_a_fused_product_has_a_pair_of_its_own() -> None:
    """(alpha / rank) B A x, held to the formula on queries alone."""
    model = decoder()
    add_lora(model, rank=3, alpha=6.0)
    stir(model)
    product = model.get_submodule("blocks.0.attention.qkv")
    assert isinstance(product, LowRankLinear)
    x = torch.randn(5, 32)
    plain = x @ product.weight[:32].T
    assert_close(product.some(x, 0, 1), plain + 2.0 * x @ product.lora_a[:3].T @ product.lora_b[:32].T)
    assert_close(product.some(x, 1, 3), product(x)[:, 32:])
    with torch.no_grad():  # as it is served, where training has a function of its own
        assert_close(product(x), torch.cat([product.some(x, part, part + 1) for part in range(3)], -1))


def test_a_new_head_may_go_on_learning_whole() -> None:
    model = classifier()
    add_lora(model, rank=2, alpha=2.0, modules=("pooler", "head"))
    whole = {name for name, weight in model.named_parameters() if weight.requires_grad and "lora" not in name}
    assert whole == {"pooler.weight", "pooler.bias", "head.weight", "head.bias"}


@pytest.mark.parametrize(("kind", "error"), [("nf4", 0.15), ("int8", 0.02)])
def test_a_quantized_base_computes_nearly_the_same_and_only_its_pairs_learn(kind: Any, error: float) -> None:
    """On a CPU, where bitsandbytes computes too, only slowly."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    shape = {"embed_dim": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    model = Decoder(DecoderConfig(vocab_size=61, hidden_dim=128, max_seq_len=64, **shape)).bfloat16()
    add_lora(model, rank=4, alpha=8.0)
    stir(model)
    size = sum(weight.nbytes for weight in model.blocks.parameters() if not weight.requires_grad)
    before = logits(model).float()
    quantize_base(model, kind)
    assert sum(weight.nbytes for weight in model.blocks.parameters() if not weight.requires_grad) < 0.6 * size
    after = model(IDS)
    assert (after.float() - before).norm() < error * before.norm()
    after.float().square().mean().backward()
    assert {name for name, weight in model.named_parameters() if weight.grad is not None} == {
        name for name, _ in model.named_parameters() if "lora" in name
    }
