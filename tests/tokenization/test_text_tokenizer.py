"""Tokenizers of encoder and encoder-decoder: what transformers loads from the folder gives the same ids."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from components.config.params import InputError
from components.tokenization import text_tokenizer
from components.tokenization.text_tokenizer import SENTINELS, TextTokenizer

TEXTS = [
    f"Return json.dumps of the OrderedDict, item {number}.\n\n    def foo(x):\n        return x" for number in range(9)
]
ASKED = [*TEXTS[:2], "Füße und 東京 123", "", "  two  spaces"]


@pytest.fixture(params=["encoder", "encoder_decoder"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    train = {"encoder": text_tokenizer.train_encoder, "encoder_decoder": text_tokenizer.train_encoder_decoder}
    text_tokenizer.save(train[request.param](TEXTS, 420), tmp_path / request.param)
    return tmp_path / request.param


def test_transformers_gives_the_same_ids(folder: Path) -> None:
    ours, theirs = TextTokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.encode_batch(ASKED, special=True) == theirs(ASKED)["input_ids"]
    assert (ours.vocab_size, ours.pad_id) == (len(theirs), theirs.pad_token_id)
    assert ours.pad_id == 0


def test_the_encoders_texts_stand_between_cls_and_sep(tmp_path: Path) -> None:
    text_tokenizer.save(text_tokenizer.train_encoder(TEXTS, 420), tmp_path)
    ours, theirs = TextTokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    cls, sep = ours.id_of("[CLS]"), ours.id_of("[SEP]")
    a, b = ours.encode_batch(["some text", "and more"])
    assert theirs("some text", "and more")["input_ids"] == [cls, *a, sep, *b, sep]
    assert theirs("some text", "and more")["token_type_ids"] == [0] * (len(a) + 2) + [1] * (len(b) + 1)
    assert theirs.mask_token_id == ours.id_of("[MASK]")
    assert min(ours.regular) == 4
    assert ours.encode_batch(["Some\n TEXT "]) == [a], "case and white space are not told apart"


def test_the_encoder_decoders_texts_come_back_whole(tmp_path: Path) -> None:
    text_tokenizer.save(text_tokenizer.train_encoder_decoder(TEXTS, 420), tmp_path)
    ours, theirs = TextTokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    encoded = ours.encode_batch(ASKED, special=True)
    assert [ours.decode(ids) for ids in encoded] == ASKED
    assert {ids[-1] for ids in encoded} == {theirs.eos_token_id}
    assert ours.sentinels == theirs.convert_tokens_to_ids(list(SENTINELS))
    assert len(ours.sentinels) == 100


def test_text_never_turns_into_a_special_token(folder: Path) -> None:
    ours = TextTokenizer.load(folder)
    written = {number for ids in ours.encode_batch(["[MASK] [CLS] </s> <extra_id_0> <pad>"]) for number in ids}
    assert not written - set(ours.regular)


def test_a_missing_or_broken_tokenizer_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer.json: not found; run \"loopwright run --until train_tokenizer\""):
        TextTokenizer.load(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match="not a readable tokenizer"):
        TextTokenizer.load(tmp_path)
