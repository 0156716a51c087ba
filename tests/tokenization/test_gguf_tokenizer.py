"""SentencePiece tokenizers in GGUF files have the ids of the folder that they come from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers.tokenization_utils_base import generate_merges

from components.config.params import InputError
from components.tokenization.gguf_tokenizer import pack_tokenizer, unpack_tokenizer
from components.tokenization.hf_tokenizer import load_chat_tokenizer
from tests.tokenization.hf_tokenizers import HARD, INSTRUCT, gemma, llama_2, sentencepiece, unigram

CHAT = [{"role": "user", "content": "What does <s> json.dumps do?"}, {"role": "assistant", "content": "It serializes."}]


KEYS = {"tokenizer_model": "model", "token_list": "tokens", "token_types": "token_type", "token_scores": "scores"}


class Writer:
    """The tokenizer's part of a GGUF writer: the file's metadata."""

    def __init__(self) -> None:
        self.metadata: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Callable[[Any], None]:
        key = name.removeprefix("add_")
        if key == "chat_template":
            return lambda value: self.metadata.update({"tokenizer.chat_template": value})
        key = {"unk_token_id": "unknown_token_id", "pad_token_id": "padding_token_id"}.get(key, KEYS.get(key, key))
        return lambda value: self.metadata.update({f"tokenizer.ggml.{key}": value})


def through_gguf(folder: Path, target: Path) -> Path:
    vocab_size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    (folder / "config.json").write_text(json.dumps({"vocab_size": vocab_size, "model_type": "mistral"}))
    writer = Writer()
    pack_tokenizer(folder, writer)
    unpack_tokenizer(writer.metadata, target / "model.gguf", target)
    return target


@pytest.mark.parametrize("make", [llama_2, sentencepiece, gemma])
def test_a_sentencepiece_tokenizer_comes_back_as_it_went(make: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    back, own = load_chat_tokenizer(through_gguf(folder, tmp_path / "back")), load_chat_tokenizer(folder)
    for text in HARD:
        if make is not sentencepiece or not text.startswith(" "):  # where Metaspace alone adds no prefix
            assert back.encode(text) == own.encode(text)
    assert back.special_ids == own.special_ids
    assert back.template == own.template


def test_pieces_merge_by_their_scores_as_in_transformers(tmp_path: Path) -> None:
    """Whichever pair makes a piece: sentencepiece knows no merges, only pieces."""
    described = json.loads((llama_2(tmp_path) / "tokenizer.json").read_text())
    vocab = described["model"]["vocab"]
    tokens = sorted(vocab, key=lambda token: vocab[token])
    scores = {token: -float((number * 7919) % 1000) for number, token in enumerate(tokens)}
    types = [3 if number < 5 else 6 if token.startswith("<0x") else 1 for number, token in enumerate(tokens)]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [scores[token] for token in tokens],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": INSTRUCT,
    }
    unpack_tokenizer(metadata, tmp_path / "model.gguf", tmp_path / "back")
    described["model"]["merges"] = generate_merges(vocab, scores, set(tokens[:5]))
    reference = Tokenizer.from_str(json.dumps(described))
    reference.encode_special_tokens = True
    own = load_chat_tokenizer(tmp_path / "back")
    for text in HARD:
        assert own.encode(text) == reference.encode(text, add_special_tokens=False).ids


def test_unigram_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.json: model: 'Unigram' is not supported in GGUF; allowed: BPE"):
        through_gguf(unigram(tmp_path / "model"), tmp_path / "back")
