"""Model folders of `transformers` into the registry and out: checked whole, kept as they are, a fault in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from components.config.params import InputError
from components.inference.cache_plan import serving_note
from components.models.checkpoint import load_model, save_model
from components.runtime.files import copy_folder
from components.tokenization.text_tokenizer import TextTokenizer
from components.tracking.model_card import CARD
from components.tracking.model_import import import_model, inspect_model, place_model
from components.tracking.registry import Registry
from loopwright.cli import COMMANDS, app
from tests.tokenization.hf_tokenizers import TEXTS, chatml

SOURCE = Path(__file__).parents[2]
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def decoder(folder: Path) -> Path:
    """A randomly initialised Llama in shards, a few pickles and scripts beside it."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=416, num_key_value_heads=2, max_position_embeddings=128, **SHAPE))
    model.save_pretrained(folder, max_shard_size="40KB")
    (folder / "modeling_own.py").write_text("raise SystemExit('imported code must not run')")
    (folder / "optimizer.pt").write_bytes(b"a pickle")
    return chatml(folder)


def words(folder: Path, special: list[str]) -> Path:
    tokenizer = Tokenizer(models.WordPiece(unk_token=special[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": special[0]}))
    return folder


def encoder(folder: Path) -> Path:
    BertForMaskedLM(BertConfig(vocab_size=128, max_position_embeddings=64, **SHAPE)).save_pretrained(folder)
    return words(folder, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])


def encoder_decoder(folder: Path) -> Path:
    config = T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return words(folder, ["<pad>", "</s>", "<unk>"])


MAKERS: dict[str, Callable[[Path], Path]] = {
    "LlamaForCausalLM": decoder,
    "BertForMaskedLM": encoder,
    "T5ForConditionalGeneration": encoder_decoder,
}
FAMILIES = dict(zip(MAKERS, ("decoder", "encoder", "encoder_decoder"), strict=True))


@pytest.mark.parametrize("architecture", list(MAKERS))
def test_a_folder_is_told_for_what_it_is(architecture: str, tmp_path: Path) -> None:
    found = inspect_model(MAKERS[architecture](tmp_path / "model"))
    assert (found.family, found.architecture) == (FAMILIES[architecture], architecture)
    assert found.parameters > 10_000
    assert found.vocab_size in (128, 416)


@pytest.mark.parametrize("config", [None, {}, {"do_lower_case": False, "model_max_length": 512}])
@pytest.mark.parametrize("make", [encoder, encoder_decoder])
def test_published_folders_say_little_of_their_tokenizer(
    make: Callable[[Path], Path], config: dict[str, Any] | None, tmp_path: Path
) -> None:
    folder = make(tmp_path / "model")
    (folder / "tokenizer_config.json").unlink()
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert inspect_model(folder).vocab_size == 128
    copy = tmp_path / "copy"
    save_model(load_model(folder), copy, folder)  # as what is trained from it is written
    ids = json.loads((copy / "config.json").read_text())
    assert TextTokenizer.load(copy).pad_id == ids["pad_token_id"] == 0
    if make is encoder:
        assert AutoTokenizer.from_pretrained(copy).pad_token_id == 0
    else:
        assert T5ForConditionalGeneration.from_pretrained(copy).generation_config.eos_token_id == 1


def test_an_imported_model_is_registered_and_comes_out_as_it_was(registry: Registry, tmp_path: Path) -> None:
    folder = decoder(tmp_path / "model")
    version = import_model(folder, inspect_model(folder), "stranger", registry)
    assert (str(version), version.aliases) == ("stranger/1", ("champion",))
    assert version.tags["architecture"] == "LlamaForCausalLM"
    copy_folder(version.folder, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()} - {CARD}
    assert {"tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"} < names
    assert not names & {"modeling_own.py", "optimizer.pt"}
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.hidden_size == 32
    again = import_model(folder, inspect_model(folder), "stranger", registry)
    assert (again.aliases, registry.resolve("stranger/1").aliases) == (("champion",), ("previous",))


def test_a_context_beyond_memory_is_told_at_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = decoder(tmp_path)
    assert serving_note(folder, 32, None) is None
    monkeypatch.setattr("components.inference.cache_plan.device_memory", lambda device: 1 << 21)
    holds = "holds 2,048 tokens: 32 requests at once, each of up to 128 tokens, of serve.max_running 32"
    assert holds in str(serving_note(folder, 32, None))
    monkeypatch.setattr("components.inference.cache_plan.device_memory", lambda device: 1 << 14)
    assert str(serving_note(folder, 32, None)).startswith("serve.max_context_tokens: 128: the keys and values of 1")


def test_an_import_moves_no_champion_that_a_gate_chooses(registry: Registry, tmp_path: Path) -> None:
    folder = encoder(tmp_path / "model")
    assert import_model(folder, inspect_model(folder), "classifier", registry).aliases == ()


def test_placing_replaces_what_was_placed_and_no_hidden_file(tmp_path: Path) -> None:
    first, second, place = decoder(tmp_path / "first"), encoder(tmp_path / "second"), tmp_path / "place"
    place.mkdir()
    (place / ".gitkeep").write_text("")
    place_model(first, place, {"version": "a/1"})
    place_model(second, place, {"version": "b/1"})
    assert json.loads((place / "origin.json").read_text()) == {"version": "b/1"}
    names = {path.name for path in place.iterdir()} - {"generation_config.json"}
    assert names == {
        ".gitkeep",
        "origin.json",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_command_checks_the_name_first(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    assert "import" in COMMANDS
    ended = CliRunner().invoke(app, ["import", str(tmp_path), "--name", "a/b"])
    assert isinstance(ended.exception, InputError)
    assert str(ended.exception).startswith("--name: 'a/b': not a valid model name; allowed are 1 to 63 letters")
