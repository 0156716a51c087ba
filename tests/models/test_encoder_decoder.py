"""The encoder-decoder against T5 of `transformers`, both ways; cached as uncached, padded as alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from components.config.model_settings import EncoderDecoderModelConfig
from components.config.params import InputError
from components.models.checkpoint import load_model, save_model
from components.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig

TINY = EncoderDecoderConfig(
    vocab_size=83,
    embed_dim=32,
    num_layers=2,
    num_decoder_layers=3,
    num_heads=4,
    head_dim=6,
    hidden_dim=48,
    max_seq_len=64,
    num_buckets=8,
    max_distance=12,
)
VARIANTS = [
    TINY,
    replace(TINY, tie_embeddings=False, scale_outputs=False),
    replace(TINY, gated=False, activation="relu"),
    replace(TINY, tie_embeddings=False, num_buckets=32, max_distance=128, norm_eps=1e-3),
    replace(TINY, scale_outputs=False, activation="silu", start_id=7),
]


def randomised(config: EncoderDecoderConfig, seed: int = 0) -> EncoderDecoder:
    """Weights large enough that every part matters in the logits."""
    torch.manual_seed(seed)
    model = EncoderDecoder(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3 + (weight.dim() == 1))
    return model


def ids(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 83, (batch, length), generator=torch.Generator().manual_seed(seed))


SOURCE, TARGET = ids(3, 19), ids(3, 14, seed=2)
MASK = torch.ones(3, 19, dtype=torch.long)
MASK[0, 12:], MASK[1, :5] = 0, 0


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", VARIANTS)
@torch.no_grad()
def test_transformers_gives_the_logits_of_a_folder_we_saved(config: EncoderDecoderConfig, tmp_path: Path) -> None:
    model = randomised(config)
    save_model(model, tmp_path / "model")
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model").eval()
    assert type(theirs) is T5ForConditionalGeneration
    expected = theirs(input_ids=SOURCE, attention_mask=MASK, decoder_input_ids=TARGET).logits
    assert_close(model(SOURCE, TARGET, attention_mask=MASK), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        {"feed_forward_proj": "gated-silu", "num_decoder_layers": 1, "layer_norm_epsilon": 1e-3},
        {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "d_kv": 8},
    ],
)
@pytest.mark.parametrize("untied", [False, True])
@torch.no_grad()
def test_a_folder_of_transformers_gives_the_same_logits_here(
    changes: dict[str, Any], untied: bool, tmp_path: Path
) -> None:
    values = {
        "vocab_size": 83,
        "d_model": 32,
        "d_kv": 6,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 12,
        "decoder_start_token_id": 0,
    }
    torch.manual_seed(3)
    theirs = T5ForConditionalGeneration(T5Config(**values | changes)).eval()
    if untied:
        theirs.lm_head.weight = torch.nn.Parameter(torch.randn_like(theirs.lm_head.weight))
    theirs.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert isinstance(model, EncoderDecoder)
    assert model.config.tie_embeddings is not untied
    expected = theirs(input_ids=SOURCE, attention_mask=MASK, decoder_input_ids=TARGET).logits
    assert_close(model.eval()(SOURCE, TARGET, attention_mask=MASK), expected)


LATER = {
    "T5 1.1": (T5Config, T5ForConditionalGeneration, {"tie_word_embeddings": False}, True),
    "Flan-T5": (T5Config, T5ForConditionalGeneration, {"tie_word_embeddings": False, "dropout_rate": 0.0}, True),
    "mT5": (MT5Config, MT5ForConditionalGeneration, {"relative_attention_max_distance": 20}, True),
    "mT5 tied": (MT5Config, MT5ForConditionalGeneration, {}, False),
}


def later(name: str, folder: Path) -> Any:
    """A model of T5's later versions, as `transformers` writes it: gated, the head not scaled, mostly of its own."""
    config, kind, values, untied = LATER[name]
    torch.manual_seed(3)
    shape: dict[str, Any] = {"vocab_size": 83, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    model = kind(config(**shape, feed_forward_proj="gated-gelu", decoder_start_token_id=0, **values)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    if untied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", list(LATER))
def test_later_versions_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Logits, gradients, bfloat16 as near to exact, and the folder out again."""
    theirs, given = later(name, tmp_path / "theirs"), {"attention_mask": MASK, "decoder_input_ids": TARGET}
    model = load_model(tmp_path / "theirs").eval()
    assert isinstance(model, EncoderDecoder)
    assert (model.config.scale_outputs, model.config.tie_embeddings) == (False, not LATER[name][3])
    expected, got = theirs(input_ids=SOURCE, **given).logits, model(SOURCE, TARGET, attention_mask=MASK)
    assert_close(got, expected)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5))
    (expected * weights).sum().backward()
    (got * weights).sum().backward()
    gradient = theirs.shared.weight.grad
    assert model.embed.weight.grad is not None
    assert_close(model.embed.weight.grad / gradient.abs().max(), gradient / gradient.abs().max())
    save_model(model, tmp_path / "ours")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "ours").eval()
    assert type(again) is type(theirs)
    with torch.no_grad():
        assert_close(again(input_ids=SOURCE, **given).logits, expected)
        error = (theirs.bfloat16()(input_ids=SOURCE, **given).logits - expected).abs().mean()
        assert (model.bfloat16()(SOURCE, TARGET, attention_mask=MASK) - expected).abs().mean() < 1.3 * error


def test_a_head_that_transformers_4_untied_is_read_unscaled(tmp_path: Path) -> None:
    """There `tie_word_embeddings: false` says both."""
    save_model(randomised(VARIANTS[1]), tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    del config["scale_decoder_outputs"]
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    assert load_model(tmp_path / "model").config == VARIANTS[1]


@pytest.mark.parametrize("config", VARIANTS)
def test_saving_and_loading_keeps_every_bit(config: EncoderDecoderConfig, tmp_path: Path) -> None:
    model = randomised(config)
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert loaded.config == config
    for (name, ours), (_, theirs) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"feed_forward_proj": "gated-mish"}, "feed_forward_proj: 'gated-mish' is not supported; allowed: 'relu'"),
        ({"relative_attention_num_buckets": 2}, "relative_attention_num_buckets: 2 is too few; at least 4"),
        ({"is_decoder": True}, "is_decoder: True is not supported"),
        ({"d_kv": None}, "d_kv is missing"),
    ],
)
def test_a_configuration_we_cannot_run_is_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_model(randomised(TINY), tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | values))
    with pytest.raises(InputError, match=message):
        load_model(tmp_path / "model")


@pytest.fixture(scope="module")
def model() -> EncoderDecoder:
    return randomised(TINY)


@torch.no_grad()
def test_decoding_ignores_future_tokens(model: EncoderDecoder) -> None:
    changed = TARGET.clone()
    changed[:, 9:] = ids(3, 5, seed=8)
    first, second = model(SOURCE, TARGET, MASK), model(SOURCE, changed, MASK)
    assert_close(first[:, :9], second[:, :9])
    assert not torch.allclose(first[:, 9:], second[:, 9:], atol=1e-2)


@torch.no_grad()
def test_padding_changes_nothing(model: EncoderDecoder) -> None:
    """Neither on the right nor on the left: positions are distances."""
    padded = model(SOURCE, TARGET, MASK)
    assert_close(padded[:1], model(SOURCE[:1, :12], TARGET[:1]))
    assert_close(padded[1:2], model(SOURCE[1:2, 5:], TARGET[1:2]))


@torch.no_grad()
def test_cached_equals_uncached(model: EncoderDecoder) -> None:
    context, cache = model.encode(SOURCE, MASK), model.new_cache(3, 14)
    pieces = [
        model.decode(TARGET[:, start:stop], context, MASK, cache=cache)
        for start, stop in ((0, 6), (6, 7), (7, 12), (12, 14))
    ]
    assert_close(torch.cat(pieces, dim=1), model.decode(TARGET, context, MASK))
    assert cache.length == 14


@torch.no_grad()
def test_a_cache_keeps_the_rows_it_is_told_as_often_as_it_is_told(model: EncoderDecoder) -> None:
    rows = torch.tensor([2, 0, 2])
    context, cache = model.encode(SOURCE, MASK), model.new_cache(3, 14)
    model.decode(TARGET[:, :6], context, MASK, cache=cache)
    cache.keep(rows)
    got = model.decode(TARGET[rows, 6:], context[rows], MASK[rows], cache=cache)
    assert_close(got, model.decode(TARGET, context, MASK)[rows, 6:])


@pytest.mark.parametrize("grad", [True, False])
def test_asking_for_some_rows_gives_those_of_all(model: EncoderDecoder, grad: bool) -> None:
    rows = torch.tensor([3, 0, 19, 25])
    with torch.set_grad_enabled(grad):
        context = model.encode(SOURCE, MASK)
        some = model.decode(TARGET, context, MASK, rows=rows)
        assert_close(some.detach(), model.decode(TARGET, context, MASK).detach().flatten(0, 1)[rows])


def test_every_weight_learns(model: EncoderDecoder) -> None:
    model(SOURCE, TARGET, MASK).square().mean().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters())
    model.zero_grad()


def test_dropout_is_for_training_alone() -> None:
    model = randomised(replace(TINY, dropout=0.2))
    assert torch.equal(model(SOURCE, TARGET), model(SOURCE, TARGET))
    model.train()
    assert not torch.equal(model(SOURCE, TARGET), model(SOURCE, TARGET))


@torch.no_grad()
def test_an_untrained_model_guesses_nearly_evenly() -> None:
    torch.manual_seed(0)
    for tied in (True, False):
        model = EncoderDecoder(replace(TINY, vocab_size=500, embed_dim=128, tie_embeddings=tied, scale_outputs=tied))
        loss = torch.nn.functional.cross_entropy(model(SOURCE, TARGET).flatten(0, 1), ids(3, 14, seed=9).flatten())
        assert float(loss) < 1.3 * float(torch.log(torch.tensor(500.0)))


def test_the_configuration_of_params_is_that_of_the_encoder_decoder() -> None:
    keys = EncoderDecoderModelConfig.model_fields
    params = EncoderDecoderModelConfig(**{key: value for key, value in vars(TINY).items() if key in keys})
    made = EncoderDecoderConfig.from_params(params, vocab_size=83)
    assert replace(made, num_buckets=8, max_distance=12) == TINY
