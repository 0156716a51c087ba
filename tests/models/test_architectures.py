"""Every decoder architecture of the table against `transformers`: folders in and out, logits, training, decoding."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from components.config.params import InputError
from components.inference.batching import Row, generate
from components.models.checkpoint import load_decoder, read_config, save_decoder
from components.models.decoder import Decoder
from components.models.decoder_formats import DECODERS

LENGTH = 40
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    """A configuration of `transformers`, small and with every part at work."""

    kind: str
    values: dict[str, Any] = field(default_factory=dict)
    rope: dict[str, Any] = field(default_factory=dict)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
CASES = {
    "llama": Case("Llama"),
    "llama 3.1": Case("Llama", {"num_key_value_heads": 1}, LLAMA3),
    "llama linear": Case("Llama", {}, {"rope_type": "linear", "factor": 2.5}),
    "llama dynamic": Case("Llama", {}, {"rope_type": "dynamic", "factor": 2.0}),
    "llama yarn": Case("Llama", {}, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
    "llama biases": Case("Llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": Case("Qwen2"),
    "qwen2 windows": Case("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}),
    "qwen2 yarn": Case("Qwen2", {}, {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}),
    "qwen3": Case("Qwen3", {"attention_bias": True}),
    "mistral": Case("Mistral", {"sliding_window": 7}),
    "mistral without window": Case("Mistral", {"sliding_window": None}),
    "ministral": Case(
        "Ministral",
        {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "gemma 3": Case(
        "Gemma3",
        {"sliding_window": 6, "sliding_window_pattern": 3, "query_pre_attn_scalar": 20, "head_dim": 16},
    ),
    "phi 3": Case("Phi3", {"sliding_window": 9}),
    "phi 4 mini": Case(
        "Phi3",
        {"original_max_position_embeddings": 64, "max_position_embeddings": 512, "head_dim": None},
        {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.1, 1.3],
            "long_factor": [2.0, 3.0, 4.0],
            "partial_rotary_factor": 0.75,
        },
    ),
    "smollm3": Case("SmolLM3", {"no_rope_layers": [1, 0, 1]}),
    "olmo 2": Case("Olmo2"),
}


def reference(name: str, folder: Path) -> Any:
    """A randomly initialised model of `transformers`, saved into a folder."""
    case = CASES[name]
    text = "Text" if case.kind == "Gemma3" else ""
    values = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.3,
        **case.values,
    }
    if case.rope:
        values["rope_parameters"] = {"rope_theta": 5000.0, **case.rope}
    if values["head_dim"] is None:
        del values["head_dim"]
    torch.manual_seed(3)
    config = getattr(transformers, f"{case.kind}{text}Config")(**values)
    model = getattr(transformers, f"{case.kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.dim() == 1:  # gains and biases, which start as ones and zeros
                weight.add_(torch.randn_like(weight) * 0.2)
            elif "embed" in key:
                weight.normal_(std=0.5)
    model.save_pretrained(folder)
    return model


def ids(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(1))


def error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative for numbers above 1."""
    assert ours.shape == theirs.shape
    ours, theirs = ours.detach().float(), theirs.detach().float()
    return float(((ours - theirs).abs() / (1 + theirs.abs())).max())


@pytest.fixture(params=list(CASES))
def both(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Decoder]:
    theirs = reference(request.param, tmp_path / "theirs")
    return theirs, load_decoder(tmp_path / "theirs").eval()


def test_the_table_has_a_case_for_each_architecture() -> None:
    assert set(DECODERS) == {f"{case.kind}ForCausalLM" for case in CASES.values()}


def test_logits_are_those_of_transformers(both: tuple[Any, Decoder]) -> None:
    theirs, ours = both
    with torch.no_grad():
        expected = theirs(ids()).logits
        assert error(ours(ids()), expected) < TOLERANCE
    assert error(ours(ids()), expected) < TOLERANCE  # as in training


def test_left_padding(both: tuple[Any, Decoder]) -> None:
    theirs, ours = both
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :9] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = theirs(ids(), attention_mask=mask, position_ids=positions).logits
        got = ours(ids(), position_ids=positions, attention_mask=mask)
    assert error(got[mask.bool()], expected[mask.bool()]) < TOLERANCE


def test_packed_rows_are_rows_of_their_own(both: tuple[Any, Decoder]) -> None:
    theirs, ours = both
    first, second = ids(1, 17), ids(2, 23)[1:]
    segments = torch.tensor([[0] * 17 + [1] * 23])
    positions = torch.cat([torch.arange(17), torch.arange(23)]).unsqueeze(0)
    with torch.no_grad():
        expected = torch.cat([theirs(first).logits, theirs(second).logits], dim=1)
    assert (
        error(ours(torch.cat([first, second], dim=1), segment_ids=segments, position_ids=positions), expected)
        < TOLERANCE
    )


def test_gradients_are_those_of_transformers(both: tuple[Any, Decoder]) -> None:
    theirs, ours = both
    weights = torch.randn(2, LENGTH, 97, generator=torch.Generator().manual_seed(2))
    (theirs(ids()).logits * weights).sum().backward()
    (ours(ids()) * weights).sum().backward()
    embedded = theirs.get_input_embeddings().weight.grad
    assert embedded is not None
    assert ours.embed.weight.grad is not None
    scale = embedded.abs().max()
    assert error(ours.embed.weight.grad / scale, embedded / scale) < TOLERANCE
    norm = theirs.model.norm.weight.grad
    assert error(ours.norm.weight.grad / norm.abs().max(), norm / norm.abs().max()) < TOLERANCE  # type: ignore[operator]


def test_in_bf16(both: tuple[Any, Decoder]) -> None:
    """As far from exact logits as `transformers` is."""
    theirs, ours = both
    with torch.no_grad():
        exact = theirs(ids()).logits
        error = (theirs.bfloat16()(ids()).logits - exact).abs().mean()
        assert (ours.bfloat16()(ids()) - exact).abs().mean() < 1.3 * error


def test_the_engine_writes_what_transformers_writes(both: tuple[Any, Decoder]) -> None:
    """Rows of one batch are at positions of their own, as their windows are."""
    theirs, ours = both
    prompts = [prompt[13 * number :] for number, prompt in enumerate(ids(3).tolist())]
    rows = [Row(prompt, 24) for prompt in prompts]
    generate(ours, rows)
    for row, prompt in zip(rows, prompts, strict=True):
        alone = torch.tensor([prompt])
        expected = theirs.generate(
            alone, attention_mask=torch.ones_like(alone), max_new_tokens=24, do_sample=False, eos_token_id=None
        )
        assert row.ids == expected[0].tolist()


def test_a_folder_goes_out_as_it_came(both: tuple[Any, Decoder], tmp_path: Path) -> None:
    theirs, ours = both
    save_decoder(ours, tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert type(again) is type(theirs)
    with torch.no_grad():
        assert torch.equal(again(ids()).logits, theirs(ids()).logits)
    assert read_config(tmp_path / "ours") == ours.config


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_folder_keeps_its_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    reference("qwen2", tmp_path / "fp32").to(dtype).save_pretrained(tmp_path / "theirs")
    save_decoder(load_decoder(tmp_path / "theirs"), tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert {name: weight.dtype for name, weight in ours.items()} == dict.fromkeys(theirs, dtype)
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("llama", {"rope_parameters": {"rope_type": "magic"}}, "rope_type: 'magic' is not supported"),
        ("llama", {"use_sliding_window": True}, "use_sliding_window: True is not supported"),
        ("llama", {"hidden_act": "relu"}, "hidden_act: 'relu' is not supported"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
        ("gemma 3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping: 30.0 is not supported"),
        ("gemma 3", {"layer_types": ["full_attention"]}, "layer_types: .* each of 3 layers"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers: .* does not name each of 3 layers"),
        ("phi 4 mini", {"rope_parameters": {"rope_type": "longrope"}}, "short_factor: None is not a list of 4"),
        ("olmo 2", {"num_attention_heads": 0}, "num_attention_heads 0 .* must be positive"),
    ],
)
def test_what_is_not_computed_is_refused_by_field_and_value(
    name: str, values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    reference(name, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | values))
    with pytest.raises(InputError, match=message):
        read_config(tmp_path)
