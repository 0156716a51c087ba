"""The tokenizer and chat template of a GGUF file as `tokenizer.json` and `tokenizer_config.json`.

A file names its pre-tokenizer (`tokenizer.ggml.pre`) without saying what it does: those of the table are known here,
any other is refused by name, because a wrong one would tokenize otherwise without an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from components.config.params import InputError
from components.tokenization.chat_templates import read_template
from components.tokenization.chat_tokenizer import write_tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of token in `tokenizer.ggml.token_type`."""
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _digits_then_gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": _digits_then_gpt2,
    "starcoder": _digits_then_gpt2,
    "llama-bpe": lambda: _split(_LLAMA3),
    "llama3": lambda: _split(_LLAMA3),
    "dbrx": lambda: _split(_LLAMA3),
    "smaug-bpe": lambda: _split(_LLAMA3),
    "qwen2": lambda: _split(_QWEN2),
    "olmo": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
}
"""By the name in `tokenizer.ggml.pre`."""


def unpack_tokenizer(metadata: Mapping[str, Any], path: Path, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json of the GGUF file at `path`.

    Raises: InputError when the file has no tokenizer, or one whose rules are unknown.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if not tokens or not types:
        raise InputError(f"{path}: tokenizer.ggml.tokens is missing; a model without a tokenizer cannot be used")
    if kind == "gpt2":
        tokenizer = _byte_level(metadata, path, tokens)
    elif kind == "llama":
        tokenizer = _sentencepiece(metadata, path, tokens, types)
    else:
        raise InputError(f"{path}: tokenizer.ggml.model: {kind!r} is not supported; allowed: 'gpt2', 'llama'")
    added = [
        AddedToken(token, special=number == _CONTROL, normalized=False)
        for token, number in zip(tokens, types, strict=True)
        if number in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)  # those of the vocabulary keep their ids
    config: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    for hf_name, gguf_name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        number = metadata.get(f"tokenizer.ggml.{gguf_name}_token_id")
        if number is not None and int(number) < len(tokens):
            config[f"{hf_name}_token"] = tokens[int(number)]
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    write_tokenizer(tokenizer, folder, config)


def pack_tokenizer(folder: Path, writer: Any) -> None:
    """Add a model folder's tokenizer and chat template to the library's writer.

    Raises: InputError when llama.cpp does not know the tokenizer's rules.
    """
    file = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    described = json.loads(tokenizer.to_str())
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    added = {token["content"]: token["special"] for token in described["added_tokens"]}
    size = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    tokens = {number: token for token, number in vocabulary.items()}
    texts = [tokens.get(number, f"[PAD{number}]") for number in range(size)]
    types = [_kind(tokens.get(number), added) for number in range(size)]
    if described["model"]["type"] != "BPE":
        raise InputError(f"{file}: model: {described['model']['type']!r} is not supported in GGUF; allowed: BPE")
    if described["model"].get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([-float(number) for number in range(size)])
        prefixed = '"always"' in (splits := json.dumps(described["pre_tokenizer"])) or '"first"' in splits
        writer.add_add_space_prefix(prefixed or "Prepend" in json.dumps(described["normalizer"]))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_known_pre_tokenizer(described, file))
        writer.add_token_merges([" ".join(pair) for pair in described["model"]["merges"]])
    writer.add_token_list(texts)
    writer.add_token_types(types)
    for name, add in (
        ("bos_token", writer.add_bos_token_id),
        ("eos_token", writer.add_eos_token_id),
        ("pad_token", writer.add_pad_token_id),
        ("unk_token", writer.add_unk_token_id),
    ):
        token = config.get(name)
        text = token.get("content") if isinstance(token, Mapping) else token
        if text in vocabulary:
            add(vocabulary[text])
    writer.add_add_bos_token(len(tokenizer.encode("", add_special_tokens=True).ids) > 0)
    writer.add_chat_template(read_template(folder, config))


def _kind(token: str | None, added: Mapping[str, bool]) -> int:
    if token is None:
        return _UNUSED
    if token in added:
        return _CONTROL if added[token] else _USER_DEFINED
    return _BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", token) else _NORMAL


def _known_pre_tokenizer(described: Mapping[str, Any], file: Path) -> str:
    own = _rules(described["pre_tokenizer"])
    for name, make in PRE_TOKENIZERS.items():
        model = Tokenizer(models.BPE())
        model.pre_tokenizer = make()
        if _rules(json.loads(model.to_str())["pre_tokenizer"]) == own:
            return name
    raise InputError(
        f"{file}: pre_tokenizer: llama.cpp knows none that splits so; known are {', '.join(PRE_TOKENIZERS)}"
    )


def _rules(described: Any) -> Any:
    """A pre-tokenizer without what changes offsets alone."""
    if isinstance(described, dict):
        return {key: _rules(value) for key, value in described.items() if key != "trim_offsets"}
    return [_rules(each) for each in described] if isinstance(described, list) else described


def _byte_level(metadata: Mapping[str, Any], path: Path, tokens: Sequence[str]) -> Tokenizer:
    name = metadata.get("tokenizer.ggml.pre", "")
    if name not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise InputError(f"{path}: tokenizer.ggml.pre: {name!r} is not supported; one of {known}")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges") or []]
    ignores = name in ("llama-bpe", "llama3")  # a word that is a token is taken whole, whatever the merges say
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignores))
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[name]()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = _with_bos(metadata, tokens)
    return tokenizer


def _sentencepiece(metadata: Mapping[str, Any], path: Path, tokens: Sequence[str], types: Sequence[int]) -> Tokenizer:
    """SentencePiece's BPE: two pieces merge if their union is a piece, the best score first."""
    scores = metadata.get("tokenizer.ggml.scores")
    if not scores:
        raise InputError(f"{path}: tokenizer.ggml.scores is missing; SentencePiece's pieces merge by them")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    normal = {token for token, kind in zip(tokens, types, strict=True) if kind in (_NORMAL, _UNUSED)}
    merges: list[tuple[float, int, int, str, str]] = []
    for token in normal:
        for index in range(1, len(token)):
            left, right = token[:index], token[index:]
            if left in vocabulary and right in vocabulary:
                merges.append((-scores[vocabulary[token]], vocabulary[left], vocabulary[right], left, right))
    merges.sort(key=lambda merge: merge[:3])
    unknown = tokens[int(metadata.get("tokenizer.ggml.unknown_token_id", 0))]
    pairs = [(left, right) for *_, left, right in merges]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=pairs, unk_token=unknown, fuse_unk=True, byte_fallback=_BYTE in types)
    )
    prefixed = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    steps = [normalizers.Prepend("▁")] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    last = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last])
    tokenizer.post_processor = _with_bos(metadata, tokens)
    return tokenizer


def _with_bos(metadata: Mapping[str, Any], tokens: Sequence[str]) -> processors.PostProcessor:
    """What begins a text that is no chat."""
    number = metadata.get("tokenizer.ggml.bos_token_id")
    if number is None or not metadata.get("tokenizer.ggml.add_bos_token", False):
        return processors.ByteLevel(trim_offsets=False)
    begin = tokens[int(number)]
    return processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[(begin, int(number))]
    )
