"""Text to token ids and back: byte-level BPE that splits names and digits so that copying is learnable.

Chats are rendered by the Jinja template of the model folder, in training as in serving; its `generation` block is the
training mask.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from components.config.params import InputError
from components.media.messages import IMAGE, PicturesUnsupported, pictures_of
from components.tokenization.call_formats import BARE, CallFormat
from components.tokenization.chat_templates import (
    PICTURE,
    compile_template,
    defused,
    marked_pieces,
    plain_messages,
)
from components.tokenization.tool_calls import Turn, parse_fields

SPECIAL_TOKENS = (
    "<|pad|>",
    "<|end|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
    "<|call|>",
    "<|argument|>",
    "<|value|>",
    "<|tools|>",
    "<|document|>",
)
TEMPLATE_FILE = Path(__file__).with_name("chat_template.jinja")

# Words take a leading space, except a name's first (dotted, underscored or camelCase): behind a space
# or a quote, a name is spelled alike. Parts of camelCase, each digit, mark and underscore stand alone.
_SPACE = r"(?: (?![\p{L}\p{N}_]*(?:[\p{Ll}\p{N}]\p{Lu}|_|\.[\p{L}_])))?"
SPLIT = (
    rf"{_SPACE}\p{{Lu}}+(?!\p{{Ll}})|{_SPACE}\p{{Lu}}?[\p{{Ll}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]+|\p{{N}}"
    r"|\s+(?!\S)|\s|[^\s\p{L}\p{N}]"
)


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train the chat tokenizer; see `train_bpe`."""
    return train_bpe(texts, vocab_size, SPLIT, SPECIAL_TOKENS)


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    split: str,
    special_tokens: Sequence[str],
    normalizer: normalizers.Normalizer | None = None,
) -> Tokenizer:
    """Learn byte-level BPE merges within the pieces of the pattern `split`.

    `vocab_size` counts the special tokens, which come first, and the 256 bytes.
    """
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a chat tokenizer; see `write_tokenizer`."""
    config = {"eos_token": "<|end|>", "pad_token": "<|pad|>", "clean_up_tokenization_spaces": False}
    write_tokenizer(tokenizer, folder, {**config, "chat_template": TEMPLATE_FILE.read_text(encoding="utf-8")})


def write_tokenizer(tokenizer: Tokenizer, folder: Path, config: Mapping[str, Any]) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` as Hugging Face's loaders expect them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    text = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


@contextmanager
def reading_tokenizer(folder: Path, required: Sequence[str]) -> Iterator[tuple[Tokenizer, dict[str, Any]]]:
    """The tokenizer and the tokenizer_config.json of a tokenizer or model folder.

    Raises: InputError when a required file is missing, or when they cannot be read, also by the caller's block.
    """
    # The library's threads and a forked stage do not mix; without this setting it only warns.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for name in required:
        if not (folder / name).is_file():
            raise InputError(f'{folder / name}: not found; run "loopwright run --until train_tokenizer"')
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        yield tokenizer, read_json(folder / "tokenizer_config.json")
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{folder}: not a readable tokenizer: {' '.join(str(error).split())}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The content of a file; empty where there is none."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content


class ChatTokenizer:
    """The tokenizer of a model folder with its chat template."""

    native = True
    """Of this project's own training: calls are tokens and text that a grammar can constrain."""
    _special: re.Pattern[str]
    """The beginning of a special token spelled out."""
    image_token = ""
    """The token of a picture's embeddings; empty of a model that reads text only."""
    image_id = -1
    image_tokens = 0
    """Tokens of a picture."""
    _variables: Mapping[str, str] = {}
    """Variables of the template beside the chat."""

    def __init__(self, tokenizer: Tokenizer, template: str) -> None:
        self._tokenizer = tokenizer
        # Text never turns into a special token: rendered chats name theirs explicitly (see _parts).
        self._tokenizer.encode_special_tokens = True
        self.template = template
        self._template = compile_template(template)
        self._special = re.compile("<\\|(?=(?:" + "|".join(token[2:-2] for token in SPECIAL_TOKENS) + ")\\|>)")
        self._ids: dict[str, int] = {token: tokenizer.token_to_id(token) or 0 for token in SPECIAL_TOKENS}
        self._names = {number: token for token, number in self._ids.items()}
        self.vocab_size: int = tokenizer.get_vocab_size()
        self.pad_id: int = self._ids["<|pad|>"]
        self.end_id: int = self._ids["<|end|>"]
        self.document_id: int = self._ids["<|document|>"]
        self.value_id: int = self._ids["<|value|>"]
        self.tool_id: int = self._ids["<|tool|>"]

    @property
    def knows_tools(self) -> bool:
        """Whether the template declares tools, and writes calls and results so that they can be read back."""
        return True

    @property
    def call_format(self) -> CallFormat:
        """How a tokenizer of another family writes calls."""
        return BARE

    def with_tools(self) -> ChatTokenizer:
        """This tokenizer, with a template that knows tools."""
        return self

    def with_images(self, image_tokens: int, image_token: str = IMAGE) -> ChatTokenizer:
        """This tokenizer, which gives a picture so many tokens; a vocabulary without `image_token` gets it."""
        extended = Tokenizer.from_str(self._tokenizer.to_str())
        extended.add_special_tokens([AddedToken(image_token, special=True, normalized=False)])
        tokenizer = self._extended(extended)
        tokenizer.image_token, tokenizer.image_tokens = image_token, image_tokens
        tokenizer.image_id = number = extended.get_vocab(with_added_tokens=True)[image_token]
        tokenizer._ids[image_token], tokenizer._names[number] = number, image_token
        first, rest = re.escape(image_token[0]), re.escape(image_token[1:])
        tokenizer._special = re.compile(f"{tokenizer._special.pattern}|{first}(?={rest})")
        return tokenizer

    def _extended(self, tokenizer: Tokenizer) -> ChatTokenizer:
        return ChatTokenizer(tokenizer, self.template)

    def to_json(self) -> str:
        """The content of its tokenizer.json."""
        text: str = self._tokenizer.to_str(pretty=True)
        return text

    @property
    def special_ids(self) -> Mapping[str, int]:
        """The special tokens of chats and their ids."""
        return self._ids

    @property
    def _plain(self) -> Tokenizer:
        """For text that is no chat: special tokens in it are text."""
        return self._tokenizer

    @cached_property
    def _bytes(self) -> list[bytes]:
        """The bytes of each token id; empty for special tokens."""
        alphabet = byte_of_character()
        table = [b""] * self.vocab_size
        for text, number in self._tokenizer.get_vocab(with_added_tokens=False).items():
            if number not in self._names:
                table[number] = bytes(alphabet[character] for character in text)
        return table

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; special tokens in it are text."""
        return list(self._plain.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        return [encoding.ids for encoding in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; special tokens have none, invalid UTF-8 becomes U+FFFD."""
        return b"".join(self.token_bytes(number) for number in ids).decode("utf-8", errors="replace")

    def token_bytes(self, number: int) -> bytes:
        """The bytes of an id; none for a special token, and for those by which a model's vocabulary is larger."""
        return self._bytes[number] if number < len(self._bytes) else b""

    def stream(self) -> TextStream:
        """Turn ids into text one at a time."""
        return TextStream(self._bytes)

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Any = None, add_generation_prompt: bool = False
    ) -> str:
        """The chat as one text, special tokens spelled out."""
        return "".join(text for text, _ in self._render(messages, tools, add_generation_prompt))

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], tools: Any = None, add_generation_prompt: bool = False
    ) -> tuple[list[int], list[int]]:
        """Ids of a chat and their training mask (1: the model writes this token)."""
        return self.encode_chats([(messages, tools)], add_generation_prompt)[0]

    def encode_chats(
        self, chats: Sequence[tuple[Sequence[Mapping[str, Any]], Any]], add_generation_prompt: bool = False
    ) -> list[tuple[list[int], list[int]]]:
        """`encode_chat` of many `(messages, tools)`, with one call to the tokenizer for all their text.

        Raises: InputError when there are pictures that the model does not read.
        """
        chats_ids = self._encode_texts(chats, add_generation_prompt)
        for number, (messages, _) in enumerate(chats):
            if pictures := pictures_of(messages):
                chats_ids[number] = self._with_pictures(*chats_ids[number], len(pictures))
        return chats_ids

    def _with_pictures(self, ids: list[int], mask: list[int], pictures: int) -> tuple[list[int], list[int]]:
        """Ids and mask with each image token repeated for the patches of its picture."""
        if not self.image_tokens:
            raise PicturesUnsupported("messages: this model reads text only; leave pictures and clips out")
        if ids.count(self.image_id) != pictures:
            raise InputError(
                f"messages: the chat template shows {ids.count(self.image_id)} of {pictures} pictures; put pictures"
                " into messages of the user"
            )
        counts = [self.image_tokens if number == self.image_id else 1 for number in ids]
        repeated = (
            [value for value, count in zip(values, counts, strict=True) for _ in range(count)] for values in (ids, mask)
        )
        return next(repeated), next(repeated)

    def _encode_texts(
        self, chats: Sequence[tuple[Sequence[Mapping[str, Any]], Any]], add_generation_prompt: bool
    ) -> list[tuple[list[int], list[int]]]:
        """`encode_chats` with one token for a picture."""
        rendered = [self._parts(messages, tools, add_generation_prompt) for messages, tools in chats]
        encoded = iter(self.encode_batch([text for parts in rendered for text, number, _ in parts if number is None]))
        chats_ids = []
        for parts in rendered:
            ids: list[int] = []
            mask: list[int] = []
            for _, number, generated in parts:
                piece = next(encoded) if number is None else [number]
                ids += piece
                mask += [int(generated)] * len(piece)
            chats_ids.append((ids, mask))
        return chats_ids

    def parse_turn(self, ids: Iterable[int]) -> Turn:
        """The turn of the ids that the model generated after <|assistant|>, up to <|end|>."""
        return parse_fields(self._fields(ids))

    def _fields(self, ids: Iterable[int]) -> Iterator[tuple[str, str]]:
        """`(special token, text after it)`; the first has no token before it."""
        kind, piece = "", list[int]()
        for number in ids:
            if number not in self._names:
                piece.append(number)
                continue
            yield kind, self.decode(piece).removeprefix(" ")
            kind, piece = self._names[number], []
            if number == self.end_id:
                return
        yield kind, self.decode(piece).removeprefix(" ")

    def _render(self, messages: Sequence[Mapping[str, Any]], tools: Any, prompt: bool) -> list[tuple[str, bool]]:
        """`(text, whether the model writes it)` in order."""
        if isinstance(tools, str):
            tools = json.loads(tools)
        rendered = self._template(
            messages=plain_messages(messages, self._special),
            tools=defused(tools, self._special) or None,
            add_generation_prompt=prompt,
            **self._variables,
        )
        return [(text.replace(PICTURE, self.image_token), generated) for text, generated in marked_pieces(rendered)]

    def _parts(
        self, messages: Sequence[Mapping[str, Any]], tools: Any, prompt: bool
    ) -> list[tuple[str, int | None, bool]]:
        """`(text, its id if it is a special token of the template, whether the model writes it)` in order."""
        return [
            (part, self._ids.get(part), generated)
            for text, generated in self._render(messages, tools, prompt)
            for part in re.split(f"({'|'.join(map(re.escape, self._ids))})", text)
            if part
        ]


class TextStream:
    """Ids in, text out, never half a character."""

    def __init__(self, table: Sequence[bytes]) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, number: int) -> str:
        """Text that became complete with this id; may be empty."""
        return self._decoder.decode(self._table[number])

    def flush(self) -> str:
        """The rest: U+FFFD if the last character is incomplete."""
        return self._decoder.decode(b"", final=True)


def byte_of_character() -> dict[str, int]:
    """The printable stand-in of each byte in byte-level BPE (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    for offset, byte in enumerate(sorted(set(range(256)) - set(printable))):
        table[chr(256 + offset)] = byte
    return table
