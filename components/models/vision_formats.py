"""Formats of sight: SigLIP's tower, and LLaVA's folder of tower, projector and decoder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from components.config.params import InputError
from components.media.messages import IMAGE
from components.models.blocks import ACTIVATIONS
from components.models.config_fields import Fields, Format, Names
from components.models.decoder_formats import DECODERS, DIFFERENCES
from components.models.vision import MEAN, STD, VisionConfig, VisionLanguageConfig, VisionLanguageModel, VisionTower

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
SIGLIP, LLAVA = "SiglipVisionModel", "LlavaForConditionalGeneration"
_LAYER = "encoder.layers.{n}."
_TOWER: Names = {
    "patch_embed": "embeddings.patch_embedding",
    "position_embed": "embeddings.position_embedding",
    "blocks.{n}.attention_norm": _LAYER + "layer_norm1",
    "blocks.{n}.attention.qkv": tuple(f"{_LAYER}self_attn.{part}_proj" for part in "qkv"),
    "blocks.{n}.attention.out": _LAYER + "self_attn.out_proj",
    "blocks.{n}.mlp_norm": _LAYER + "layer_norm2",
    "blocks.{n}.mlp.up": _LAYER + "mlp.fc1",
    "blocks.{n}.mlp.down": _LAYER + "mlp.fc2",
    "final_norm": "post_layernorm",
    "pooling.probe": "head.probe",
    "pooling.attention.qkv.weight": "head.attention.in_proj_weight",
    "pooling.attention.qkv.bias": "head.attention.in_proj_bias",
    "pooling.attention.out": "head.attention.out_proj",
    "pooling.norm": "head.layernorm",
    "pooling.mlp.up": "head.mlp.fc1",
    "pooling.mlp.down": "head.mlp.fc2",
}
_PROJECTOR: Names = {
    "projector.up": "multi_modal_projector.linear_1",
    "projector.down": "multi_modal_projector.linear_2",
}
_BY_MODEL_TYPE = {difference.model_type: name for name, difference in DIFFERENCES.items()}


def _read_tower(fields: Fields) -> VisionConfig:
    fields.choice("num_channels", 3, [3])
    size, patch = fields.whole("image_size", 224), fields.whole("patch_size", 16)
    if not patch or size % patch:
        raise InputError(f"{fields.path}: image_size: {size} is not a multiple of patch_size {patch}")
    return VisionConfig(
        image_size=size,
        patch_size=patch,
        embed_dim=fields.whole("hidden_size", 768),
        num_layers=fields.whole("num_hidden_layers", 12),
        num_heads=fields.whole("num_attention_heads", 12),
        hidden_dim=fields.whole("intermediate_size", 3072),
        activation=fields.choice("hidden_act", "gelu_pytorch_tanh", list(ACTIVATIONS)),
        norm_eps=fields.number("layer_norm_eps", 1e-6),
        pooled=fields.choice("vision_use_head", True, [True, False]),
        source={name: value for name, value in fields.values.items() if value is not None},
    )


def _write_tower(config: VisionConfig) -> dict[str, Any]:
    return {
        **(config.source or {}),
        "model_type": "siglip_vision_model",
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.hidden_dim,
        "hidden_act": config.activation,
        "layer_norm_eps": config.norm_eps,
        "vision_use_head": config.pooled,
    }


def _nested(fields: Fields, name: str) -> Fields:
    values = fields.values.get(name)
    if not isinstance(values, dict):
        raise InputError(f"{fields.path}: {name}: {values!r} is not an object")
    return Fields(fields.path, values)


def _read_llava(fields: Fields) -> VisionLanguageConfig:
    text, vision = _nested(fields, "text_config"), _nested(fields, "vision_config")
    vision.choice("model_type", None, ["siglip_vision_model"])
    fields.choice("vision_feature_select_strategy", "default", ["full"])
    architecture = _BY_MODEL_TYPE[text.choice("model_type", "llama", list(_BY_MODEL_TYPE))]
    tied = fields.values.get("tie_word_embeddings")
    if tied is not None:  # newer writers have it here, older ones in text_config
        text = Fields(text.path, {"tie_word_embeddings": tied, **text.values})
    decoder = DECODERS[architecture].read(text)
    tower = _read_tower(vision)
    layer = fields.values.get("vision_feature_layer", -2)
    layers = range(-tower.num_layers - 1, tower.num_layers + 1)
    if not isinstance(layer, int) or layer not in layers:
        raise InputError(
            f"{fields.path}: vision_feature_layer: {layer!r} is not a layer from {layers[0]} to {layers[-1]}"
        )
    token = fields.values.get("image_token_index", fields.values.get("image_token_id"))
    if not isinstance(token, int) or not 0 <= token < decoder.vocab_size:
        raise InputError(
            f"{fields.path}: image_token_index: {token!r} is no token of the {decoder.vocab_size} of text_config"
        )
    return VisionLanguageConfig(
        **vars(decoder),
        vision=tower,
        image_token_id=token,
        feature_layer=layer,
        projector_activation=fields.choice("projector_hidden_act", "gelu", list(ACTIVATIONS)),
        projector_bias=fields.choice("multimodal_projector_bias", True, [True, False]),
    )


def _write_llava(config: VisionLanguageConfig) -> dict[str, Any]:
    text = _text_architecture(config)
    return {
        "model_type": "llava",
        "text_config": {**DECODERS[text].write(config), "architectures": [text]},
        "vision_config": _write_tower(config.vision),
        "tie_word_embeddings": config.tie_embeddings,
        "image_token_index": config.image_token_id,
        "image_seq_length": config.vision.num_patches,
        "vision_feature_layer": config.feature_layer,
        "vision_feature_select_strategy": "full",
        "projector_hidden_act": config.projector_activation,
        "multimodal_projector_bias": config.projector_bias,
    }


def _text_architecture(config: VisionLanguageConfig) -> str:
    return config.architecture or ("Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM")


def _llava_names(config: VisionLanguageConfig) -> Names:
    decoder = DECODERS[_text_architecture(config)].names(config)
    return {
        **{name: _behind("language_model.", hub_name) for name, hub_name in decoder.items()},
        **{f"vision.{name}": _behind("vision_tower.", hub_name) for name, hub_name in _TOWER.items()},
        **_PROJECTOR,
    }


def _behind(prefix: str, names: str | tuple[str, ...]) -> str | tuple[str, ...]:
    return prefix + names if isinstance(names, str) else tuple(prefix + name for name in names)


def current_name(name: str) -> str:
    """The name of a tensor that `_llava_names` has: LLaVA's parts have been named in three ways."""
    name = re.sub(r"^model\.(?=vision_tower\.|multi_modal_projector\.)", "", name)
    name = re.sub(r"^model\.language_model\.", "language_model.model.", name)
    return re.sub(r"^(vision_tower\.)?vision_model\.", r"\1", name)


def module_name(name: str) -> str:
    """The name of a decoder's tensor in the modules of transformers, by which PEFT names pairs."""
    return re.sub(r"^language_model\.model\.", "model.language_model.", name)


def processor_files(config: VisionLanguageConfig) -> dict[str, dict[str, Any]]:
    """What transformers' AutoProcessor reads: how pictures become pixels, and image tokens."""
    size = config.vision.image_size
    pixels = {
        "image_processor_type": "SiglipImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [MEAN] * 3,
        "image_std": [STD] * 3,
        "do_convert_rgb": True,
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE,
        "patch_size": config.vision.patch_size,
        "vision_feature_select_strategy": "full",
        "num_additional_image_tokens": 0,
    }
    return {PREPROCESSOR: {**pixels, "processor_class": "LlavaProcessor"}, PROCESSOR: processor}


def check_processor(folder: Path) -> None:
    """Raises: InputError when a folder's pictures are normalized otherwise than SigLIP's."""
    path = folder / PREPROCESSOR
    if not path.is_file():
        return
    values = json.loads(path.read_text(encoding="utf-8"))
    for name, expected in (("image_mean", MEAN), ("image_std", STD)):
        if values.get(name, [expected] * 3) != [expected] * 3:
            raise InputError(f"{path}: {name}: {values[name]} is not supported; allowed: {[expected] * 3}")


SIGHT: dict[str, Format] = {
    SIGLIP: Format(VisionTower, _read_tower, _write_tower, lambda config: _TOWER),
    LLAVA: Format(VisionLanguageModel, _read_llava, _write_llava, _llava_names, ignored=("rotary_emb.inv_freq",)),
}
"""By the name of the architecture in config.json."""
