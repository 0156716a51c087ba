"""The decoder: causal, packed as alone, padded as unpadded, cached as uncached."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from components.config.model_settings import DecoderModelConfig
from components.config.params import load_params
from components.models.attention import Attention, KVCache
from components.models.decoder import Decoder, DecoderConfig

CONFIG = DecoderConfig(
    vocab_size=61, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=48, max_seq_len=64
)


@pytest.fixture(params=[False, True], ids=["llama", "qwen3"])
def model(request: pytest.FixtureRequest) -> Decoder:
    torch.manual_seed(0)
    made = Decoder(replace(CONFIG, qk_norm=request.param)).eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3 + (weight.dim() == 1))
    return made


def ids(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grad", [True, False])
def test_decoder_ignores_future_tokens(model: Decoder, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        first, second = ids(2, 20), ids(2, 20)
        second[:, 11:] = ids(2, 9, seed=2)
        a, b = model(first).detach(), model(second).detach()
    assert_close(a[:, :11], b[:, :11])
    assert not torch.allclose(a[:, 11:], b[:, 11:], atol=1e-2)


def test_training_and_inference_give_the_same_logits(model: Decoder) -> None:
    """Training on a CPU takes a path of its own (fused.py)."""
    segments = torch.tensor([[1] * 7 + [2] * 80 + [3] * 10]).expand(2, -1)[:, :60]
    with torch.no_grad():
        expected = model(ids(2, 60), segment_ids=segments)
    assert_close(model(ids(2, 60), segment_ids=segments).detach(), expected)


@pytest.mark.parametrize("grad", [True, False])
def test_packed_documents_are_read_as_if_alone(model: Decoder, grad: bool) -> None:
    parts = [ids(1, length, seed) for seed, length in enumerate((7, 13, 5))]
    segments = torch.cat([torch.full((1, part.shape[1]), number) for number, part in enumerate(parts)], dim=1)
    positions = torch.cat([torch.arange(part.shape[1]).unsqueeze(0) for part in parts], dim=1)
    with torch.set_grad_enabled(grad):
        packed = model(torch.cat(parts, dim=1), segment_ids=segments, position_ids=positions).detach()
        alone = torch.cat([model(part).detach() for part in parts], dim=1)
    assert_close(packed, alone)


def test_padding_changes_nothing(model: Decoder) -> None:
    text = ids(1, 9)
    padded = torch.cat([ids(1, 6, seed=5), text], dim=1)
    mask = torch.arange(15).unsqueeze(0) >= 6
    positions = (torch.arange(15) - 6).clamp(min=0).unsqueeze(0)
    assert_close(model(padded, position_ids=positions, attention_mask=mask)[:, 6:], model(text))


@torch.no_grad()
def test_cached_equals_uncached(model: Decoder) -> None:
    text = ids(3, 17)
    cache = model.new_cache(3, 17)
    pieces = [model(text[:, start:stop], cache=cache) for start, stop in ((0, 8), (8, 9), (9, 14), (14, 17))]
    assert_close(torch.cat(pieces, dim=1), model(text))
    assert cache.length == 17


@torch.no_grad()
def test_a_cache_keeps_the_rows_it_is_told(model: Decoder) -> None:
    text = ids(3, 10)
    cache = model.new_cache(3, 10)
    model(text[:, :6], cache=cache)
    cache.keep(torch.tensor([2, 0]))
    assert_close(model(text[[2, 0], 6:], cache=cache), model(text)[[2, 0], 6:])


@torch.no_grad()
def test_a_whole_mask_replaces_the_causal_rule(model: Decoder) -> None:
    text, everything = ids(2, 8), torch.ones(2, 8, 8, dtype=torch.bool)
    assert_close(model(text, attention_mask=everything.tril()), model(text))
    seen = model(text, attention_mask=everything)
    assert not torch.allclose(seen[:, 0], model(text)[:, 0], atol=1e-2)
    assert_close(model(text, attention_mask=torch.zeros(2, 8, 8)), seen)


@pytest.mark.parametrize("grad", [True, False])
def test_asking_for_some_rows_gives_those_of_all(model: Decoder, grad: bool) -> None:
    rows = torch.tensor([3, 0, 19, 25])
    with torch.set_grad_enabled(grad):
        some, every = model.hidden(ids(2, 14), rows=rows), model.hidden(ids(2, 14))
    assert_close(some.detach(), every.detach().flatten(0, 1)[rows])


def test_long_sequences_take_the_other_kernel_to_the_same_result(
    model: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad():
        expected = model(ids(2, 30))
        monkeypatch.setattr("components.models.attention.SHORT", 10)
        assert_close(model(ids(2, 30)), expected)


def test_tied_embeddings_are_one_matrix() -> None:
    tied = Decoder(replace(CONFIG, tie_embeddings=True))
    assert tied.head.weight is tied.embed.weight
    assert Decoder(CONFIG).num_parameters - tied.num_parameters == 61 * 32


def test_equal_random_states_give_equal_weights() -> None:
    torch.manual_seed(3)
    first = Decoder(CONFIG)
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), Decoder(CONFIG).parameters(), strict=True))


def test_an_untrained_model_guesses_evenly() -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(
            Decoder(CONFIG)(ids(8, 60)).flatten(0, 1), ids(8, 60, seed=9).flatten()
        )
    assert abs(float(loss) - torch.log(torch.tensor(61.0))) < 0.05


def test_the_configuration_of_params_is_that_of_the_decoder() -> None:
    given = load_params(Path(__file__).parents[2] / "params.yaml").model.decoder.model_dump()
    values = {key: value for key, value in vars(CONFIG).items() if key in given}
    assert DecoderConfig.from_params(DecoderModelConfig(**{**given, **values}), vocab_size=61) == CONFIG


def test_cross_attention_reads_its_context() -> None:
    """Against torch's own, with one query head per key head."""
    torch.manual_seed(0)
    module = Attention(16, 2, 2, 8)
    reference = torch.nn.MultiheadAttention(16, 2, bias=False, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(module.qkv.weight)
        reference.out_proj.weight.copy_(module.out.weight)
        x, context = torch.randn(3, 5, 16), torch.randn(3, 9, 16)
        assert_close(module(x, context=context), reference(x, context, context)[0])


def test_self_attention_without_a_mask_sees_everything() -> None:
    torch.manual_seed(0)
    module = Attention(16, 2, 1, 8)
    x = torch.randn(3, 5, 16)
    assert_close(module(x).detach(), module(x, context=x).detach())


@torch.no_grad()
def test_a_new_cache_has_the_dtype_of_the_weights() -> None:
    cache = Decoder(CONFIG).bfloat16().new_cache(2, 8)
    assert isinstance(cache, KVCache)
    assert cache.layers[0].keys.dtype == torch.bfloat16
