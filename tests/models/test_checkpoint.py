"""Our folders in transformers and theirs in ours: the same logits, both formats."""

from __future__ import annotations

import json
import resource
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from components.config.params import InputError
from components.models.attention import FusedLinear
from components.models.checkpoint import load_decoder, read_config, save_decoder, save_model
from components.models.decoder import Decoder, DecoderConfig
from components.models.weight_files import weights_digest

TINY = DecoderConfig(
    vocab_size=97, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=48, max_seq_len=64
)
SHAPES = [
    pytest.param(
        replace(TINY, qk_norm=qk, tie_embeddings=tie, num_kv_heads=kv, head_dim=dim), id=f"{qk}-{tie}-{kv}-{dim}"
    )
    for qk, tie, kv, dim in [
        (False, False, 4, 8),
        (False, True, 2, 8),
        (True, False, 2, 16),
        (True, True, 1, 8),
    ]
]


def randomised(config: DecoderConfig, seed: int = 0) -> Decoder:
    """Weights large enough that every part matters in the logits."""
    torch.manual_seed(seed)
    model = Decoder(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3 + (weight.dim() == 1))
    return model


def ids(batch: int = 3, length: int = 17) -> torch.Tensor:
    return torch.randint(0, TINY.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", SHAPES)
def test_transformers_gives_the_logits_of_a_folder_we_saved(config: DecoderConfig, tmp_path: Path) -> None:
    model = randomised(config)
    save_decoder(model, tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM")
    with torch.no_grad():
        torch.testing.assert_close(model(ids()), theirs(ids()).logits, rtol=1e-4, atol=1e-4)


def their_model(kind: str, **changes: Any) -> Any:
    classes: dict[str, Any] = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
    config_class, model_class = classes[kind]
    values = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "initializer_range": 0.3,
    }
    torch.manual_seed(3)
    return model_class(config_class(**values | changes)).eval()


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True, "num_key_value_heads": 4}, {"rms_norm_eps": 1e-2}]
)
def test_a_folder_of_transformers_gives_the_same_logits_here(
    kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    theirs = their_model(kind, **changes)
    theirs.save_pretrained(tmp_path)
    ours = load_decoder(tmp_path)
    assert ours.config.rope_theta == 5000.0
    with torch.no_grad():
        torch.testing.assert_close(ours(ids()), theirs(ids()).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_padding_gives_the_logits_of_transformers(kind: str, tmp_path: Path) -> None:
    theirs = their_model(kind)
    theirs.save_pretrained(tmp_path)
    mask = torch.ones(3, 17, dtype=torch.long)
    mask[0, :5], mask[1, :9] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = theirs(ids(), attention_mask=mask, position_ids=positions).logits
        got = load_decoder(tmp_path)(ids(), position_ids=positions, attention_mask=mask)
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)


def test_a_sharded_folder_loads(tmp_path: Path) -> None:
    theirs = their_model("qwen3")
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with torch.no_grad():
        torch.testing.assert_close(load_decoder(tmp_path)(ids()), theirs(ids()).logits, rtol=1e-4, atol=1e-4)


def test_a_large_model_is_written_as_shards_that_both_read(tmp_path: Path) -> None:
    model = randomised(TINY)
    save_model(model, tmp_path / "model", shard_bytes=20_000)
    names = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(names) > 3
    assert names == [f"model-{number + 1:05d}-of-{len(names):05d}.safetensors" for number in range(len(names))]
    assert all((tmp_path / "model" / name).stat().st_size < 22_000 for name in names)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids()), theirs(ids()).logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(load_decoder(tmp_path / "model")(ids()), model(ids()))
    whole = weights_digest(tmp_path / "model")
    (tmp_path / "model" / names[1]).write_bytes(b"")
    assert weights_digest(tmp_path / "model") != whole


@pytest.mark.parametrize("config", SHAPES)
def test_saving_and_loading_keeps_every_bit(config: DecoderConfig, tmp_path: Path) -> None:
    model = randomised(config)
    save_decoder(model, tmp_path / "model")
    loaded = load_decoder(tmp_path / "model")
    assert loaded.config == config
    for (name, ours), (_, theirs) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert loaded.head.weight.data_ptr() == loaded.embed.weight.data_ptr() or not config.tie_embeddings


def test_loading_in_bf16_rounds_the_weights(tmp_path: Path) -> None:
    model = randomised(TINY)
    save_decoder(model, tmp_path / "model")
    loaded = load_decoder(tmp_path / "model", dtype=torch.bfloat16)
    assert torch.equal(loaded.embed.weight, model.embed.weight.bfloat16())
    assert loaded.positions.cos.dtype == torch.bfloat16


def test_fused_products_are_saved_apart(tmp_path: Path) -> None:
    model = randomised(TINY)
    save_decoder(model, tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    qkv = model.blocks[0].get_submodule("attention.qkv")
    assert isinstance(qkv, FusedLinear)
    parts = [weights[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(torch.cat(parts), qkv.weight)


def test_saving_replaces_the_old_folder_and_leaves_nothing_else(tmp_path: Path) -> None:
    save_decoder(randomised(TINY, seed=1), tmp_path / "model", files={"old.txt": "old"})
    model = randomised(TINY, seed=2)
    save_decoder(model, tmp_path / "model", files={"agent.json": "{}"})
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    names = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert names == ["agent.json", "config.json", "generation_config.json", "model.safetensors"]
    assert torch.equal(load_decoder(tmp_path / "model").embed.weight, model.embed.weight)


def test_saving_where_no_folder_can_be_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/model: cannot be written: File exists"):
        save_decoder(randomised(TINY), tmp_path / "file/model")


def test_on_a_full_disk_the_old_folder_stays(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk's end: writing fails half-way, as there."""
    old = randomised(TINY, seed=1)
    save_decoder(old, tmp_path / "model")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(InputError, match="model: cannot be written: File too large; free space"):
            save_decoder(randomised(TINY, seed=2), tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert torch.equal(load_decoder(tmp_path / "model").embed.weight, old.embed.weight)


def test_what_a_killed_save_left_goes_with_the_next(tmp_path: Path) -> None:
    (tmp_path / ".model-abc/model").mkdir(parents=True)
    save_decoder(randomised(TINY), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_decoder(randomised(TINY), tmp_path / "model")
    return tmp_path / "model"


def change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_a_missing_tensor_is_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(
        InputError, match=r"model: 1 tensors missing: model\.layers\.1\.mlp\.up_proj\.weight; the weights"
    ):
        load_decoder(folder)


def test_unknown_tensors_are_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    extra = {f"model.layers.{n}.self_attn.q_proj.bias": torch.zeros(32) for n in range(4)}
    save_file(weights | extra, folder / "model.safetensors")
    with pytest.raises(
        InputError, match=r"4 tensors unknown: model\.layers\.0\.self_attn\.q_proj\.bias, .*, \.\.\.; the"
    ):
        load_decoder(folder)


def test_a_tensor_of_another_shape_is_named(folder: Path) -> None:
    change(folder, vocab_size=96)
    with pytest.raises(InputError, match=r"model\.embed_tokens\.weight: shape \(97, 32\) does not fit config\.json"):
        load_decoder(folder)


@pytest.mark.parametrize("cut", [3, 40, 2000])
def test_a_corrupt_file_is_named(folder: Path, cut: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(InputError, match=r"model\.safetensors: corrupt: .*; fetch or train it again"):
        load_decoder(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    their_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    next(iter(sorted(tmp_path.glob("*.safetensors")))).unlink()
    with pytest.raises(InputError, match=r"00001-of-.*\.safetensors: not found; the folder is incomplete"):
        load_decoder(tmp_path)


def test_pickles_are_refused(folder: Path) -> None:
    shutil.move(folder / "model.safetensors", folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickled weights are refused; convert them to safetensors"):
        load_decoder(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "architectures: GPT2LMHeadModel is not supported; one of LlamaForCausalLM, Qwen2For",
        ),
        ({"rope_parameters": {"rope_type": "magic"}}, "rope_type: 'magic' is not supported; allowed: 'default'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "config.json: factor is missing"),
        ({"hidden_act": "relu"}, "hidden_act: 'relu' is not supported; allowed: 'silu'"),
        ({"attention_bias": "some"}, "attention_bias: 'some' is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window: True is not supported"),
        ({"hidden_size": "wide"}, "hidden_size: 'wide' is not a whole number"),
        ({"rope_theta": [1], "rope_parameters": None}, r"rope_theta: \[1\] is not a number"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: quantized weights are not supported"),
        ({"architectures": ["BertForMaskedLM"]}, "architecture BertForMaskedLM is no decoder; one of LlamaFor"),
    ],
)
def test_a_configuration_we_cannot_run_is_refused(folder: Path, values: dict[str, Any], message: str) -> None:
    change(folder, **values)
    with pytest.raises(InputError, match=message):
        read_config(folder)


def test_a_folder_without_a_model_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"config\.json: not found; a model folder has config\.json and model\.safetensors"
    ):
        load_decoder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="not a readable model configuration"):
        load_decoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(InputError, match="num_attention_heads is missing"):
        load_decoder(tmp_path)
