"""GGUF files of decoders in and out: which metadata, tensor names and layouts each architecture has there.

The library `gguf` reads, writes, names and (de)quantizes tensors; what its converter does to them beside that is here:
Llama's and SmolLM3's queries and keys lie in another order of rows, Gemma's gains hold the 1 that is added to them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from components.config.params import InputError
from components.models.decoder_formats import DECODERS, DIFFERENCES
from components.models.positions import RopeScaling, frequencies
from components.models.weight_files import write_weights

MISSING = 'gguf: is not installed; run pip install "loopwright[gguf]"'
TENSOR_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
_LLAMA3_CONTEXT = 8192
"""For which Llama 3.1's frequencies were made: a file has the resulting factors alone."""


@dataclass(frozen=True)
class GgufArchitecture:
    """One architecture under llama.cpp's name."""

    architecture: str
    """Hugging Face's name of it."""
    permuted: bool = False
    """Rows of queries and keys are in pairs (i, i + 1) instead of halves (i, i + D/2)."""
    offset: bool = False
    """Gains are 1 + weight."""
    fields: Callable[[GgufFile], dict[str, Any]] = lambda file: {}
    """Further fields of config.json."""


def _gemma3(file: GgufFile) -> dict[str, Any]:
    scalar = file.head_dim
    if file.number("block_count") == 62:  # the 27B model
        scalar = int(file.number("embedding_length")) // int(file.number("attention.head_count"))
    return {"query_pre_attn_scalar": scalar, "sliding_window_pattern": 6, "rope_local_base_freq": 10_000.0}


ARCHITECTURES = {
    "llama": GgufArchitecture("LlamaForCausalLM", permuted=True),
    "qwen2": GgufArchitecture("Qwen2ForCausalLM"),
    "qwen3": GgufArchitecture("Qwen3ForCausalLM"),
    "gemma3": GgufArchitecture("Gemma3ForCausalLM", offset=True, fields=_gemma3),
    "phi3": GgufArchitecture("Phi3ForCausalLM"),
    "smollm3": GgufArchitecture("SmolLM3ForCausalLM", permuted=True),
    "olmo2": GgufArchitecture("Olmo2ForCausalLM"),
}
"""By the name in `general.architecture`; Mistral's files call themselves llama."""


@dataclass
class GgufFile:
    """An open GGUF file: its metadata, and its tensors as the reader maps them."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Any] = field(repr=False)

    @property
    def prefix(self) -> str:
        return str(self.metadata["general.architecture"])

    def number(self, name: str, default: float | None = None) -> Any:
        """A number of this architecture, such as `block_count`."""
        value = self.metadata.get(f"{self.prefix}.{name}", default)
        if not isinstance(value, (int, float)):
            raise InputError(f"{self.path}: {self.prefix}.{name}: {value!r} is not a number")
        return value

    @property
    def head_dim(self) -> int:
        usual = self.number("embedding_length") // self.number("attention.head_count")
        return int(self.number("attention.key_length", usual))

    def weights(self, name: str) -> NDArray[np.float32]:
        """A tensor in fp32.

        Raises: InputError when its type is unknown.
        """
        from gguf import dequantize

        tensor = self.tensors[name]
        if (kind := tensor.tensor_type.name) not in TENSOR_TYPES:
            known = ", ".join(TENSOR_TYPES)
            raise InputError(f"{self.path}: {name}: type {kind} is not supported; one of {known}")
        values = dequantize(tensor.data, tensor.tensor_type)
        return np.asarray(values, dtype=np.float32).reshape(tensor.shape[::-1])


def open_gguf(path: Path) -> GgufFile:
    """Read a file's metadata and where its tensors lie.

    Raises: InputError when `gguf` is missing, or the file is cut short, no GGUF, or of an unknown architecture.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise InputError(MISSING) from None
    try:
        reader = GGUFReader(path)
        metadata = {name: entry.contents() for name, entry in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except Exception as error:  # noqa: BLE001 - the reader raises whatever the bytes make it trip over
        raise InputError(f"{path}: not a readable GGUF file: {error}; fetch it again") from None
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise InputError(f"{path}: general.architecture: {architecture!r} is not supported; one of {known}")
    return GgufFile(path, metadata, tensors)


def unpack_gguf(file: GgufFile, folder: Path) -> None:
    """Write config.json and weights of a GGUF file as a model folder, quantized ones as fp16.

    Raises: InputError when metadata is missing or a tensor's type unknown.
    """
    config = hub_config(file)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_weights(_hub_tensors(file, config), folder)


def _hub_tensors(file: GgufFile, config: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight under its Hugging Face name and in its layout, one in memory at a time."""
    rule, dtype = ARCHITECTURES[file.prefix], getattr(torch, config["torch_dtype"])
    names = {gguf: hub for hub, gguf in module_names(file.prefix, config["num_hidden_layers"]).items()}
    for name in file.tensors:
        if name.startswith("rope_"):  # factors of frequencies, which config.json says
            continue
        base, _, leaf = name.rpartition(".")
        hub = f"{names.get(base, base)}.{leaf}"
        values = file.weights(name)
        if rule.permuted and base.endswith(("attn_q", "attn_k")):
            heads = config["num_attention_heads" if base.endswith("attn_q") else "num_key_value_heads"]
            values = permuted(values, heads, halves=True)
        if rule.offset and hub.endswith("norm.weight"):
            values = values - 1
        # Vectors are fp32 in the file, and few.
        yield hub, torch.from_numpy(np.array(values)).to(dtype if values.ndim > 1 else torch.float32)


def module_names(prefix: str, layers: int) -> dict[str, str]:
    """Hugging Face's names of modules to GGUF's."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    table = get_tensor_name_map(MODEL_ARCH[prefix.upper()], layers)
    architecture = ARCHITECTURES[prefix].architecture
    patterns = [part for name in DECODERS[architecture].names(None).values() for part in _parts(name)]
    modules = {pattern.format(n=number) for pattern in patterns for number in range(layers)}
    return {module: name for module in modules if (name := table.get_name(module)) is not None}


def _parts(name: str | tuple[str, ...]) -> tuple[str, ...]:
    return (name,) if isinstance(name, str) else name


def permuted(rows: NDArray[np.float32], heads: int, halves: bool) -> NDArray[np.float32]:
    """Rows of weights (H * D, E) or a bias (H * D): each head's pairs from neighbours to halves, or back."""
    half = rows.shape[0] // heads // 2
    shape = (heads, half, 2, *rows.shape[1:]) if halves else (heads, 2, half, *rows.shape[1:])
    return np.ascontiguousarray(rows.reshape(shape).swapaxes(1, 2).reshape(rows.shape))


def hub_config(file: GgufFile) -> dict[str, Any]:
    """The config.json that a file's metadata stands for."""
    metadata, prefix = file.metadata, file.prefix
    rule = ARCHITECTURES[prefix]
    heads = int(file.number("attention.head_count"))
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise InputError(f"{file.path}: token_embd.weight is missing; the file is incomplete")
    difference = DIFFERENCES[rule.architecture]
    config = {
        **difference.defaults,
        "architectures": [rule.architecture],
        "model_type": difference.model_type,
        "vocab_size": int(embedding.shape[1]),
        "hidden_size": int(file.number("embedding_length")),
        "intermediate_size": int(file.number("feed_forward_length")),
        "num_hidden_layers": int(file.number("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(file.number("attention.head_count_kv", heads)),
        "head_dim": file.head_dim,
        "max_position_embeddings": int(file.number("context_length")),
        "rms_norm_eps": float(f"{file.number('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_parameters": _rope(file),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": difference.biases and "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": difference.biases and "blk.0.ffn_gate.bias" in file.tensors,
        "torch_dtype": _dtype(file),
        **rule.fields(file),
    }
    if (window := metadata.get(f"{prefix}.attention.sliding_window")) is not None:
        config["sliding_window"] = int(window)
    for token in ("bos", "eos", "padding"):
        if (number := metadata.get(f"tokenizer.ggml.{token}_token_id")) is not None:
            config[f"{token.replace('padding', 'pad')}_token_id"] = int(number)
    return config


def _dtype(file: GgufFile) -> str:
    """That of the file's matrices where it is one of torch's, else fp16."""
    kinds = {tensor.tensor_type.name for tensor in file.tensors.values() if len(tensor.shape) > 1}
    return {"F32": "float32", "BF16": "bfloat16"}.get(kinds.pop() if len(kinds) == 1 else "", "float16")


def _rope(file: GgufFile) -> dict[str, Any]:
    theta, prefix = float(file.number("rope.freq_base", 10_000.0)), f"{file.prefix}.rope.scaling"
    head_dim = file.head_dim
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    rotated = int(file.number("rope.dimension_count", head_dim))
    if rotated != head_dim:
        rope["partial_rotary_factor"] = rotated / head_dim
    if "rope_freqs.weight" in file.tensors:
        return rope | _llama3(file, theta, rotated)
    if "rope_factors_short.weight" in file.tensors:
        short, long = (file.weights(f"rope_factors_{name}.weight").tolist() for name in ("short", "long"))
        original = int(file.number("rope.scaling.original_context_length"))
        factors = {"short_factor": short, "long_factor": long, "original_max_position_embeddings": original}
        if (scale := file.metadata.get(f"{prefix}.attn_factor")) is not None:
            rope["attention_factor"] = float(scale)
        return rope | {"rope_type": "longrope"} | factors
    kind = file.metadata.get(f"{prefix}.type", "none")
    if kind == "none":
        return rope
    if kind not in ("linear", "yarn"):
        raise InputError(f"{file.path}: {prefix}.type: {kind!r} is not supported; allowed: 'none', 'linear', 'yarn'")
    rope |= {"rope_type": kind, "factor": float(file.number("rope.scaling.factor"))}
    if (context := file.metadata.get(f"{prefix}.original_context_length")) is not None:
        rope["original_max_position_embeddings"] = int(context)
    return rope


def _llama3(file: GgufFile, theta: float, rotated: int) -> dict[str, Any]:
    """The scaling of Llama 3.1 whose factors the file holds.

    Raises: InputError when they are those of no such scaling.
    """
    factors = torch.from_numpy(file.weights("rope_freqs.weight").copy())
    frequency = frequencies(rotated, theta)
    factor, low, high, original = float(factors.max()), 1.0, 4.0, _LLAMA3_CONTEXT
    unchanged, stretched = factors < 1.001, factors > factor * 0.999
    if (between := ~(unchanged | stretched)).any():
        share = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)  # that is not stretched
        turns = low + share * (high - low)
        original = round(float((turns * 2 * math.pi / frequency[between]).mean()))
    elif unchanged.any() and stretched.any():  # any context between these gives the same factors
        least, most = high * 2 * math.pi / frequency[unchanged].min(), low * 2 * math.pi / frequency[stretched].max()
        original = max(math.ceil(least), min(original, math.floor(most)))
    values: dict[str, Any] = {
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    scaled = RopeScaling("llama3", **values).scaled(frequency, theta)
    if not torch.allclose(frequency / factors, scaled, rtol=1e-3):
        raise InputError(f"{file.path}: rope_freqs.weight: not the factors of rope_type llama3; not supported")
    return {"rope_type": "llama3", **values}
