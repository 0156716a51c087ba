"""Adapters: PEFT reads what we write and we what it writes; models of one base share its weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

from components.config.params import InputError
from components.models.base_store import BASE, copy_base, read_base, store_base, stored_base
from components.models.checkpoint import load_decoder, load_model, save_model
from components.models.decoder import Decoder, DecoderConfig
from components.models.encoder import Classifier, EncoderConfig, EncoderForPretraining, classifier_from
from components.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from components.models.formats import FORMATS
from components.models.lora import LowRankLinear, add_lora, lora_of, merge_lora
from components.models.weight_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS

# PEFT reads an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
IDS = torch.randint(3, 61, (3, 12), generator=torch.Generator().manual_seed(1))
SHAPE = {"vocab_size": 61, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "hidden_dim": 48, "max_seq_len": 64}


def decoder(architecture: str) -> Decoder:
    qwen, heads = architecture == "Qwen3ForCausalLM", {"num_kv_heads": 2, "head_dim": 8}
    config = DecoderConfig(qk_norm=qwen, architecture=architecture, **heads, **SHAPE)
    if architecture == "Phi3ForCausalLM":  # as transformers writes it: the shape beside its own fields
        source = FORMATS["LlamaForCausalLM"].write(config) | {"model_type": "phi3", "pad_token_id": 0}
        config = replace(config, source=source)
    return Decoder(config)


def encoder() -> EncoderForPretraining:
    return EncoderForPretraining(EncoderConfig(**SHAPE))


def encoder_decoder() -> EncoderDecoder:
    return EncoderDecoder(EncoderDecoderConfig(num_decoder_layers=2, head_dim=8, gated=True, **SHAPE))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS, IDS.flip(1)) if isinstance(model, EncoderDecoder) else model(IDS)


def stir(model: nn.Module) -> None:
    """Give every pair, and every module that is trained fully, something to change."""
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.1)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state folder of a project, and the current folder in that project."""
    for name in ("dvc.yaml", "params.yaml"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOOPWRIGHT_HOME", raising=False)
    return tmp_path / "var"


def adapted(make: Callable[[], nn.Module], home: Path, name: str = "adapter", seed: int = 0) -> tuple[nn.Module, Path]:
    """A model with trained pairs, saved beside its base's folder `base`; classifiers have a new head."""
    torch.manual_seed(seed)
    base = make().eval()
    if not (folder := home.parent / "base").is_dir():
        save_model(base, folder)
    model = classifier_from(base, ("a", "b", "c")).eval() if isinstance(base, EncoderForPretraining) else base
    head = ("pooler", "head") if isinstance(model, Classifier) else ()
    add_lora(model, 4, 12.0, head, store_base(folder, home, "base/1"))
    stir(model)
    save_model(model, home.parent / name)
    return model, home.parent / name


MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "llama": (lambda: decoder("LlamaForCausalLM"), AutoModelForCausalLM),
    "qwen3": (lambda: decoder("Qwen3ForCausalLM"), AutoModelForCausalLM),
    "phi3": (lambda: decoder("Phi3ForCausalLM"), AutoModelForCausalLM),
    "bert": (encoder, AutoModelForSequenceClassification),
    "t5": (encoder_decoder, AutoModelForSeq2SeqLM),
}


@pytest.mark.parametrize("name", MODELS)
def test_peft_computes_what_we_saved(name: str, home: Path) -> None:
    make, auto = MODELS[name]
    model, folder = adapted(make, home)
    options = {"num_labels": 3} if name == "bert" else {}
    theirs = PeftModel.from_pretrained(auto.from_pretrained(home.parent / "base", **options), folder).eval()
    inputs = {"decoder_input_ids": IDS.flip(1)} if name == "t5" else {}
    torch.testing.assert_close(logits(model), theirs(IDS, **inputs).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_adapter_loads_as_the_model_that_was_saved(name: str, home: Path) -> None:
    model, folder = adapted(MODELS[name][0], home)
    again = load_model(folder).eval()
    torch.testing.assert_close(logits(again), logits(model))
    assert lora_of(again) == lora_of(model)
    save_model(again, home.parent / "twice")
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE):
        assert (home.parent / "twice" / file).read_bytes() == (folder / file).read_bytes()
    merge_lora(again)
    save_model(again, home.parent / "merged")
    torch.testing.assert_close(logits(load_model(home.parent / "merged").eval()), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "phi3"])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"o_proj": 3}}],
    ids=["plain", "rank-stabilized", "patterns"],
)
def test_we_compute_what_peft_saved(name: str, options: dict[str, Any], home: Path) -> None:
    save_model(decoder({"llama": "LlamaForCausalLM", "phi3": "Phi3ForCausalLM"}[name]), base := home.parent / "base")
    targets = ["o_proj", "down_proj", *(["q_proj", "gate_proj"] if name == "llama" else ["qkv_proj"])]
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", **options)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    stir(theirs)
    theirs.save_pretrained(home.parent / "adapter")
    shutil.copy(base / "config.json", home.parent / "adapter")
    record = store_base(base, home, "base/1")
    (home.parent / "adapter" / BASE).write_text(json.dumps(vars(record)))
    ours = load_decoder(home.parent / "adapter").eval()
    torch.testing.assert_close(logits(ours), theirs(IDS).logits, rtol=1e-4, atol=1e-4)


def test_peft_finds_the_base_by_itself(home: Path) -> None:
    model, folder = adapted(MODELS["llama"][0], home)
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": str(home.parent / "base")}))
    theirs = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(logits(model), theirs(IDS).logits, rtol=1e-4, atol=1e-4)


def test_models_of_one_base_share_its_weights_and_not_their_pairs(home: Path) -> None:
    make = MODELS["qwen3"][0]
    _, first = adapted(make, home, "first")
    _, second = adapted(make, home, "second")
    one, other = load_decoder(first), load_decoder(second)
    for (name, weight), (_, twin) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert (weight.data_ptr() == twin.data_ptr()) != ("lora" in name), name
    before = logits(other)
    stir(one)
    torch.testing.assert_close(logits(other), before, rtol=0, atol=0)
    assert load_decoder(first, torch.bfloat16).embed.weight.dtype == torch.bfloat16


def test_the_base_is_stored_once_and_by_its_digest(home: Path) -> None:
    _, folder = adapted(MODELS["llama"][0], home)
    stored = stored_base(read_base(folder).weights_sha256, home)
    assert (stored / "model.safetensors").stat().st_ino == (home.parent / "base/model.safetensors").stat().st_ino
    assert store_base(folder, home) == read_base(folder)
    assert [path.name for path in stored.parent.iterdir()] == [stored.name]
    expected = logits(load_model(folder))
    copy_base(folder, folder)  # as a Bento has it
    for path in sorted(stored.rglob("*"), reverse=True):
        path.unlink()
    stored.rmdir()
    assert torch.equal(logits(load_model(folder)), expected)


def spoil(folder: Path, change: Callable[[dict[str, Any]], object], file: str = ADAPTER_CONFIG) -> None:
    values = json.loads((folder / file).read_text())
    change(values)
    (folder / file).write_text(json.dumps(values))


def rename(folder: Path) -> None:
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    save_file({name.replace("layers.1", "layers.7"): each for name, each in tensors.items()}, folder / ADAPTER_WEIGHTS)


def shrink(folder: Path) -> None:
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    cut = {name: each[:, :16].contiguous() if "lora_A" in name else each for name, each in tensors.items()}
    save_file(cut, folder / ADAPTER_WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: spoil(folder, lambda values: values.update(use_dora=True)), "use_dora: True is not supported"),
        (lambda folder: spoil(folder, lambda values: values.update(peft_type="IA3")), "peft_type: 'IA3'"),
        (lambda folder: spoil(folder, lambda values: values.pop("r")), "not a readable adapter configuration"),
        (lambda folder: (folder / ADAPTER_WEIGHTS).write_bytes(b"\x10"), "corrupt"),
        (lambda folder: (folder / ADAPTER_WEIGHTS).unlink(), "pickled weights are refused"),
        (lambda folder: (folder / BASE).unlink(), "does not name the adapter's base"),
        (lambda folder: spoil(folder, lambda v: v.update(weights_sha256="0" * 64), BASE), "not on this machine"),
        (rename, "layers.7.* is no weight of the base; the adapter is of another base"),
        (shrink, "do not fit the base"),
    ],
)
def test_another_adapter_is_refused_in_one_line(damage: Callable[[Path], object], expected: str, home: Path) -> None:
    _, folder = adapted(MODELS["llama"][0], home)
    damage(folder)
    with pytest.raises(InputError, match=expected) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_pair_of_higher_precision_than_its_base_computes_in_that_of_the_base(home: Path) -> None:
    model, folder = adapted(MODELS["llama"][0], home)
    low = load_decoder(folder, torch.bfloat16).eval()
    for module in low.modules():
        if isinstance(module, LowRankLinear):
            module.lora_a.data, module.lora_b.data = module.lora_a.float(), module.lora_b.float()
    assert logits(low).dtype == torch.bfloat16
    torch.testing.assert_close(logits(low).float(), logits(model), rtol=0.05, atol=0.05)
