"""Encoders of Hugging Face: one table of what each does otherwise than BERT, and what their config.json mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from dataclasses import fields as fields_of
from functools import partial
from typing import Any

from components.config.params import InputError
from components.models.blocks import ACTIVATIONS
from components.models.config_fields import Fields, Format, Names
from components.models.encoder import Classifier, Encoder, EncoderConfig, EncoderForPretraining

FULL, SLIDING = "full_attention", "sliding_attention"
_LAYER = "encoder.layer.{n}."
_BERT: Names = {
    "embed": "embeddings.word_embeddings",
    "position_embed": "embeddings.position_embeddings",
    "segment_embed": "embeddings.token_type_embeddings",
    "embed_norm": "embeddings.LayerNorm",
    "blocks.{n}.attention.qkv": tuple(f"{_LAYER}attention.self.{part}" for part in ("query", "key", "value")),
    "blocks.{n}.attention.out": _LAYER + "attention.output.dense",
    "blocks.{n}.attention_norm": _LAYER + "attention.output.LayerNorm",
    "blocks.{n}.mlp.up": _LAYER + "intermediate.dense",
    "blocks.{n}.mlp.down": _LAYER + "output.dense",
    "blocks.{n}.mlp_norm": _LAYER + "output.LayerNorm",
    "pooler": "pooler.dense",
}
_DISTILBERT: Names = {
    "embed": "embeddings.word_embeddings",
    "position_embed": "embeddings.position_embeddings",
    "embed_norm": "embeddings.LayerNorm",
    "blocks.{n}.attention.qkv": tuple(f"transformer.layer.{{n}}.attention.{part}_lin" for part in "qkv"),
    "blocks.{n}.attention.out": "transformer.layer.{n}.attention.out_lin",
    "blocks.{n}.attention_norm": "transformer.layer.{n}.sa_layer_norm",
    "blocks.{n}.mlp.up": "transformer.layer.{n}.ffn.lin1",
    "blocks.{n}.mlp.down": "transformer.layer.{n}.ffn.lin2",
    "blocks.{n}.mlp_norm": "transformer.layer.{n}.output_layer_norm",
}
_MODERNBERT: Names = {
    "embed": "embeddings.tok_embeddings",
    "embed_norm": "embeddings.norm",
    "blocks.{n}.attention.qkv": "layers.{n}.attn.Wqkv",
    "blocks.{n}.attention.out": "layers.{n}.attn.Wo",
    "blocks.{n}.attention_norm": "layers.{n}.attn_norm",
    "blocks.{n}.mlp.up": "layers.{n}.mlp.Wi",
    "blocks.{n}.mlp.down": "layers.{n}.mlp.Wo",
    "blocks.{n}.mlp_norm": "layers.{n}.mlp_norm",
    "final_norm": "final_norm",
}
_SHAPE: Mapping[str, str] = {
    "vocab_size": "vocab_size",
    "embed_dim": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "hidden_dim": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
}
_FIELDS: Mapping[str, str] = {
    **_SHAPE,
    "num_segments": "type_vocab_size",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "head_dropout": "classifier_dropout",
    "activation": "hidden_act",
    "norm_eps": "layer_norm_eps",
}
_DEFAULTS: Mapping[str, Any] = {
    "num_segments": 2,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation": "gelu",
    "norm_eps": 1e-12,
}
_KINDS = {each.name: str(each.type) for each in fields_of(EncoderConfig)}
_CHOICES: Mapping[str, list[Any]] = {
    "activation": list(ACTIVATIONS),
    "transform_activation": list(ACTIVATIONS),
    "pooled_tokens": ["cls", "mean"],
}


@dataclass(frozen=True)
class Difference:
    """What an architecture does otherwise than BERT."""

    model_type: str
    prefix: str
    """Beginning of the names of the base model's tensors in a model with a head."""
    names: Names = field(default_factory=lambda: _BERT)
    masked_lm: Names = field(default_factory=dict)
    """Names of what the masked-token model has beside the base model."""
    classifier: Names = field(default_factory=dict)
    repeated: tuple[str, ...] = ()
    """Ends of the names of tensors that repeat others."""
    shape: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `EncoderConfig` that are the same in all models of it."""
    fields: Mapping[str, str] = field(default_factory=lambda: _FIELDS)
    """Fields of `EncoderConfig` and what config.json calls them."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Of these, what config.json may leave out, where BERT's default is another."""
    required: Mapping[str, Any] = field(default_factory=dict)
    """Fields of config.json that may have this value alone, or null: what else they ask for is not computed."""
    more: Callable[[Fields, dict[str, Any]], dict[str, Any]] = lambda fields, shape: {}
    """Further fields of `EncoderConfig` from config.json and those that were read before."""


def _roberta(fields: Fields, shape: dict[str, Any]) -> dict[str, Any]:
    pad_id = fields.whole("pad_token_id", 1)
    if shape["max_seq_len"] <= pad_id + 1:
        raise InputError(
            f"{fields.path}: max_position_embeddings: {shape['max_seq_len']} leaves no position behind"
            f" pad_token_id {pad_id}"
        )
    return {"pad_id": pad_id, "max_seq_len": shape["max_seq_len"] - pad_id - 1}


def _modernbert(fields: Fields, shape: dict[str, Any]) -> dict[str, Any]:
    layers = shape["num_layers"]
    types = fields.values.get("layer_types")
    if types is None:
        every = fields.whole("global_attn_every_n_layers", 3)
        types = [SLIDING if every and index % every else FULL for index in range(layers)]
    if not isinstance(types, list) or len(types) != layers or not set(types) <= {FULL, SLIDING}:
        raise InputError(
            f"{fields.path}: layer_types: {types!r} does not give {FULL} or {SLIDING} for each of {layers} layers"
        )
    thetas = {FULL: fields.number("global_rope_theta", 160_000.0), SLIDING: fields.number("local_rope_theta", 10_000.0)}
    for kind in thetas:
        nested = fields.values.get("rope_parameters")
        values = nested.get(kind) if isinstance(nested, dict) else None
        rope = Fields(fields.path, values if isinstance(values, dict) else {})
        rope.choice("rope_type", "default", ["default"])
        thetas[kind] = rope.number("rope_theta", thetas[kind])
    return {
        "windowed_layers": tuple(each == SLIDING for each in types),
        "window": fields.whole("local_attention", 128) // 2,
        "pooler_activation": shape["transform_activation"],
        "rope_theta": thetas[FULL],
        "local_rope_theta": thetas[SLIDING],
    }


_NOT_DECODERS = {"is_decoder": False, "add_cross_attention": False}
_ROBERTA_DIFFERENCE = Difference(
    "roberta",
    "roberta.",
    masked_lm={"transform": "lm_head.dense", "transform_norm": "lm_head.layer_norm", "head.bias": "lm_head.bias"},
    classifier={"pooler": "classifier.dense", "head": "classifier.out_proj"},
    repeated=("position_ids", "lm_head.decoder.weight", "lm_head.decoder.bias"),
    shape={"pooler": "base and classifier", "pooler_dropout": True, "transform_activation": "gelu"},
    required={"position_embedding_type": "absolute", **_NOT_DECODERS},
    more=_roberta,
)
DIFFERENCES = {
    "Bert": Difference(
        "bert",
        "bert.",
        masked_lm={
            "transform": "cls.predictions.transform.dense",
            "transform_norm": "cls.predictions.transform.LayerNorm",
            "head.bias": "cls.predictions.bias",
            "next_sentence": "cls.seq_relationship",
        },
        classifier={"head": "classifier"},
        repeated=("position_ids", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"),
        required={"position_embedding_type": "absolute", **_NOT_DECODERS},
    ),
    "Roberta": _ROBERTA_DIFFERENCE,
    "XLMRoberta": replace(_ROBERTA_DIFFERENCE, model_type="xlm-roberta"),
    "Camembert": replace(_ROBERTA_DIFFERENCE, model_type="camembert"),
    "DistilBert": Difference(
        "distilbert",
        "distilbert.",
        _DISTILBERT,
        {"transform": "vocab_transform", "transform_norm": "vocab_layer_norm", "head.bias": "vocab_projector.bias"},
        {"pooler": "pre_classifier", "head": "classifier"},
        ("position_ids", "vocab_projector.weight"),
        {"pooler": "classifier", "pooler_activation": "relu", "num_segments": 0, "norm_eps": 1e-12},
        {
            "vocab_size": "vocab_size",
            "embed_dim": "dim",
            "num_layers": "n_layers",
            "num_heads": "n_heads",
            "hidden_dim": "hidden_dim",
            "max_seq_len": "max_position_embeddings",
            "dropout": "dropout",
            "attention_dropout": "attention_dropout",
            "head_dropout": "seq_classif_dropout",
            "activation": "activation",
        },
        {"head_dropout": 0.2},
    ),
    "ModernBert": Difference(
        "modernbert",
        "model.",
        _MODERNBERT,
        {"transform": "head.dense", "transform_norm": "head.norm", "head.bias": "decoder.bias"},
        {"pooler": "head.dense", "pooler_norm": "head.norm", "head": "classifier"},
        ("decoder.weight",),
        {"pooler": "classifier", "pre_norm": True, "num_segments": 0},
        {
            **_SHAPE,
            "dropout": "mlp_dropout",
            "attention_dropout": "attention_dropout",
            "embed_dropout": "embedding_dropout",
            "head_dropout": "classifier_dropout",
            "activation": "hidden_activation",
            "norm_eps": "norm_eps",
            "qkv_bias": "attention_bias",
            "mlp_bias": "mlp_bias",
            "norm_bias": "norm_bias",
            "transform_bias": "classifier_bias",
            "head_bias": "decoder_bias",
            "transform_activation": "classifier_activation",
            "pooled_tokens": "classifier_pooling",
        },
        {
            **dict.fromkeys(("dropout", "attention_dropout", "embed_dropout", "head_dropout"), 0.0),
            **dict.fromkeys(("qkv_bias", "mlp_bias", "norm_bias", "transform_bias"), False),
            "head_bias": True,
            "transform_activation": "gelu",
            "pooled_tokens": "cls",
            "norm_eps": 1e-5,
        },
        {"rope_scaling": False},
        _modernbert,
    ),
}
"""By the beginning of the architectures' names in config.json."""


def _read(fields: Fields, family: str, difference: Difference) -> EncoderConfig:
    for name, value in {**difference.required, "tie_word_embeddings": True}.items():
        fields.choice(name, value, [value])
    defaults = {**_DEFAULTS, **difference.defaults}
    shape: dict[str, Any] = {
        name: _value(fields, name, hub_name, defaults.get(name)) for name, hub_name in difference.fields.items()
    }
    if not shape["num_heads"] or shape["embed_dim"] % shape["num_heads"]:
        heads, width = (difference.fields[name] for name in ("num_heads", "embed_dim"))
        raise InputError(f"{fields.path}: {heads}: {shape['num_heads']} does not divide {width} {shape['embed_dim']}")
    if not shape["num_layers"]:
        raise InputError(f"{fields.path}: {difference.fields['num_layers']}: 0 layers; at least 1")
    shape |= {**difference.more(fields, shape), **difference.shape}
    source = {name: value for name, value in fields.values.items() if value is not None}
    return EncoderConfig(**shape, architecture=family, source=source)


def _value(fields: Fields, name: str, hub_name: str, default: Any) -> Any:
    """A field of `EncoderConfig` as config.json has it."""
    kind = _KINDS[name]
    if name in _CHOICES:
        return fields.choice(hub_name, default, _CHOICES[name])
    if kind == "bool":
        return fields.choice(hub_name, default, [True, False])
    if kind == "int":
        return fields.whole(hub_name, default)
    if default is None and "None" in kind and fields.values.get(hub_name) is None:
        return None
    return fields.number(hub_name, default)


def _read_classifier(fields: Fields, family: str, difference: Difference) -> EncoderConfig:
    fields.choice("problem_type", "single_label_classification", ["single_label_classification"])
    names = fields.values.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    if not isinstance(names, dict) or sorted(names) != sorted(map(str, range(len(names)))) or len(names) < 2:
        raise InputError(f"{fields.path}: id2label: {names!r} does not number two or more labels from 0")
    labels = tuple(str(names[str(number)]) for number in range(len(names)))
    return replace(_read(fields, family, difference), labels=labels)


def _write(config: EncoderConfig, difference: Difference) -> dict[str, Any]:
    written = {hub_name: getattr(config, name) for name, hub_name in difference.fields.items()}
    written[difference.fields["max_seq_len"]] = config.num_positions
    for name in ("head_dropout", "embed_dropout"):  # null where it is that of the model, if config.json may say so
        if name in difference.defaults and getattr(config, name) is None:
            written[difference.fields[name]] = config.dropout
    required = {name: value for name, value in difference.required.items() if name == "position_embedding_type"}
    source = dict(config.source or {})
    if config.labels:
        source.pop("problem_type", None)  # of the base
        numbers = {label: number for number, label in enumerate(config.labels)}
        source |= {"id2label": {str(number): label for label, number in numbers.items()}, "label2id": numbers}
    return source | written | required | {"model_type": difference.model_type, "tie_word_embeddings": True}


def _format(family: str, model: type[Encoder]) -> Format:
    difference = DIFFERENCES[family]
    names = dict(difference.names)
    if model is not Encoder:
        names = {name: _behind(difference.prefix, hub_name) for name, hub_name in names.items()}
    heads: Mapping[type[Encoder], Names] = {
        EncoderForPretraining: difference.masked_lm,
        Classifier: difference.classifier,
    }
    names |= heads.get(model, {})
    pooler = difference.names.get("pooler")
    unused = difference.shape.get("pooler") == "base and classifier" and model is not Encoder
    return Format(
        model,
        partial(_read_classifier if model is Classifier else _read, family=family, difference=difference),
        partial(_write, difference=difference),
        partial(lambda config, names: names, names=names),
        # What RoBERTa's folders hold though the model with a head does not read it.
        ignored=(*difference.repeated, *((f"{pooler}.weight", f"{pooler}.bias") if unused else ())),
        optional=() if unused else (f"{difference.prefix}pooler.", "pooler.", "cls.seq_relationship."),
        base=f"{family}Model" if model is EncoderForPretraining else "",
        prefix=difference.prefix,
    )


def _behind(prefix: str, names: str | tuple[str, ...]) -> str | tuple[str, ...]:
    return prefix + names if isinstance(names, str) else tuple(prefix + name for name in names)


_MODELS: Mapping[str, type[Encoder]] = {
    "Model": Encoder,
    "ForPreTraining": EncoderForPretraining,
    "ForMaskedLM": EncoderForPretraining,
    "ForSequenceClassification": Classifier,
}
ENCODERS: dict[str, Format] = {
    family + ending: _format(family, model)
    for family in DIFFERENCES
    for ending, model in _MODELS.items()
    if family == "Bert" or ending != "ForPreTraining"
}


def encoder_architecture(model: Encoder) -> str:
    """The architecture that an encoder is written as."""
    family = model.config.architecture
    ending = next(ending for ending, kind in _MODELS.items() if kind is type(model))
    return family + ("ForMaskedLM" if ending == "ForPreTraining" and family != "Bert" else ending)
