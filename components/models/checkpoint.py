"""Hugging Face model folders in and out: Llama's format, and Qwen3's where queries and keys are normed.

One table maps names; the products that we fuse (query-key-value, gate-up) are written apart and read together.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor
from torch.overrides import TorchFunctionMode

from components.config import InputError
from components.models.attention import FusedLinear
from components.models.decoder import Decoder, DecoderConfig

ARCHITECTURES = {"LlamaForCausalLM": False, "Qwen3ForCausalLM": True}
"""Formats we read and write, and whether each norms queries and keys."""
_BLOCK = {
    "input_layernorm": ("attention_norm",),
    "self_attn.{}_proj": ("attention.qkv", "q", "k", "v"),
    "self_attn.q_norm": ("attention.q_norm",),
    "self_attn.k_norm": ("attention.k_norm",),
    "self_attn.o_proj": ("attention.out",),
    "post_attention_layernorm": ("mlp_norm",),
    "mlp.{}_proj": ("mlp.gate_up", "gate", "up"),
    "mlp.down_proj": ("mlp.down",),
}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def save_decoder(
    model: Decoder, folder: Path, tokenizer_folder: Path | None = None, files: Mapping[str, Path | str] | None = None
) -> None:
    """Write a model folder that `transformers` loads, weights in fp32; all of it or nothing.

    `files` are put in beside: a path is copied, a text is written.

    Raises: InputError when the disk is full or the folder cannot be written.
    """
    weights = {name: part.detach().float().contiguous().cpu() for name, part in hub_tensors(model)}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.glob(f".{folder.name}-*"):  # by a process that was killed while it saved
            shutil.rmtree(left)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as name:
            temporary = Path(name) / folder.name
            temporary.mkdir()
            (temporary / "model.safetensors").write_bytes(safetensors_bytes(weights, {"format": "pt"}))
            for filename in _TOKENIZER_FILES if tokenizer_folder else ():
                shutil.copyfile(Path(tokenizer_folder or "") / filename, temporary / filename)
            special = _special_ids(temporary)
            _write_json(temporary / "config.json", _hub_config(model.config) | special)
            _write_json(temporary / "generation_config.json", special | {"do_sample": False})
            for filename, source in (files or {}).items():
                if isinstance(source, Path):
                    shutil.copyfile(source, temporary / filename)
                else:
                    (temporary / filename).write_text(source, encoding="utf-8")
            _sync(temporary)
            _swap(temporary, folder, Path(name) / "old")
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written: {error.strerror or error}; free space or choose another place"
        ) from error


def load_decoder(folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Decoder:
    """Read a Llama- or Qwen3-format folder, sharded or not.

    Raises: InputError when the folder is not such a model, or tensors are missing, unknown, misshapen or corrupt.
    """
    config = read_config(folder)
    with torch.device(device or "cpu"), _Undrawn():
        model = Decoder(config).to(dtype)
    wanted = dict(hub_tensors(model))
    files = _weight_files(folder)
    found = {name: file for file in files for name in _names_in(file)}
    ignored = {name for name in found if name.endswith("rotary_emb.inv_freq")}
    ignored |= {"lm_head.weight"} if config.tie_embeddings else set()
    _compare(folder, set(wanted), set(found) - ignored)
    for file in files:
        _read_into(file, {name: wanted[name] for name in wanted if found[name] == file})
    return model


class _Undrawn(TorchFunctionMode):
    """Leaves out drawing initial weights, which are read right after (torch's meta device costs seconds of imports)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return (kwargs or {}).get("tensor", args[0] if args else None)
        return func(*args, **(kwargs or {}))


def hub_tensors(model: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Every weight under its Hugging Face name; a part of a fused product is a view of it."""
    weights = dict(model.named_parameters())
    yield "model.embed_tokens.weight", weights["embed.weight"].data
    for index in range(model.config.num_layers):
        for theirs, (ours, *parts) in _BLOCK.items():
            weight = weights.get(f"blocks.{index}.{ours}.weight")
            if weight is None:
                continue
            if not parts:
                yield f"model.layers.{index}.{theirs}.weight", weight.data
                continue
            fused = model.get_submodule(f"blocks.{index}.{ours}")
            assert isinstance(fused, FusedLinear)
            for part, rows in zip(parts, torch.split(weight.data, list(fused.parts)), strict=True):
                yield f"model.layers.{index}.{theirs.format(part)}.weight", rows
    yield "model.norm.weight", weights["norm.weight"].data
    if not model.config.tie_embeddings:
        yield "lm_head.weight", weights["head.weight"].data


def read_config(folder: Path) -> DecoderConfig:
    """Shape of the model in a folder.

    Raises: InputError when its config.json is missing, broken or asks for what this decoder does not do.
    """
    path = folder / "config.json"
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        architecture = (given.get("architectures") or ["none"])[0]
        if architecture not in ARCHITECTURES:
            raise InputError(f"{path}: architecture {architecture} is not one of {', '.join(ARCHITECTURES)}")
        _refuse_variants(path, given)
        heads = int(given["num_attention_heads"])
        rope = given.get("rope_parameters") or {}
        return DecoderConfig(
            vocab_size=int(given["vocab_size"]),
            embed_dim=int(given["hidden_size"]),
            num_layers=int(given["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=int(given.get("num_key_value_heads") or heads),
            head_dim=int(given.get("head_dim") or given["hidden_size"] // heads),
            hidden_dim=int(given["intermediate_size"]),
            max_seq_len=int(given["max_position_embeddings"]),
            rope_theta=float(rope.get("rope_theta") or given.get("rope_theta") or 10_000.0),
            norm_eps=float(given.get("rms_norm_eps", 1e-6)),
            qk_norm=ARCHITECTURES[architecture],
            tie_embeddings=bool(given.get("tie_word_embeddings", False)),
        )
    except FileNotFoundError:
        raise InputError(f"{path}: not found; a model folder has config.json and model.safetensors") from None
    except KeyError as error:
        raise InputError(f"{path}: {error.args[0]} is missing") from None
    except (ValueError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a readable model configuration: {error}") from None


def _refuse_variants(path: Path, given: dict[str, Any]) -> None:
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    refused = {
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        "hidden_act": (given.get("hidden_act", "silu"), "silu"),
        "attention_bias": (bool(given.get("attention_bias")), False),
        "mlp_bias": (bool(given.get("mlp_bias")), False),
        "use_sliding_window": (bool(given.get("use_sliding_window")), False),
    }
    for key, (value, allowed) in refused.items():
        if value != allowed:
            raise InputError(f"{path}: {key}: {value!r} is not supported; allowed: {allowed!r}")


def _hub_config(config: DecoderConfig) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if config.qk_norm else "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden_dim,
        "max_position_embeddings": config.max_seq_len,
        # Newer readers want the first of these, older ones and other engines the second.
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "torch_dtype": "float32",
    }


def _special_ids(folder: Path) -> dict[str, int]:
    """`eos_token_id` and `pad_token_id` as the tokenizer files of this folder have them."""
    if not all((folder / name).is_file() for name in _TOKENIZER_FILES):
        return {}
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")).get("added_tokens", [])
    ids = {token["content"]: int(token["id"]) for token in added}
    return {f"{name}_id": ids[config[name]] for name in ("eos_token", "pad_token") if config.get(name) in ids}


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.is_file():
        try:
            files = sorted(
                {folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
            )
        except (ValueError, KeyError, AttributeError) as error:
            raise InputError(f"{index}: not a readable shard index: {error}") from None
    else:
        files = [single]
    for file in files:
        if not file.is_file():
            pickled = any(folder.glob("pytorch_model*.bin"))
            hint = "pickled weights are refused; convert them to safetensors" if pickled else "the folder is incomplete"
            raise InputError(f"{file}: not found; {hint}")
    return files


def _names_in(file: Path) -> list[str]:
    try:
        with safe_open(str(file), framework="pt") as tensors:
            return list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: corrupt: {error}; fetch or train it again") from None


def _read_into(file: Path, wanted: Mapping[str, Tensor]) -> None:
    with safe_open(str(file), framework="pt") as tensors:
        for name, target in wanted.items():
            shape = tuple(tensors.get_slice(name).get_shape())
            if shape != tuple(target.shape):
                raise InputError(
                    f"{file}: {name}: shape {shape} does not fit config.json, which asks for {tuple(target.shape)}"
                )
            target.copy_(tensors.get_tensor(name))


def _compare(folder: Path, wanted: set[str], found: set[str]) -> None:
    for problem, names in (("missing", wanted - found), ("unknown", found - wanted)):
        if names:
            some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise InputError(f"{folder}: {len(names)} tensors {problem}: {some}; the weights do not fit config.json")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _sync(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _swap(new: Path, place: Path, old: Path) -> None:
    """Put `new` in place; what was there moves to `old`."""
    if place.exists():
        place.rename(old)
    new.rename(place)
    _sync(place.parent)
