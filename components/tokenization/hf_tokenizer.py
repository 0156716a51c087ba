"""Hugging Face tokenizers: any `tokenizer.json` of byte-level or SentencePiece BPE with a chat template.

What the model writes is told by the template's `generation` block or, without one, by rendering: the prompt before a
turn must begin the whole conversation, and the turn ends with the special token that ends all. No prompt is
tokenized otherwise in training than in serving: ids of a beginning always begin the ids of the whole.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from components.config.params import InputError
from components.tokenization.chat_tokenizer import (
    SPECIAL_TOKENS,
    ChatTokenizer,
    byte_of_character,
    compile_template,
    read_template,
)
from components.tokenization.tool_calls import CALL_MARKS, Call, Turn, parse_json_calls

_GENERATION = re.compile(r"\{%-?\s*generation\b")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
PROBE = ({"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"})
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")


class HFChatTokenizer(ChatTokenizer):
    """A tokenizer with the special tokens, the template and the calls of another model family."""

    native = False

    def __init__(self, tokenizer: Tokenizer, template: str, config: Mapping[str, Any], where: Path) -> None:
        self._where = where
        self._tokenizer = tokenizer
        self._described = json.loads(tokenizer.to_str())
        added = {token["content"]: int(token["id"]) for token in self._described["added_tokens"]}
        special = {token["content"] for token in self._described["added_tokens"] if token["special"]}
        self._added = {number: text for text, number in added.items()}
        self._ids = {text: number for text, number in added.items() if text in special or text in CALL_MARKS}
        self._names = {number: text for text, number in self._ids.items()}
        spelled = sorted(special, key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, spelled)) or r"(?!)")
        self._special = re.compile(
            "|".join(f"{re.escape(one[0])}(?={re.escape(one[1:])})" for one in spelled) or r"(?!)"
        )
        self._variables = {name: text for name in NAMED if (text := _content(config.get(name))) is not None}
        self._marked = bool(_GENERATION.search(template))
        self._template = compile_template(template)
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
        self._end = self._find_end()
        self.end_id = self._ids[self._end]
        self.pad_id = added.get(self._variables.get("pad_token", ""), self.end_id)
        self.document_id = added.get(self._variables.get("bos_token", ""), self.end_id)
        self.value_id = self.tool_id = -1  # no token of its own opens an argument's value, or a tool's result

    def encode(self, text: str) -> list[int]:
        return list(self._plain.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_chats(
        self, chats: Sequence[tuple[Sequence[Mapping[str, Any]], Any]], add_generation_prompt: bool = False
    ) -> list[tuple[list[int], list[int]]]:
        if not self._reads_calls and any(said.get("tool_calls") for messages, _ in chats for said in messages):
            raise InputError(
                f"{self._where}: chat_template: the tool calls that it writes cannot be read back; known are JSON alone"
                " and between <tool_call> and </tool_call>; use conversations without calls, or another template"
            )
        return [self._encode(self._render(messages, tools, add_generation_prompt)) for messages, tools in chats]

    def parse_turn(self, ids: Iterable[int]) -> Turn:
        """Read what the model wrote up to its end: words, and calls as Hermes and Qwen, or Llama, write them."""
        written = []
        for number in ids:
            if number == self.end_id:
                break
            written.append(self._names[number].encode() if number in self._names else self._bytes[number])
        return parse_json_calls(b"".join(written).decode("utf-8", errors="replace"))

    @cached_property
    def _reads_calls(self) -> bool:
        """Whether a call comes back from the template as it was."""
        wanted = Call("probe", {"key": "value"})
        function = {"name": wanted.name, "arguments": wanted.arguments}
        said = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
        try:
            ids, mask = self._encode(self._render([PROBE[0], said], None, False))
        except InputError:
            return False
        return self.parse_turn(number for number, learned in zip(ids, mask, strict=True) if learned).calls == (wanted,)

    @cached_property
    def _plain(self) -> Tokenizer:
        """For text that is no chat: nothing in it is read as a special token."""
        plain = Tokenizer.from_str(self._tokenizer.to_str())
        plain.encode_special_tokens = True
        return plain

    @cached_property
    def _bytes(self) -> list[bytes]:
        kinds = json.dumps(self._described["decoder"])
        if '"ByteLevel"' not in kinds and '"ByteFallback"' not in kinds:
            name = (self._described["decoder"] or {}).get("type")
            raise InputError(f"{self._where}: decoder: {name!r} is not supported; allowed: ByteLevel, ByteFallback")
        alphabet = byte_of_character() if '"ByteLevel"' in kinds else None
        table = [b""] * self.vocab_size
        for text, number in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if number in self._added:
                table[number] = b"" if number in self._names else text.encode()
            elif alphabet is not None:
                table[number] = bytes(alphabet[character] for character in text)
            elif byte := _BYTE.fullmatch(text):
                table[number] = bytes([int(byte[1], 16)])
            else:
                table[number] = text.replace("\u2581", " ").encode()
        return table

    def _encode(self, pieces: Sequence[tuple[str, bool]]) -> tuple[list[int], list[int]]:
        """Ids and mask of a rendered chat, its special tokens read as such.

        The text up to each change between prompt and answer keeps its ids whatever follows, as in serving.
        """
        text, ids, mask = "", list[int](), list[int]()
        for piece, learned in pieces:
            text += piece
            longer = self._tokenizer.encode(text, add_special_tokens=False).ids
            if longer[: len(ids)] != ids:  # a token across the change: the answer would not have been written so
                longer = ids + self._tokenizer.encode(piece, add_special_tokens=False).ids
            mask += [int(learned)] * (len(longer) - len(ids))
            ids = list(longer)
        return ids, mask

    def _render(self, messages: Sequence[Mapping[str, Any]], tools: Any, prompt: bool) -> list[tuple[str, bool]]:
        if self._marked:
            return super()._render(messages, tools, prompt)
        whole, pieces, done = self._text(messages, tools, prompt), list[tuple[str, bool]](), 0
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._text(messages[:place], tools, prompt=True)
            stop = whole.find(self._end, len(before)) + len(self._end)
            if not whole.startswith(before) or stop < len(self._end):
                raise InputError(
                    f"{self._where}: chat_template: where the model writes message {place} cannot be told: its prompt"
                    " does not begin the whole chat; mark it by {% generation %} ... {% endgeneration %}"
                )
            pieces += [(whole[done : len(before)], False), (whole[len(before) : stop], True)]
            done = stop
        return [(text, learned) for text, learned in (*pieces, (whole[done:], False)) if text]

    def _text(self, messages: Sequence[Mapping[str, Any]], tools: Any, prompt: bool) -> str:
        return "".join(text for text, _ in super()._render(messages, tools, prompt))

    def _find_end(self) -> str:
        """The special token behind the model's words."""
        whole = self._text(PROBE, None, prompt=False)
        found = self._spelled.search(whole, whole.rfind("answer"))
        if found is None:
            raise InputError(
                f"{self._where}: chat_template: no special token ends the model's turn; a model could not learn to stop"
            )
        return found[0]


def _content(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def load_chat_tokenizer(folder: Path) -> ChatTokenizer:
    """Read a tokenizer or model folder: our own chat tokenizer, or any other with a chat template.

    Raises: InputError when a file is missing or unreadable.
    """
    # The library's threads and a forked stage do not mix; it only warns where this is not said.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise InputError(f'{folder / name}: not found; run "loopwright run --until train_tokenizer"')
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except Exception as error:
        raise InputError(f"{folder}: not a readable tokenizer: {' '.join(str(error).split())}") from error
    template = read_template(folder, config)
    if all(tokenizer.token_to_id(token) is not None for token in SPECIAL_TOKENS):
        return ChatTokenizer(tokenizer, template)
    return HFChatTokenizer(tokenizer, template, config, folder)
