"""A decoder's model folder as a GGUF file that llama.cpp runs; `gguf.py` has the names and layouts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import safe_open

from components.config.params import InputError
from components.models.checkpoint import read_config
from components.models.decoder import DecoderConfig
from components.models.gguf import ARCHITECTURES, MISSING, module_names, permuted
from components.models.positions import frequencies
from components.models.weight_files import weight_files

Quantization = Literal["f16", "q8_0"]
"""Of matrices; vectors stay fp32."""


def pack_gguf(
    folder: Path, target: Path, quantization: Quantization, describe_tokenizer: Callable[[Any], None]
) -> None:
    """Write the model folder as `target`; `describe_tokenizer` adds the tokenizer's fields to the library's writer.

    Raises: InputError when `gguf` is missing, or the architecture has no place in a GGUF file.
    """
    try:
        from gguf import GGUFWriter, LlamaFileType
    except ImportError:
        raise InputError(MISSING) from None
    config = read_config(folder)
    architecture = config.architecture
    prefix = next((name for name, rule in ARCHITECTURES.items() if rule.architecture == architecture), None)
    if architecture == "MistralForCausalLM":
        prefix = "llama"  # as llama.cpp has it
    if prefix is None:
        known = ", ".join(rule.architecture for rule in ARCHITECTURES.values())
        raise InputError(f"{folder}: architectures: {architecture} has no GGUF form here; one of {known}")
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    writer = GGUFWriter(target, prefix)
    writer.add_name(folder.name)
    writer.add_file_type({"f16": LlamaFileType.MOSTLY_F16, "q8_0": LlamaFileType.MOSTLY_Q8_0}[quantization])
    _add_shape(writer, config, fields)
    describe_tokenizer(writer)
    _add_tensors(writer, folder, prefix, config, quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_shape(writer: Any, config: DecoderConfig, fields: Mapping[str, Any]) -> None:
    writer.add_vocab_size(config.vocab_size)
    whole = int(fields["max_position_embeddings"])
    # llama.cpp has no window for its "llama": up to the window there is no difference.
    window = config.window if writer.arch == "llama" else None
    writer.add_context_length(min(whole, window or whole))
    writer.add_embedding_length(config.embed_dim)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.rotary_dim or config.head_dim)
    if config.window is not None:
        writer.add_sliding_window(config.window)
    scaling = config.rope_scaling
    if scaling is not None and scaling.rope_type in ("linear", "yarn"):
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType(scaling.rope_type))
        writer.add_rope_scaling_factor(scaling.factor)
        if scaling.rope_type == "yarn":
            writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)
    elif scaling is not None and scaling.rope_type == "llama3":
        frequency = frequencies(config.rotary_dim or config.head_dim, config.rope_theta)
        factors = frequency / scaling.scaled(frequency, config.rope_theta)
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    elif scaling is not None:
        rope = fields.get("rope_parameters") or fields["rope_scaling"]
        writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)
        writer.add_rope_scaling_attn_factors(scaling.attention_factor)
        for name in ("long", "short"):
            writer.add_tensor(f"rope_factors_{name}.weight", np.array(rope[f"{name}_factor"], dtype=np.float32))


def _add_tensors(writer: Any, folder: Path, prefix: str, config: DecoderConfig, quantization: Quantization) -> None:
    from gguf import GGMLQuantizationType, quantize

    rule, names = ARCHITECTURES[prefix], module_names(prefix, config.num_layers)
    kind = {"f16": GGMLQuantizationType.F16, "q8_0": GGMLQuantizationType.Q8_0}[quantization]
    for file in weight_files(folder):
        with safe_open(str(file), framework="pt") as tensors:
            for hub in tensors.keys():  # noqa: SIM118 - no mapping
                if hub == "lm_head.weight" and config.tie_embeddings:
                    continue
                base, _, leaf = hub.rpartition(".")
                name = f"{names[base]}.{leaf}"
                values = tensors.get_tensor(hub).float().numpy()
                if rule.permuted and names[base].endswith(("attn_q", "attn_k")):
                    heads = config.num_heads if names[base].endswith("attn_q") else config.num_kv_heads
                    values = permuted(values, heads, halves=False)
                if rule.offset and hub.endswith("norm.weight"):
                    values = values + 1
                if values.ndim == 1:
                    writer.add_tensor(name, values.astype(np.float32))
                    continue
                # Rows that no whole number of blocks makes up stay fp16, as llama.cpp's converter leaves them.
                own = GGMLQuantizationType.F16 if values.shape[-1] % 32 else kind
                writer.add_tensor(name, quantize(values, own), raw_dtype=own)
