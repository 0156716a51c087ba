"""Recomputed activations: the same gradients to the bit, of less memory."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from components.config.model_settings import Checkpointing
from components.models.decoder import Decoder, DecoderConfig
from components.models.encoder import Encoder, EncoderConfig
from components.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from components.models.lora import add_lora
from components.training.activations import checkpoint_blocks, watch_saved

DECODER = DecoderConfig(61, 32, 3, 4, 2, 8, 48, 64, qk_norm=True)
ENCODER = EncoderConfig(61, 32, 3, 4, 64, 64, dropout=0.3, attention_dropout=0.2)
ENCODER_DECODER = EncoderDecoderConfig(61, 32, 2, 2, 4, 8, 48, 64, dropout=0.3)
IDS = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(0))


def decoder() -> tuple[nn.Module, Callable[[], Tensor]]:
    model = Decoder(DECODER)
    return model, lambda: model.hidden(IDS, torch.ones_like(IDS), rows=torch.arange(10, 60))


def adapted() -> tuple[nn.Module, Callable[[], Tensor]]:
    model = Decoder(DECODER)
    add_lora(model, 4, 8.0)
    return model, lambda: model.hidden(IDS, torch.ones_like(IDS))


def encoder() -> tuple[nn.Module, Callable[[], Tensor]]:
    model = Encoder(ENCODER)
    return model, lambda: model.hidden(IDS, attention_mask=IDS > 3)


def encoder_decoder() -> tuple[nn.Module, Callable[[], Tensor]]:
    model = EncoderDecoder(ENCODER_DECODER)
    return model, lambda: model.decode(IDS[:, :20], model.encode(IDS, IDS > 3), IDS > 3)


def passes(model: nn.Module, forward: Callable[[], Tensor]) -> tuple[list[Tensor], int]:
    """Gradients of dropout drawn alike, and bytes that are saved."""
    weights = {weight.untyped_storage() for weight in model.parameters()}
    saved: set[torch.UntypedStorage] = set()
    torch.manual_seed(1)
    with watch_saved(lambda tensor: saved.add(tensor.untyped_storage())):
        out = forward()
    torch.autograd.backward(out.square().sum())
    grads = [weight.grad for weight in model.parameters() if weight.grad is not None]
    model.zero_grad()
    return [out.detach(), *grads], sum(storage.nbytes() for storage in saved - weights)


@pytest.mark.parametrize("make", [decoder, adapted, encoder, encoder_decoder])
def test_recomputing_changes_no_bit_and_saves_less(make: Callable[[], tuple[nn.Module, Callable[[], Tensor]]]) -> None:
    torch.manual_seed(0)
    model, forward = make()
    everything, most = passes(model, forward)
    held = [most]
    order: tuple[Checkpointing, ...] = ("selective", "full")
    for how in order:
        checkpoint_blocks(model, how)
        ours, saved = passes(model, forward)
        assert all(torch.equal(a, b) for a, b in zip(ours, everything, strict=True)), how
        held.append(saved)
    assert held[2] < 0.4 * held[0]
    assert held[2] <= held[1] < held[0]
    checkpoint_blocks(model, "full", whole=1)
    assert held[2] < passes(model, forward)[1] < held[0], "the first block is held whole"
    checkpoint_blocks(model, "none")
    assert passes(model, forward)[1] == most


def test_a_copy_has_blocks_of_its_own() -> None:
    model, forward = decoder()
    checkpoint_blocks(model, "full")
    copied = copy.deepcopy(model)
    nn.init.zeros_(next(copied.blocks[0].parameters()))
    first = passes(model, forward)[0]
    nn.init.zeros_(next(model.blocks[0].parameters()))
    assert not torch.equal(first[0], passes(model, forward)[0][0])


@pytest.mark.filterwarnings("ignore:The .grad attribute", "ignore::DeprecationWarning")
@pytest.mark.parametrize("how", ["selective", "full"])
def test_compiled_blocks_recompute_as_well(how: Checkpointing) -> None:
    torch.manual_seed(0)
    model, forward = decoder()
    expected, most = passes(model, forward)
    checkpoint_blocks(model, how)
    for block in model.blocks:
        block.compile(backend="aot_eager_decomp_partition", fullgraph=True)
    passes(model, forward)
    ours, saved = passes(model, forward)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert saved < most
