"""Hugging Face's formats of our families: architectures, fields of config.json, names of tensors.

One table of names per family, ours to Hugging Face's; a fused product (query-key-value, gate-up) has the names of its
parts. `checkpoint.py` reads and writes by them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from torch import nn

from components.config.params import InputError
from components.models.blocks import ACTIVATIONS
from components.models.config_fields import Fields, Format, Names
from components.models.decoder import Decoder
from components.models.decoder_formats import DECODERS
from components.models.encoder import Classifier, Encoder, EncoderConfig, EncoderForPretraining
from components.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig


def _read_encoder(fields: Fields) -> EncoderConfig:
    fields.choice("position_embedding_type", "absolute", ["absolute"])
    for name, allowed in (("is_decoder", False), ("add_cross_attention", False), ("tie_word_embeddings", True)):
        fields.choice(name, allowed, [allowed])
    has_head_dropout = fields.values.get("classifier_dropout") is not None
    embed_dim, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    if not heads or embed_dim % heads:
        raise InputError(f"{fields.path}: num_attention_heads: {heads} does not divide hidden_size {embed_dim}")
    return EncoderConfig(
        vocab_size=fields.whole("vocab_size"),
        embed_dim=embed_dim,
        num_layers=fields.whole("num_hidden_layers"),
        num_heads=heads,
        hidden_dim=fields.whole("intermediate_size"),
        max_seq_len=fields.whole("max_position_embeddings"),
        num_segments=fields.whole("type_vocab_size", 2),
        dropout=fields.number("hidden_dropout_prob", 0.1),
        attention_dropout=fields.number("attention_probs_dropout_prob", 0.1),
        head_dropout=fields.number("classifier_dropout", 0) if has_head_dropout else None,
        activation=fields.choice("hidden_act", "gelu", list(ACTIVATIONS)),
        norm_eps=fields.number("layer_norm_eps", 1e-12),
    )


def _read_classifier(fields: Fields) -> EncoderConfig:
    fields.choice("problem_type", "single_label_classification", ["single_label_classification"])
    names = fields.values.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    if not isinstance(names, dict) or sorted(names) != sorted(map(str, range(len(names)))) or len(names) < 2:
        raise InputError(f"{fields.path}: id2label: {names!r} does not number two or more labels from 0")
    labels = tuple(str(names[str(number)]) for number in range(len(names)))
    return replace(_read_encoder(fields), labels=labels)


def _write_encoder(config: EncoderConfig) -> dict[str, Any]:
    numbers = {label: number for number, label in enumerate(config.labels)}
    names = {str(number): label for label, number in numbers.items()}
    labels: dict[str, Any] = {"id2label": names, "label2id": numbers} if numbers else {}
    return labels | {
        "model_type": "bert",
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.hidden_dim,
        "max_position_embeddings": config.max_seq_len,
        "type_vocab_size": config.num_segments,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "classifier_dropout": config.head_dropout,
        "hidden_act": config.activation,
        "layer_norm_eps": config.norm_eps,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
    }


_ENCODER: Names = {
    "embed": "embeddings.word_embeddings",
    "position_embed": "embeddings.position_embeddings",
    "segment_embed": "embeddings.token_type_embeddings",
    "embed_norm": "embeddings.LayerNorm",
    "blocks.{n}.attention.qkv": tuple(
        f"encoder.layer.{{n}}.attention.self.{part}" for part in ("query", "key", "value")
    ),
    "blocks.{n}.attention.out": "encoder.layer.{n}.attention.output.dense",
    "blocks.{n}.attention_norm": "encoder.layer.{n}.attention.output.LayerNorm",
    "blocks.{n}.mlp.up": "encoder.layer.{n}.intermediate.dense",
    "blocks.{n}.mlp.down": "encoder.layer.{n}.output.dense",
    "blocks.{n}.mlp_norm": "encoder.layer.{n}.output.LayerNorm",
    "pooler": "pooler.dense",
}
_WITH_HEADS: Names = {
    name: tuple(f"bert.{each}" for each in hub_name) if isinstance(hub_name, tuple) else f"bert.{hub_name}"
    for name, hub_name in _ENCODER.items()
}
_PRETRAINING: Names = {
    **_WITH_HEADS,
    "transform": "cls.predictions.transform.dense",
    "transform_norm": "cls.predictions.transform.LayerNorm",
    "head.bias": "cls.predictions.bias",
    "next_sentence": "cls.seq_relationship",
}


def _encoder(model: type[Encoder], names: Names, read: Callable[[Fields], EncoderConfig] = _read_encoder) -> Format:
    return Format(
        model,
        read,
        _write_encoder,
        lambda config: names,
        ignored=("position_ids", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"),
        optional=("bert.pooler.", "pooler.", "cls.seq_relationship."),
    )


def _read_encoder_decoder(fields: Fields) -> EncoderDecoderConfig:
    fields.choice("is_decoder", False, [False])
    allowed = [prefix + name for prefix in ("", "gated-") for name in ACTIVATIONS]
    *gate, activation = fields.choice("feed_forward_proj", "relu", allowed).split("-")
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
        scale_outputs=fields.choice("scale_decoder_outputs", tied, [True, False]),
        num_buckets=buckets,
        max_distance=fields.whole("relative_attention_max_distance", 128),
        norm_eps=fields.number("layer_norm_epsilon", 1e-6),
        start_id=fields.whole("decoder_start_token_id", fields.whole("pad_token_id", 0)),
    )


def _write_encoder_decoder(config: EncoderDecoderConfig) -> dict[str, Any]:
    activation = config.activation.removesuffix("_new") if config.gated else config.activation
    return {
        "model_type": "t5",
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


FORMATS: dict[str, Format] = {
    **DECODERS,
    "BertModel": _encoder(Encoder, _ENCODER),
    "BertForPreTraining": _encoder(EncoderForPretraining, _PRETRAINING),
    "BertForMaskedLM": _encoder(EncoderForPretraining, _PRETRAINING),
    "BertForSequenceClassification": _encoder(Classifier, {**_WITH_HEADS, "head": "classifier"}, _read_classifier),
    "T5ForConditionalGeneration": Format(
        EncoderDecoder,
        _read_encoder_decoder,
        _write_encoder_decoder,
        _encoder_decoder_names,
        ignored=(
            "coder.embed_tokens.weight",
            "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
        ),
        settle=_tied_where_no_head,
    ),
}
"""By the name of the architecture in config.json."""


def architecture_of(model: nn.Module) -> str:
    """The architecture that a model of ours is written as."""
    if isinstance(model, Decoder):
        return model.config.architecture or ("Qwen3ForCausalLM" if model.config.qk_norm else "LlamaForCausalLM")
    return {
        Encoder: "BertModel",
        EncoderForPretraining: "BertForPreTraining",
        Classifier: "BertForSequenceClassification",
        EncoderDecoder: "T5ForConditionalGeneration",
    }[type(model)]
