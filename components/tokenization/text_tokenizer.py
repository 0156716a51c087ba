"""Tokenizers of the encoder and the encoder-decoder: byte-level BPE in Hugging Face's format, without unknown tokens.

The encoder's is uncased, as uncased BERT's: `[CLS] text [SEP]`, or `[CLS] a [SEP] b [SEP]`. The encoder-decoder's
keeps every character, and splits names and digits as the decoder's does: `text </s>`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from tokenizers import Encoding, Regex, Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from components.config.params import InputError
from components.tokenization.chat_tokenizer import SPLIT, read_json, reading_tokenizer, train_bpe, write_tokenizer

PAD, CLS, SEP, MASK = ENCODER_TOKENS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")
SENTINELS = tuple(f"<extra_id_{number}>" for number in range(100))
ENCODER_DECODER_TOKENS = ("<pad>", "</s>", *SENTINELS)
_WORDS = r" ?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]|\s"


def train_encoder(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn the encoder's tokenizer; see `train_bpe`."""
    normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
            normalizers.Prepend(" "),
        ]
    )
    tokenizer = train_bpe(texts, vocab_size, _WORDS, ENCODER_TOKENS, normalizer)
    ends = [(token, ENCODER_TOKENS.index(token)) for token in (CLS, SEP)]
    tokenizer.post_processor = TemplateProcessing(
        single=f"{CLS} $A {SEP}", pair=f"{CLS} $A {SEP} $B:1 {SEP}:1", special_tokens=ends
    )
    return tokenizer


def train_encoder_decoder(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn the encoder-decoder's tokenizer; see `train_bpe`."""
    tokenizer = train_bpe(texts, vocab_size, SPLIT, ENCODER_DECODER_TOKENS, normalizers.Prepend(" "))
    tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", ENCODER_DECODER_TOKENS.index("</s>"))]
    )
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write an encoder's or encoder-decoder's tokenizer; see `write_tokenizer`."""
    is_encoder = tokenizer.token_to_id(MASK) is not None
    inputs = ["input_ids", *(["token_type_ids"] if is_encoder else []), "attention_mask"]
    config = {"model_input_names": inputs, "clean_up_tokenization_spaces": False}
    write_tokenizer(tokenizer, folder, {**(_BERT if is_encoder else _T5), **config})


def read_tokenizer(folder: Path) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer of a tokenizer or model folder, and its special tokens by role, as AutoTokenizer reads them.

    Published BERT and T5 folders have a short tokenizer_config.json, or none: the rest are defaults of their class.

    Raises: InputError when a file is missing or unreadable.
    """
    required = ["tokenizer.json", *(["tokenizer_config.json"] if not (folder / "config.json").is_file() else [])]
    with reading_tokenizer(folder, required) as (tokenizer, config):
        model = read_json(folder / "config.json")
        special_tokens = read_json(folder / "special_tokens_map.json")
        family = (config.get("tokenizer_class") or model.get("model_type") or "").removesuffix("Fast")
        if family in _LIKE_BERT:
            _normalize_as_bert(tokenizer, config)
        elif family in _LIKE_ROBERTA and isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel):
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=config.get("add_prefix_space", False))
        elif family in _LIKE_SENTENCEPIECE and isinstance(tokenizer.model, models.Unigram):
            _split_as_sentencepiece(tokenizer, family, config)
        if isinstance(tokenizer.model, models.Unigram):
            break_special_tokens(tokenizer)
        # special_tokens_map.json counts before the configuration, unless that lists the tokens itself.
        sources = [config] if "added_tokens_decoder" in config else [special_tokens, config]
        return tokenizer, _special_tokens(tokenizer, [*sources, _DEFAULTS.get(family, {})], model)


_BERT: Mapping[str, str] = {"pad_token": PAD, "cls_token": CLS, "sep_token": SEP, "mask_token": MASK}
_T5: Mapping[str, str] = {"pad_token": "<pad>", "eos_token": "</s>"}
_ROBERTA: Mapping[str, str] = {
    "pad_token": "<pad>",
    "cls_token": "<s>",
    "sep_token": "</s>",
    "mask_token": "<mask>",
    "eos_token": "</s>",
}
_LIKE_BERT = ("bert", "BertTokenizer", "distilbert", "DistilBertTokenizer")
_LIKE_ROBERTA = ("roberta", "RobertaTokenizer")
_LIKE_XLM_ROBERTA = ("xlm-roberta", "XLMRobertaTokenizer", "camembert", "CamembertTokenizer")
_LIKE_T5 = ("t5", "T5Tokenizer", "mt5", "MT5Tokenizer")
_LIKE_SENTENCEPIECE = (*_LIKE_XLM_ROBERTA, *_LIKE_T5)
"""By model_type, and by the name of the tokenizer's class."""
_DEFAULTS = {
    **dict.fromkeys(_LIKE_BERT, _BERT),
    **dict.fromkeys((*_LIKE_ROBERTA, *_LIKE_XLM_ROBERTA), _ROBERTA),
    **dict.fromkeys(_LIKE_T5, _T5),
}
"""Default special tokens of the tokenizer classes of transformers."""
_ROLES = {CLS: "cls_token", SEP: "sep_token", MASK: "mask_token", "</s>": "eos_token"}


def _special_tokens(
    tokenizer: Tokenizer, sources: Sequence[Mapping[str, Any]], model: Mapping[str, Any]
) -> dict[str, str]:
    """Each role's token: the first in the vocabulary of those that `sources` name and those that the files imply."""
    content = json.loads(tokenizer.to_str())
    padding, processor = content.get("padding") or {}, content.get("post_processor") or {}
    ends = [piece["SpecialToken"]["id"] for piece in processor.get("single") or () if "SpecialToken" in piece]
    cls, sep = [*ends, *(processor[end][0] for end in ("cls", "sep") if end in processor), None, None][:2]
    implied = {
        "pad_token": (padding.get("pad_token"), PAD, "<pad>"),
        "cls_token": (cls, CLS),
        "sep_token": (sep, SEP),
        "mask_token": (MASK, "<mask>"),
        "eos_token": (ends[-1] if ends else None, "</s>"),
    }
    tokens = {}
    for role, others in implied.items():
        named = [source.get(role) for source in sources]
        texts = [token.get("content") if isinstance(token, Mapping) else token for token in named]
        number = model.get(f"{role}_id")
        texts.append(tokenizer.id_to_token(number) if isinstance(number, int) and number >= 0 else None)
        known = (text for text in (*texts, *others) if text and tokenizer.token_to_id(text) is not None)
        if (text := next(known, None)) is not None:
            tokens[role] = text
    return tokens


def _normalize_as_bert(tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
    """Set case and accents by the configuration, whatever is in tokenizer.json, as BertTokenizer does."""
    if isinstance(tokenizer.normalizer, normalizers.BertNormalizer):
        tokenizer.normalizer = normalizers.BertNormalizer(
            handle_chinese_chars=config.get("tokenize_chinese_chars", True),
            strip_accents=config.get("strip_accents"),
            lowercase=config.get("do_lower_case", True),
        )


def _split_as_sentencepiece(tokenizer: Tokenizer, family: str, config: Mapping[str, Any]) -> None:
    """Normalize and split as the class does, of whose tokenizer.json the characters' map alone counts."""
    current = tokenizer.normalizer
    parts = list(cast(Any, current)) if isinstance(current, normalizers.Sequence) else [current]
    tokenizer.normalizer = next((part for part in parts if isinstance(part, normalizers.Precompiled)), None)
    prefix = family in _LIKE_T5 or config.get("add_prefix_space", True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always" if prefix else "never")]
    )


def break_special_tokens(tokenizer: Tokenizer) -> None:
    """Split what spells a special token behind its first character: to Unigram it is a piece like any other.

    SentencePiece itself never reads such a piece from text; the `tokenizers` library, and `transformers` with it, does.
    """
    added = (token for token in tokenizer.get_added_tokens_decoder().values() if token.special)
    spelled = [re.escape(token.content[0]) + f"(?={re.escape(token.content[1:])})" for token in added]
    if spelled:
        breaks = pre_tokenizers.Split(Regex("|".join(spelled)), "isolated")
        before = [tokenizer.pre_tokenizer] if tokenizer.pre_tokenizer is not None else []
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, breaks])


class TextTokenizer:
    """The tokenizer of an encoder's or encoder-decoder's folder."""

    def __init__(self, tokenizer: Tokenizer, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens` by role: `pad_token` and so on."""
        self._tokenizer, self._special_tokens = tokenizer, special_tokens
        # Text never turns into a special token.
        self._tokenizer.encode_special_tokens = True
        self.vocab_size: int = tokenizer.get_vocab_size()
        self.pad_id = self.id_of(special_tokens["pad_token"])

    @classmethod
    def load(cls, folder: Path) -> TextTokenizer:
        """Read a tokenizer or model folder.

        Raises: InputError when a file is missing or unreadable.
        """
        tokenizer, special_tokens = read_tokenizer(folder)
        if "pad_token" not in special_tokens:
            raise InputError(f"{folder / 'tokenizer_config.json'}: pad_token is missing; name the token that pads")
        # The caller truncates and pads, whatever the folder's settings.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(tokenizer, special_tokens)

    def id_of(self, token: str) -> int:
        """The id of a special token; for CLS, SEP, MASK and `</s>`, of the token with that role.

        Raises: InputError when there is none.
        """
        number = self._tokenizer.token_to_id(self._special_tokens.get(_ROLES.get(token, ""), token))
        if number is None:
            raise InputError(f"tokenizer.json: special token {token!r} is missing; train it with this project")
        return int(number)

    @property
    def sentinels(self) -> list[int]:
        """Ids of `<extra_id_0>` and its successors, as many as there are."""
        ids = (self._tokenizer.token_to_id(token) for token in SENTINELS)
        return [number for number in ids if number is not None]

    @property
    def regular(self) -> range:
        """The longest run of ids without a special token: these come first, or as RoBERTa's mask last."""
        added = self._tokenizer.get_added_tokens_decoder()
        special = sorted(number for number, token in added.items() if token.special)
        ends = zip([-1, *special], [*special, self.vocab_size], strict=True)
        return max((range(before + 1, end) for before, end in ends), key=len)

    def encode_batch(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """Ids of texts, on all cores; with `special`, with the special tokens around a text."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=special)]

    def encodings(self, texts: Sequence[str]) -> list[Encoding]:
        """The texts' tokens with their word numbers, without special tokens."""
        return list(self._tokenizer.encode_batch(list(texts), add_special_tokens=False))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; special tokens have none."""
        return str(self._tokenizer.decode([int(number) for number in ids], skip_special_tokens=True)).removeprefix(" ")
