"""Tokenizers of encoder and encoder-decoder: what transformers loads from the folder gives the same ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from components.config.params import InputError
from components.inference.classifier import load_tokenizer
from components.tokenization import text_tokenizer
from components.tokenization.text_tokenizer import SENTINELS, TextTokenizer
from tests.tokenization.hf_tokenizers import HARD, distilbert, modernbert, mt5, roberta, xlm_roberta

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


def published(folder: Path, family: str) -> Path:
    """A tokenizer.json as google-bert's and google-t5's folders have it, with their model_type."""
    folder.mkdir()
    if family == "bert":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        tokenizer.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special))
        tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
        )
        tokenizer.decoder = decoders.Metaspace()
        special = ["<pad>", "</s>", "<unk>"]
        tokenizer.train_from_iterator(
            TEXTS, trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>")
        )
        tokenizer.post_processor = TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    return folder


SHORT: list[dict[str, Any]] = [
    {},  # no tokenizer_config.json at all
    {"tokenizer_config.json": {}},
    {"tokenizer_config.json": {"do_lower_case": False, "model_max_length": 512}},
    {"tokenizer_config.json": {"do_lower_case": True, "strip_accents": False}},
    {"tokenizer_config.json": {"tokenizer_class": "{class}", "model_max_length": 512}},
    {"tokenizer_config.json": {"pad_token": "{unk}"}},
    {"tokenizer_config.json": {"pad_token": {"content": "{unk}", "__type": "AddedToken", "special": True}}},
    {"tokenizer_config.json": {}, "special_tokens_map.json": {"pad_token": "{unk}"}},
    {"tokenizer_config.json": {"pad_token": "{pad}"}, "special_tokens_map.json": {"pad_token": "{unk}"}},
    {
        "tokenizer_config.json": {"pad_token": "{pad}", "added_tokens_decoder": {}},
        "special_tokens_map.json": {"pad_token": "{unk}"},
    },
]


@pytest.mark.parametrize("family", ["bert", "t5"])
@pytest.mark.parametrize("files", SHORT, ids=str)
def test_short_configurations_are_read_as_transformers_reads_them(
    files: dict[str, Any], family: str, tmp_path: Path
) -> None:
    folder = published(tmp_path / "published", family)
    names = {"bert": ("[UNK]", "[PAD]", "BertTokenizer"), "t5": ("<unk>", "<pad>", "T5Tokenizer")}[family]
    for name, values in files.items():
        text = json.dumps(values)
        for mark, value in zip(("{unk}", "{pad}", "{class}"), names, strict=True):
            text = text.replace(mark, value)
        (folder / name).write_text(text)
    ours, theirs = TextTokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.pad_id == theirs.pad_token_id
    assert ours.encode_batch(ASKED, special=True) == theirs(ASKED)["input_ids"]
    assert [encoding.ids for encoding in load_tokenizer(folder).encode_batch(ASKED)] == theirs(ASKED)["input_ids"]
    if family == "bert":
        roles = {"[CLS]": theirs.cls_token_id, "[SEP]": theirs.sep_token_id, "[MASK]": theirs.mask_token_id}
    else:
        roles = {"</s>": theirs.eos_token_id}
    assert {token: ours.id_of(token) for token in roles} == roles


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (roberta, {}),
        (roberta, {"add_prefix_space": True, "tokenizer_class": "RobertaTokenizer"}),
        (xlm_roberta, {}),
        (xlm_roberta, {"tokenizer_class": "XLMRobertaTokenizerFast"}),
        (xlm_roberta, {"add_prefix_space": False}),
        (mt5, {}),
        (mt5, {"tokenizer_class": "T5Tokenizer"}),
        (distilbert, {}),
        (distilbert, {"do_lower_case": False, "tokenizer_class": "DistilBertTokenizer"}),
        (modernbert, {}),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_hard_texts_are_read_as_transformers_reads_them(
    make: Callable[..., Path], config: dict[str, Any], tmp_path: Path
) -> None:
    """What a user types never becomes a special token: `split_special_tokens` there, which Unigram does not heed."""
    folder = make(tmp_path / "published", **config)
    ours, theirs = TextTokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    special = {number for number, token in theirs.added_tokens_decoder.items() if token.special}
    heeded = make not in (xlm_roberta, mt5)
    asked = [text for text in HARD if heeded or not any(token in text for token in theirs.all_special_tokens)]
    expected = theirs(asked, split_special_tokens=True)["input_ids"]
    assert ours.encode_batch(asked, special=True) == expected
    served = load_tokenizer(folder)
    served.encode_special_tokens = True
    assert [encoding.ids for encoding in served.encode_batch(asked)] == expected
    assert ours.pad_id == theirs.pad_token_id
    if make is not mt5:
        roles = {"[CLS]": theirs.cls_token_id, "[SEP]": theirs.sep_token_id, "[MASK]": theirs.mask_token_id}
        assert {token: ours.id_of(token) for token in roles} == roles
    assert not special & set(ours.regular)
    assert len(ours.regular) > 100
    assert max(ours.regular) < ours.vocab_size
    outside = [number for ids in ours.encode_batch(HARD) for number in ids if number in special]
    assert set(outside) <= {theirs.unk_token_id}


def test_special_tokens_that_only_the_processor_names_are_found(tmp_path: Path) -> None:
    """Of a class that has no names of its own; AutoTokenizer knows none, and pads nothing."""
    folder = published(tmp_path / "published", "bert")
    text = (folder / "tokenizer.json").read_text()
    for old, new in (("[PAD]", "<pad>"), ("[CLS]", "<s>"), ("[SEP]", "</s>"), ("[MASK]", "<mask>")):
        text = text.replace(old, new)
    (folder / "tokenizer.json").write_text(text)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    ours = TextTokenizer.load(folder)
    assert [ours.pad_id, *map(ours.id_of, ("[CLS]", "[SEP]", "[MASK]"))] == [0, 2, 3, 4]


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


def test_a_missing_or_broken_tokenizer_is_reported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer.json: not found; run \"loopwright run --until train_tokenizer\""):
        TextTokenizer.load(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match="not a readable tokenizer"):
        TextTokenizer.load(tmp_path)
