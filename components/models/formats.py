"""Hugging Face's formats of our families: architectures, fields of config.json, names of tensors.

One table of names per family, ours to Hugging Face's; a fused product (query-key-value, gate-up) has the names of its
parts. `checkpoint.py` reads and writes by them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from components.config.params import InputError
from components.models.attention import FusedLinear
from components.models.blocks import ACTIVATIONS
from components.models.config_fields import Fields, Format, Names
from components.models.decoder import Decoder
from components.models.decoder_formats import DECODERS
from components.models.encoder import Encoder
from components.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from components.models.encoder_formats import ENCODERS, encoder_architecture
from components.models.vision import VisionLanguageModel, VisionTower
from components.models.vision_formats import LLAVA, SIGHT, SIGLIP

_T5, _MT5 = "T5ForConditionalGeneration", "MT5ForConditionalGeneration"


def _read_encoder_decoder(fields: Fields, architecture: str) -> EncoderDecoderConfig:
    """mT5 is T5 1.1, whose outputs are never scaled and whose feed-forward is gated where nothing is said."""
    later = architecture == _MT5
    fields.choice("is_decoder", False, [False])
    allowed = [prefix + name for prefix in ("", "gated-") for name in ACTIVATIONS]
    *gate, activation = fields.choice("feed_forward_proj", "gated-gelu" if later else "relu", allowed).split("-")
    layers, buckets = fields.whole("num_layers"), fields.whole("relative_attention_num_buckets", 32)
    if buckets < 4:
        raise InputError(f"{fields.path}: relative_attention_num_buckets: {buckets} is too few; at least 4")
    tied = fields.choice("tie_word_embeddings", True, [True, False])
    return EncoderDecoderConfig(
        vocab_size=fields.whole("vocab_size"),
        embed_dim=fields.whole("d_model"),
        num_layers=layers,
        num_decoder_layers=fields.whole("num_decoder_layers", layers),
        num_heads=fields.whole("num_heads"),
        head_dim=fields.whole("d_kv"),
        hidden_dim=fields.whole("d_ff"),
        # Of no effect in T5, whose positions are distances; kept as what the model was trained for.
        max_seq_len=fields.whole("n_positions", 512),
        dropout=fields.number("dropout_rate", 0.1),
        tie_embeddings=tied,
        # `gated-gelu` has meant GELU by tanh since T5 1.1.
        activation="gelu_new" if gate and activation == "gelu" else activation,
        gated=bool(gate),
        scale_outputs=not later and fields.choice("scale_decoder_outputs", tied, [True, False]),
        num_buckets=buckets,
        max_distance=fields.whole("relative_attention_max_distance", 128),
        norm_eps=fields.number("layer_norm_epsilon", 1e-6),
        start_id=fields.whole("decoder_start_token_id", fields.whole("pad_token_id", 0)),
        architecture=architecture,
        source={name: value for name, value in fields.values.items() if value is not None},
    )


def _write_encoder_decoder(config: EncoderDecoderConfig) -> dict[str, Any]:
    activation = config.activation.removesuffix("_new") if config.gated else config.activation
    return {
        **(config.source or {}),
        "model_type": "mt5" if config.architecture == _MT5 else "t5",
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.embed_dim,
        "num_layers": config.num_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "num_heads": config.num_heads,
        "d_kv": config.head_dim,
        "d_ff": config.hidden_dim,
        "n_positions": config.max_seq_len,
        "dropout_rate": config.dropout,
        "feed_forward_proj": f"gated-{activation}" if config.gated else activation,
        # Readers before version 5 of transformers take the one for the other.
        "tie_word_embeddings": config.tie_embeddings,
        "scale_decoder_outputs": config.scale_outputs,
        "relative_attention_num_buckets": config.num_buckets,
        "relative_attention_max_distance": config.max_distance,
        "layer_norm_epsilon": config.norm_eps,
        "decoder_start_token_id": config.start_id,
    }


def _encoder_decoder_names(config: EncoderDecoderConfig) -> Names:
    names: dict[str, str | tuple[str, ...]] = {"embed": "shared", "head": "lm_head"}
    for side in ("encoder", "decoder"):
        module, hub_name = f"{side}_blocks.{{n}}", f"{side}.block.{{n}}.layer"
        last = f"{hub_name}.{1 if side == 'encoder' else 2}"
        gate = tuple(f"{last}.DenseReluDense.{part}" for part in (("wi_0", "wi_1") if config.gated else ("wi",)))
        names |= {
            f"{side}_bias.table": f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias",
            f"{module}.attention_norm": f"{hub_name}.0.layer_norm",
            f"{module}.attention.qkv": tuple(f"{hub_name}.0.SelfAttention.{part}" for part in "qkv"),
            f"{module}.attention.out": f"{hub_name}.0.SelfAttention.o",
            f"{module}.cross_attention_norm": f"{hub_name}.1.layer_norm",
            f"{module}.cross_attention.qkv": tuple(f"{hub_name}.1.EncDecAttention.{part}" for part in "qkv"),
            f"{module}.cross_attention.out": f"{hub_name}.1.EncDecAttention.o",
            f"{module}.mlp_norm": f"{last}.layer_norm",
            f"{module}.mlp.up": gate,
            f"{module}.mlp.down": f"{last}.DenseReluDense.wo",
            f"{side}_norm": f"{side}.final_layer_norm",
        }
    return names


def _tied_where_no_head(config: EncoderDecoderConfig, names: Collection[str]) -> EncoderDecoderConfig:
    """Untied where there is a head: newer versions of transformers always write `tie_word_embeddings: true`."""
    return replace(config, tie_embeddings=config.tie_embeddings and "lm_head.weight" not in names)


def _encoder_decoder(architecture: str) -> Format:
    return Format(
        EncoderDecoder,
        partial(_read_encoder_decoder, architecture=architecture),
        _write_encoder_decoder,
        _encoder_decoder_names,
        ignored=(
            "coder.embed_tokens.weight",
            "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
        ),
        settle=_tied_where_no_head,
    )


FORMATS: dict[str, Format] = {
    **DECODERS,
    **ENCODERS,
    **{name: _encoder_decoder(name) for name in (_T5, _MT5)},
    **SIGHT,
}
"""By the name of the architecture in config.json."""


def architecture_of(model: nn.Module) -> str:
    """The architecture that a model of ours is written as."""
    if isinstance(model, VisionLanguageModel | VisionTower):
        return LLAVA if isinstance(model, VisionLanguageModel) else SIGLIP
    if isinstance(model, Decoder):
        return model.config.architecture or ("Qwen3ForCausalLM" if model.config.qk_norm else "LlamaForCausalLM")
    if isinstance(model, Encoder):
        return encoder_architecture(model)
    assert isinstance(model, EncoderDecoder)
    return model.config.architecture


def hub_tensors(model: nn.Module, form: Format | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every weight under its Hugging Face name, low-rank pairs left out; a part of a fused product is a view of it."""
    names = (form or FORMATS[architecture_of(model)]).names(model.config)
    for name, weight in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        if leaf.startswith("lora_") or path.endswith(".quantized"):
            continue
        own_name = names.get(f"{_pattern(path)}.{leaf}")
        if isinstance(own_name, str):
            yield own_name, weight.data
            continue
        modules = hub_modules(names, path)
        if len(modules) == 1:
            yield f"{modules[0]}.{leaf}", weight.data
            continue
        fused = model.get_submodule(path)
        assert isinstance(fused, FusedLinear)
        for module, rows in zip(modules, torch.split(weight.data, list(fused.parts)), strict=True):
            yield f"{module}.{leaf}", rows


def hub_modules(names: Names, path: str) -> tuple[str, ...]:
    """The Hugging Face names of the module at a path of ours, of each part where it is a fused product."""
    hub_names, number = names[_pattern(path)], "".join(re.findall(r"\.(\d+)\.", path))
    parts = (hub_names,) if isinstance(hub_names, str) else hub_names
    return tuple(part.format(n=number) for part in parts)


def _pattern(path: str) -> str:
    return re.sub(r"\.\d+\.", ".{n}.", path)


def tied_names(model: nn.Module) -> tuple[str, ...]:
    """Tensors of a folder that may repeat the embedding."""
    head = getattr(model, "head", None)
    return ("lm_head.weight",) if head is not None and head.weight is model.get_parameter("embed.weight") else ()
