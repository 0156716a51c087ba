"""What `loopwright import` refuses: one line that names the place, and nothing of it stays."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from typer.testing import CliRunner

from components.config.params import InputError
from components.models.gguf_export import pack_gguf
from components.tokenization.gguf_tokenizer import pack_tokenizer
from loopwright.cli import app
from tests.models.test_architectures import reference
from tests.models.test_gguf import byte_level
from tests.tracking.test_model_import import SOURCE, decoder, encoder, encoder_decoder, words

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
QUERY = "encoder.block.1.layer.0.SelfAttention.q.weight"
Spoil = Callable[[Path], Path | None]


def change(**values: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return spoil


def weights(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    """Edit the weights of a folder, in one file then."""

    def spoil(folder: Path) -> None:
        tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        edit(tensors)
        for file in folder.glob("model*"):
            file.unlink()
        save_file(tensors, folder / "model.safetensors")

    return spoil


def remove(name: str) -> Spoil:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).write_text(text)

    return spoil


def pickled(folder: Path) -> None:
    shutil.move(folder / "model.safetensors", folder / "pytorch_model.bin")


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def add_tokens(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([f"more{number}" for number in range(200)])
    tokenizer.save(str(folder / "tokenizer.json"))


def gguf_model(folder: Path) -> Path:
    reference("llama", folder)
    byte_level(folder)
    return folder


def cut_gguf(folder: Path) -> Path:
    target = folder / "cut.gguf"
    pack_gguf(folder, target, "f16", partial(pack_tokenizer, folder))
    target.write_bytes(target.read_bytes()[:-5000])
    return target


def unknown_type(folder: Path) -> Path:
    target = folder / "odd.gguf"
    writer = GGUFWriter(target, "llama")
    for add in (writer.add_embedding_length, writer.add_feed_forward_length, writer.add_context_length):
        add(32)
    for add in (writer.add_head_count, writer.add_block_count):
        add(1)
    writer.add_layer_norm_rms_eps(1e-5)
    odd = GGMLQuantizationType.IQ4_NL
    writer.add_tensor("token_embd.weight", np.zeros((8, 18), np.uint8), raw_dtype=odd)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return target


CASES: dict[str, tuple[Callable[[Path], Path], Spoil, str]] = {
    "no configuration": (decoder, remove("config.json"), r"config\.json: not found; a model folder has config"),
    "broken configuration": (decoder, write("config.json", "{"), r"config\.json: not a readable model configuration"),
    "unknown architecture": (
        encoder,
        change(architectures=["DebertaForMaskedLM"]),
        r"config\.json: architectures: DebertaForMaskedLM is not supported; one of LlamaForCausalLM",
    ),
    "wider": (decoder, change(hidden_size=64), r"shape \(.*\) does not fit config\.json, which asks for \("),
    "wider feed-forward": (encoder_decoder, change(d_ff=64), r"shape \(48, 32\) does not fit config\.json"),
    "larger vocabulary": (decoder, change(vocab_size=500), r"embed_tokens\.weight: shape \(416, 32\) does not fit"),
    "heads that do not divide": (decoder, change(num_key_value_heads=3, head_dim=None), r"does not fit|cannot be made"),
    "more layers": (decoder, change(num_hidden_layers=3), r"model: \d tensors missing: model\.layers\.2\."),
    "fewer layers": (encoder, change(num_hidden_layers=1), r"model: \d+ tensors unknown: bert\.encoder\.layer\.1\."),
    "a million layers": (decoder, change(num_hidden_layers=10**6), r"json: 1,000,000 layers: the weights have \d+ ten"),
    "endless layers": (decoder, change(num_hidden_layers=10**13), r"num_hidden_layers: 10000000000000 is not a whole"),
    "beyond any machine": (
        decoder,
        change(hidden_size=2**24, intermediate_size=2**24),
        r"config\.json: a model of this shape cannot be made: .*",
    ),
    "missing tensor": (encoder_decoder, weights(lambda w: w.pop(QUERY)), f"1 tensors missing: {re.escape(QUERY)}; the"),
    "extra tensor": (decoder, weights(lambda w: w.update(more=torch.ones(2))), "1 tensors unknown: more; the weights"),
    "whole numbers": (
        decoder,
        weights(lambda w: w.update({HEAD: w[HEAD].to(torch.int8)})),
        r"safetensors: lm_head\.weight: type I8 is not supported; one of F32, F16",
    ),
    "tied, told untied": (decoder, weights(lambda w: w.pop(HEAD)), r"1 tensors missing: lm_head\.weight"),
    "untied, told tied": (
        decoder,
        change(tie_word_embeddings=True),
        r"config\.json: tie_word_embeddings is true, but lm_head\.weight is not model\.embed_tokens\.weight; set it",
    ),
    "missing shard": (
        decoder,
        remove("model-00002-of-00004.safetensors"),
        r"00002-of-00004\.safetensors: not found; the fold",
    ),
    "broken shard index": (
        decoder,
        write("model.safetensors.index.json", "[]"),
        r"index\.json: not a readable shard",
    ),
    "cut short": (encoder, cut, r"model\.safetensors: corrupt: "),
    "pickle": (encoder, pickled, "pickled weights are refused; convert them to safetensors"),
    "no tokenizer": (decoder, remove("tokenizer.json"), r"tokenizer\.json: not found; save the model's"),
    "broken tokenizer": (encoder, write("tokenizer.json", "{"), "not a readable tokenizer: "),
    "larger tokenizer": (decoder, add_tokens, r"\d{3} tokens are more than the vocab_size 416 of config\.json; give"),
    "missing token": (
        encoder,
        lambda f: words(f, ["[PAD]"]) and None,
        r"tokenizer\.json: special token '\[CLS\]' is",
    ),
    "no template": (
        decoder,
        write("tokenizer_config.json", "{}"),
        r"chat_template is missing; add the one",
    ),
    "GGUF cut short": (gguf_model, cut_gguf, r"cut\.gguf: not a readable GGUF file: .*; fetch it again"),
    "GGUF of an unknown type": (
        gguf_model,
        unknown_type,
        r"token_embd\.weight: type IQ4_NL is not supported; one",
    ),
}


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], str]:
    """Import a path into an empty project; the line that refuses it."""
    (tmp_path / "project").mkdir()
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(SOURCE / name, tmp_path / "project" / name)
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setenv("LOOPWRIGHT_HOME", str(tmp_path / "home"))

    def run(path: Path) -> str:
        ended = CliRunner().invoke(app, ["import", str(path), "--name", "bad"])
        assert isinstance(ended.exception, InputError), ended.exception
        left = (path for path in (tmp_path / "home").rglob("*") if path.is_file())
        assert [path.name for path in left if path.suffix != ".lock"] == []
        return str(ended.exception)

    return run


@pytest.mark.parametrize("name", CASES)
def test_bad_model_is_one_line_and_leaves_nothing(name: str, refused: Callable[[Path], str], tmp_path: Path) -> None:
    make, spoil, message = CASES[name]
    folder = make(tmp_path / "model")
    line = refused(spoil(folder) or folder)
    assert re.search(message, line), line
    assert "\n" not in line
    assert str(tmp_path / "model") in line


def test_base_larger_than_memory_is_refused(
    refused: Callable[[Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = decoder(tmp_path / "model")
    monkeypatch.setattr("components.inference.cache_plan.device_memory", lambda device: 1 << 10)
    line = refused(folder)
    assert line.startswith(f"{folder}/model-00001-of-0000")
    assert "GiB, more than the 0.0 GiB of memory; use a smaller model" in line
