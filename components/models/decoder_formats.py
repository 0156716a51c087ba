"""Decoders of Hugging Face: one table of what each does otherwise than Llama, and what their config.json mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from components.config.params import InputError
from components.models.config_fields import Fields, Format, Names
from components.models.decoder import Decoder, DecoderConfig
from components.models.positions import RopeScaling

_LAYER = "model.layers.{n}."
_LLAMA: Names = {
    "embed": "model.embed_tokens",
    "blocks.{n}.attention_norm": _LAYER + "input_layernorm",
    "blocks.{n}.attention.qkv": tuple(f"{_LAYER}self_attn.{part}_proj" for part in "qkv"),
    "blocks.{n}.attention.q_norm": _LAYER + "self_attn.q_norm",
    "blocks.{n}.attention.k_norm": _LAYER + "self_attn.k_norm",
    "blocks.{n}.attention.out": _LAYER + "self_attn.o_proj",
    "blocks.{n}.mlp_norm": _LAYER + "post_attention_layernorm",
    "blocks.{n}.mlp.gate_up": (_LAYER + "mlp.gate_proj", _LAYER + "mlp.up_proj"),
    "blocks.{n}.mlp.down": _LAYER + "mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
}
_POST_NORMS: Names = {
    "blocks.{n}.attention_post_norm": _LAYER + "post_attention_layernorm",
    "blocks.{n}.mlp_norm": _LAYER + "pre_feedforward_layernorm",
    "blocks.{n}.mlp_post_norm": _LAYER + "post_feedforward_layernorm",
}
_FUSED: Names = {
    "blocks.{n}.attention.qkv": _LAYER + "self_attn.qkv_proj",
    "blocks.{n}.mlp.gate_up": _LAYER + "mlp.gate_up_proj",
}
FULL, SLIDING = "full_attention", "sliding_attention"
Windows = Literal["none", "every layer", "by layer_types", "where use_sliding_window"]


@dataclass(frozen=True)
class Difference:
    """What an architecture does otherwise than Llama."""

    model_type: str
    shape: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `DecoderConfig` that are the same in all models of it."""
    names: Names = field(default_factory=dict)
    windows: Windows = "none"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Fields of its config.json that a file may leave out, where Llama's default is another."""
    biases: bool = True
    """Whether config.json may ask for biases by `attention_bias` and `mlp_bias`."""
    activation: str = "hidden_act"
    """The field that names the activation."""
    refused: tuple[str, ...] = ()
    """Fields that must be null or false: what they ask for is not computed."""
    more: Callable[[Fields], dict[str, Any]] = lambda fields: {}
    """Further fields of `DecoderConfig` from config.json."""


def _gemma3(fields: Fields) -> dict[str, Any]:
    local = fields.number("rope_local_base_freq", 10_000.0)
    nested = fields.values.get("rope_parameters")
    if isinstance(nested, dict) and isinstance(nested.get(SLIDING), dict):
        rope = Fields(fields.path, nested[SLIDING])
        rope.choice("rope_type", "default", ["default"])
        local = rope.number("rope_theta", local)
    scale = fields.number("query_pre_attn_scalar", 256) ** -0.5
    return {"local_rope_theta": local, "attention_scale": scale}


def _smollm3(fields: Fields) -> dict[str, Any]:
    layers = fields.whole("num_hidden_layers")
    rotated = fields.values.get("no_rope_layers")
    if rotated is None:
        every = fields.whole("no_rope_layer_interval", 4)
        rotated = [(index + 1) % every for index in range(layers)]
    if not isinstance(rotated, list) or len(rotated) < layers:
        raise InputError(f"{fields.path}: no_rope_layers: {rotated!r} does not name each of {layers} layers")
    return {"unrotated_layers": tuple(not each for each in rotated[:layers])}


DIFFERENCES = {
    "LlamaForCausalLM": Difference("llama"),
    "Qwen2ForCausalLM": Difference(
        "qwen2", {"qkv_bias": True}, windows="where use_sliding_window", biases=False, refused=("attention_bias",)
    ),
    "Qwen3ForCausalLM": Difference("qwen3", {"qk_norm": True}, windows="where use_sliding_window"),
    "MistralForCausalLM": Difference("mistral", windows="every layer", biases=False),
    "MinistralForCausalLM": Difference("ministral", windows="by layer_types", biases=False),
    "Gemma3ForCausalLM": Difference(
        "gemma3_text",
        {"qk_norm": True, "norms": "both", "norm_offset": True, "scale_embedding": True},
        _POST_NORMS,
        "by layer_types",
        {
            "hidden_activation": "gelu_pytorch_tanh",
            "rope_theta": 1_000_000.0,
            "tie_word_embeddings": True,
            "head_dim": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
        },
        activation="hidden_activation",
        refused=("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"),
        more=_gemma3,
    ),
    "Phi3ForCausalLM": Difference(
        "phi3",
        names=_FUSED,
        windows="every layer",
        defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
        biases=False,
        refused=("attention_bias",),
    ),
    "SmolLM3ForCausalLM": Difference(
        "smollm3",
        windows="where use_sliding_window",
        defaults={"rope_theta": 2_000_000.0, "tie_word_embeddings": True},
        more=_smollm3,
    ),
    "Olmo2ForCausalLM": Difference(
        "olmo2",
        {"qk_norm": True, "joint_norm": True, "norms": "post"},
        _POST_NORMS,
        defaults={"rms_norm_eps": 1e-5},
    ),
}
"""By the name of the architecture in config.json."""


def _read(fields: Fields, architecture: str, difference: Difference) -> DecoderConfig:
    values = {name: value for name, value in fields.values.items() if value is not None}
    fields = Fields(fields.path, {**difference.defaults, **values})
    for name in difference.refused:
        fields.choice(name, False, [False])
    heads, layers = fields.whole("num_attention_heads"), fields.whole("num_hidden_layers")
    if not heads or not layers:
        raise InputError(f"{fields.path}: num_attention_heads {heads} and num_hidden_layers {layers} must be positive")
    head_dim = fields.whole("head_dim", fields.whole("hidden_size") // heads)
    biases = dict.fromkeys(("attention_bias", "mlp_bias"), False)
    if difference.biases:
        biases = {name: fields.choice(name, False, [True, False]) for name in biases}
    window, windowed = _windows(fields, difference.windows, layers)
    shape = {
        "qkv_bias": biases["attention_bias"],
        "out_bias": biases["attention_bias"],
        "mlp_bias": biases["mlp_bias"],
        "window": window,
        "windowed_layers": windowed,
        **_rope(fields, head_dim),
        **difference.more(fields),
        **difference.shape,
    }
    return DecoderConfig(
        vocab_size=fields.whole("vocab_size"),
        embed_dim=fields.whole("hidden_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=fields.whole("num_key_value_heads", heads),
        head_dim=head_dim,
        hidden_dim=fields.whole("intermediate_size"),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        tie_embeddings=fields.choice("tie_word_embeddings", False, [True, False]),
        activation=fields.choice(difference.activation, "silu", ["silu", "gelu", "gelu_pytorch_tanh"]),
        architecture=architecture,
        source=values,
        **shape,
    )


def _windows(fields: Fields, rule: Windows, layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """How many tokens windowed layers see, and which layers are; no window and none where no layer has one."""
    if rule == "none" or rule == "where use_sliding_window":
        enabled = fields.choice("use_sliding_window", False, [False] if rule == "none" else [True, False])
        if not enabled:
            return None, ()
    if fields.values.get("sliding_window") is None:
        return None, ()
    window, types = fields.whole("sliding_window"), fields.values.get("layer_types")
    if rule == "every layer":
        return window, (True,) * layers
    if types is None and "max_window_layers" in fields.values:
        types = [SLIDING if index >= fields.whole("max_window_layers") else FULL for index in range(layers)]
    if types is None and "sliding_window_pattern" in fields.values:
        every = fields.whole("sliding_window_pattern")
        types = [SLIDING if (index + 1) % every else FULL for index in range(layers)]
    types = types or [SLIDING] * layers
    if not isinstance(types, list) or len(types) != layers or not set(types) <= {FULL, SLIDING}:
        raise InputError(
            f"{fields.path}: layer_types: {types!r} does not give {FULL} or {SLIDING} for each of {layers} layers"
        )
    return window, tuple(each == SLIDING for each in types)


def _rope(fields: Fields, head_dim: int) -> dict[str, Any]:
    """Rotary base, dimensions and scaling, and how long a context they are meant for."""
    declared = fields.values.get("rope_parameters") or fields.values.get("rope_scaling") or {}
    if isinstance(declared, dict):
        declared = declared.get(FULL) if isinstance(declared.get(FULL), dict) else declared
    rope = Fields(fields.path, declared if isinstance(declared, dict) else {"rope_type": declared})
    length = fields.whole("max_position_embeddings")
    theta = rope.number("rope_theta", fields.number("rope_theta", 10_000.0))
    share = rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    named = rope.values.get("type", "default")
    rope_type = rope.choice("rope_type", named, ["default", "linear", "dynamic", "llama3", "yarn", "longrope", "su"])
    original = int(
        rope.number("original_max_position_embeddings", float(fields.whole("original_max_position_embeddings", length)))
    )
    scaling = None
    if rope_type in ("longrope", "su") or (rope_type == "yarn" and "short_factor" in rope.values):
        scaling = _longrope(rope, length, original, int(head_dim * share))
        length = min(length, original)  # beyond it, frequencies would change under what is in the cache
    elif rope_type == "linear":
        scaling = RopeScaling("linear", rope.number("factor", None))
    elif rope_type == "llama3":
        scaling = RopeScaling(
            "llama3",
            rope.number("factor", None),
            original,
            rope.number("low_freq_factor", None),
            rope.number("high_freq_factor", None),
        )
    elif rope_type == "yarn":
        scaling = _yarn(rope, length, original)
    # "dynamic" changes nothing up to max_position_embeddings, which is as far as we go.
    return {
        "rope_theta": theta,
        "rotary_dim": None if share == 1 else int(head_dim * share),
        "rope_scaling": scaling,
        "max_seq_len": length,
    }


def _yarn(rope: Fields, length: int, original: int) -> RopeScaling:
    factor = rope.number("factor", length / original)

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    mscale, all_dim = (rope.number(name, 0.0) for name in ("mscale", "mscale_all_dim"))
    usual = magnitude(mscale) / magnitude(all_dim) if mscale and all_dim else magnitude(1)
    return RopeScaling(
        "yarn",
        factor,
        original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.choice("truncate", True, [True, False]),
        attention_factor=rope.number("attention_factor", usual),
    )


def _longrope(rope: Fields, length: int, original: int, rotary_dim: int) -> RopeScaling:
    short = rope.values.get("short_factor")
    if (
        not isinstance(short, list)
        or len(short) != rotary_dim // 2
        or not all(isinstance(x, (int, float)) for x in short)
    ):
        raise InputError(f"{rope.path}: short_factor: {short!r} is not a list of {rotary_dim // 2} numbers")
    factor = rope.number("factor", length / original)
    usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return RopeScaling(
        "longrope", factor, original, attention_factor=rope.number("attention_factor", usual), short_factor=tuple(short)
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    own: dict[str, Any] = {"vocab_size": config.vocab_size, "tie_word_embeddings": config.tie_embeddings}
    if config.source is not None:
        scaling = config.rope_scaling
        if scaling is None or scaling.rope_type != "longrope":  # whose longer context is the source's own
            own["max_position_embeddings"] = config.max_seq_len
        return {**config.source, **own}
    return {
        **own,
        "model_type": "qwen3" if config.qk_norm else "llama",
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
        "hidden_act": "silu",
        "attention_bias": False,
    }


DECODERS: dict[str, Format] = {
    name: Format(
        Decoder,
        partial(_read, architecture=name, difference=difference),
        _write,
        partial(lambda config, names: names, names={**_LLAMA, **difference.names}),
        ignored=("rotary_emb.inv_freq",),
    )
    for name, difference in DIFFERENCES.items()
}
