"""Model folders to GGUF files and back: the same model, the same token ids; broken files in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, trainers
from typer.testing import CliRunner

from components.config.params import InputError
from components.models.checkpoint import load_decoder
from components.models.gguf import ARCHITECTURES, GgufFile, hub_config, open_gguf, unpack_gguf
from components.models.gguf_export import Quantization, pack_gguf
from components.tokenization.gguf_tokenizer import PRE_TOKENIZERS, pack_tokenizer, unpack_tokenizer
from components.tokenization.hf_tokenizer import load_chat_tokenizer
from loopwright.cli import app
from tests.conftest import SOURCE
from tests.models.test_architectures import CASES, ids, reference

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HARD = [
    "Don't stop, it's 1234.5 €!",
    "日本語のテキスト と 中文",
    "👩‍💻 emoji\u200d and ﷽ العربية",
    "def f(x):\n\treturn x  # two  spaces\r\n\r\n",
    "a\x00b\x07c <|im_end|> typed",
]
NUMBERS = [
    f"llama.{name}"
    for name in ("feed_forward_length", "block_count", "context_length", "attention.layer_norm_rms_epsilon")
]
PACKED = ["llama", "llama 3.1", "llama linear", "llama yarn", "llama biases", "qwen2", "qwen3", "mistral", "phi 3"]
PACKED += ["phi 4 mini", "smollm3", "olmo 2", "gemma 3"]


def byte_level(folder: Path, pre: str = "qwen2") -> None:
    """A small tokenizer that splits as `pre` does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=97, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(HARD, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def packed(folder: Path, target: Path, quantization: Quantization = "f16") -> Path:
    pack_gguf(folder, target, quantization, partial(pack_tokenizer, folder))
    return target


def unpacked(path: Path, folder: Path) -> Path:
    folder.mkdir()
    file = open_gguf(path)
    unpack_gguf(file, folder)
    unpack_tokenizer(file.metadata, path, folder)
    return folder


@pytest.mark.parametrize("name", PACKED)
def test_a_model_comes_back_as_it_went(name: str, tmp_path: Path) -> None:
    reference(name, tmp_path / "model")
    byte_level(tmp_path / "model")
    back = unpacked(packed(tmp_path / "model", tmp_path / "model.gguf"), tmp_path / "back")
    assert json.loads((back / "config.json").read_text())["torch_dtype"] == "float16"
    expected, got = load_file(tmp_path / "model/model.safetensors"), load_file(back / "model.safetensors")
    assert got.keys() == expected.keys()
    for key, weight in expected.items():
        torch.testing.assert_close(got[key].float(), weight, rtol=1e-3, atol=1e-3)
    if name not in ("gemma 3", "smollm3", "mistral"):  # whose layers' kinds a file does not say
        with torch.no_grad():
            close = {"rtol": 0.05, "atol": 0.05}
            torch.testing.assert_close(load_decoder(back)(ids()), load_decoder(tmp_path / "model")(ids()), **close)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_token_ids_are_the_same(pre: str, tmp_path: Path) -> None:
    reference("qwen2", tmp_path / "model")
    byte_level(tmp_path / "model", pre)
    back = unpacked(packed(tmp_path / "model", tmp_path / "model.gguf"), tmp_path / "back")
    ours, theirs = load_chat_tokenizer(back), load_chat_tokenizer(tmp_path / "model")
    for text in HARD:
        assert ours.encode(text) == theirs.encode(text)
        chat = [{"role": "user", "content": text}]
        assert ours.encode_chat(chat, add_generation_prompt=True) == theirs.encode_chat(
            chat, add_generation_prompt=True
        )


def test_q8_0_is_within_its_rounding(tmp_path: Path) -> None:
    reference("llama", tmp_path / "model")
    byte_level(tmp_path / "model")
    back = unpacked(packed(tmp_path / "model", tmp_path / "model.gguf", "q8_0"), tmp_path / "back")
    expected, got = load_file(tmp_path / "model/model.safetensors"), load_file(back / "model.safetensors")
    for key, weight in expected.items():
        step = weight.abs().max() / 127
        assert (got[key].float() - weight).abs().max() <= 0.51 * step + 1e-3


def test_queries_lie_as_llama_cpp_wants_them(tmp_path: Path) -> None:
    """Row 2 i of a head is dimension i, row 2 i + 1 is dimension i + D / 2."""
    reference("llama", tmp_path / "model")
    byte_level(tmp_path / "model")
    reader = GGUFReader(packed(tmp_path / "model", tmp_path / "model.gguf"))
    rows = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.attn_q.weight").data
    weight = load_file(tmp_path / "model/model.safetensors")["model.layers.0.self_attn.q_proj.weight"].half().numpy()
    assert np.array_equal(rows[:8], weight[[0, 4, 1, 5, 2, 6, 3, 7]])


def test_every_architecture_of_the_table_is_packed() -> None:
    kinds = {f"{CASES[name].kind}ForCausalLM" for name in PACKED}
    assert kinds == {rule.architecture for rule in ARCHITECTURES.values()} | {"MistralForCausalLM"}


def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused_by_name(tmp_path: Path) -> None:
    reference("llama", tmp_path / "model")
    byte_level(tmp_path / "model")
    described = json.loads((tmp_path / "model/tokenizer.json").read_text())
    described["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "[a-z]+"
    (tmp_path / "model/tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match=r"tokenizer.json: pre_tokenizer: llama.cpp knows none that splits so; known"):
        packed(tmp_path / "model", tmp_path / "model.gguf")


def write(path: Path, architecture: str = "llama", **fields: Any) -> Path:
    writer = GGUFWriter(path, architecture)
    for name, value in fields.items():
        writer.add_string(name.replace("__", "."), value)
    writer.add_tensor("token_embd.weight", np.zeros((8, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_broken_files_are_refused_in_one_line(tmp_path: Path) -> None:
    reference("llama", tmp_path / "model")
    byte_level(tmp_path / "model")
    whole = packed(tmp_path / "model", tmp_path / "model.gguf").read_bytes()
    for name, content in (("cut", whole[:-5000]), ("head", whole[:40]), ("text", b"no GGUF"), ("empty", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name}: not a readable GGUF file: .*; fetch it again") as refused:
            open_gguf(tmp_path / name)
        assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match=r"general\.architecture: 'mamba' is not supported; one of llama, qwen2"):
        open_gguf(write(tmp_path / "mamba", "mamba"))
    with pytest.raises(InputError, match=r"llama\.attention\.head_count: None is not a number"):
        unpack_gguf(open_gguf(write(tmp_path / "bare")), tmp_path)
    scaled = write(tmp_path / "scaled", llama__rope__scaling__type="yarn")
    file = open_gguf(scaled)
    file.metadata |= {f"llama.{name}": 8 for name in ("embedding_length", "attention.head_count")}
    with pytest.raises(InputError, match=r"llama\.rope\.scaling\.factor: None is not a number"):
        hub_config(GgufFile(scaled, file.metadata | dict.fromkeys(NUMBERS, 2), file.tensors))
    with pytest.raises(InputError, match=r"tokenizer\.ggml\.tokens is missing"):
        unpack_tokenizer({}, tmp_path / "bare", tmp_path)
    vocabulary = {"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.token_type": [1], "tokenizer.ggml.model": "gpt2"}
    with pytest.raises(InputError, match=r"tokenizer\.ggml\.pre: 'tekken' is not supported; one of gpt-2"):
        unpack_tokenizer(vocabulary | {"tokenizer.ggml.pre": "tekken"}, tmp_path / "bare", tmp_path)


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`loopwright` in an empty project."""
    (tmp_path / "project").mkdir()
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(SOURCE / name, tmp_path / "project" / name)
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setenv("LOOPWRIGHT_HOME", str(tmp_path / "home"))
    return lambda *words: CliRunner().invoke(app, list(map(str, words)))


def test_a_file_is_imported_and_exported_by_command(command: Callable[..., Any], tmp_path: Path) -> None:
    reference("qwen2", tmp_path / "model")
    byte_level(tmp_path / "model")
    path = packed(tmp_path / "model", tmp_path / "Tiny Qwen2.5.gguf")
    done = command("import", path, "--json")
    assert (done.exit_code, json.loads(done.stdout)["model"]) == (0, "tiny-qwen2.5/1")
    assert command("export", "tiny-qwen2.5/1", tmp_path / "out", "--format", "gguf").exit_code == 0
    again, first = (GGUFReader(file) for file in (tmp_path / "out/tiny-qwen2.5-f16.gguf", path))
    assert {tensor.name: tensor.data.tobytes() for tensor in again.tensors} == {
        tensor.name: tensor.data.tobytes() for tensor in first.tensors
    }


@pytest.mark.parametrize("name", ["cut.gguf", "absent.gguf"])
def test_a_refused_file_leaves_nothing(name: str, command: Callable[..., Any], tmp_path: Path) -> None:
    reference("llama", tmp_path / "model")
    byte_level(tmp_path / "model")
    (tmp_path / "cut.gguf").write_bytes(packed(tmp_path / "model", tmp_path / "whole.gguf").read_bytes()[:-9000])
    refused = command("import", tmp_path / name)
    assert isinstance(refused.exception, InputError)
    assert not [path for path in (tmp_path / "home").rglob("*") if path.name.startswith(".importing")]


def test_an_export_goes_behind_a_link(command: Callable[..., Any], tmp_path: Path) -> None:
    reference("qwen2", tmp_path / "model")
    byte_level(tmp_path / "model")
    assert command("import", tmp_path / "model", "--name", "m").exit_code == 0
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    assert command("export", "m/1", tmp_path / "link").exit_code == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk/config.json").is_file()


def test_an_export_that_fails_leaves_no_file(command: Callable[..., Any], tmp_path: Path) -> None:
    reference("llama", tmp_path / "model")
    byte_level(tmp_path / "model")
    described = json.loads((tmp_path / "model/tokenizer.json").read_text())
    described["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "[a-z]+"
    (tmp_path / "model/tokenizer.json").write_text(json.dumps(described))
    assert command("import", tmp_path / "model", "--name", "odd").exit_code == 0
    refused = command("export", "odd/1", tmp_path / "out", "--format", "gguf")
    assert "llama.cpp knows none that splits so" in str(refused.exception)
    assert not list((tmp_path / "out").iterdir())
