"""Hugging Face tokenizers: any `tokenizer.json` of byte-level or SentencePiece BPE with a chat template.

The training mask is the template's `generation` block or, without one, found by rendering: the prompt before a turn
must begin the whole conversation, and the turn ends with the special token that ends all. No prompt is
tokenized otherwise in training than in serving: ids of a beginning always begin the ids of the whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

from components.config.params import InputError
from components.config.paths import CONFIG
from components.tokenization.call_formats import BARE, CALL_MARKS, PROBE, CallFormat, detect_format, parse_json_calls
from components.tokenization.chat_templates import compile_template, read_template, tool_templates
from components.tokenization.chat_tokenizer import (
    SPECIAL_TOKENS,
    ChatTokenizer,
    byte_of_character,
    read_json,
    reading_tokenizer,
)
from components.tokenization.text_tokenizer import break_special_tokens
from components.tokenization.tool_calls import Turn, openai_call

_GENERATION = re.compile(r"\{%-?\s*generation\b")
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
CHAT = ({"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"})
"""A chat by which a template shows what ends the model's turn."""
_RESULT = {"role": "tool", "name": PROBE.name, "tool_call_id": "0", "content": "looked-up result"}
_DECLARATION = {
    "name": PROBE.name,
    "description": "looks things up",
    "parameters": {"type": "object", "properties": {}},
}
_TOOLS = [{"type": "function", "function": _DECLARATION}]
DECODERS = ("ByteLevel", "ByteFallback", "Metaspace")
"""Of a tokenizer whose tokens are bytes, or words behind a low line."""
AS_IN_THE_FILE = ("mistral", "ministral", "phi3")
"""Architectures whose tokenizer.json counts, whatever class their tokenizer_config.json names."""
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")


class HFChatTokenizer(ChatTokenizer):
    """A tokenizer with the special tokens, the template and the calls of another model family."""

    native = False

    def __init__(self, tokenizer: Tokenizer, template: str, config: Mapping[str, Any], folder: Path) -> None:
        self._folder = folder
        self._tokenizer = tokenizer
        self._config = json.loads(tokenizer.to_str())
        added = {token["content"]: int(token["id"]) for token in self._config["added_tokens"]}
        special = {token["content"] for token in self._config["added_tokens"] if token["special"]}
        self._added = {number: text for text, number in added.items()}
        marks = {mark for pair in CALL_MARKS.values() for mark in pair}
        self._ids = {text: number for text, number in added.items() if text in special or text in marks}
        self._names = {number: text for text, number in self._ids.items()}
        spelled = sorted(self._ids, key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, spelled)) or r"(?!)")
        self._special = re.compile(
            "|".join(f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in spelled) or r"(?!)"
        )
        self._variables = {name: text for name in NAMED if (text := _content(config.get(name))) is not None}
        self._named, self.template = config, template
        self._has_generation_block = bool(_GENERATION.search(template))
        self._template = compile_template(template)
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
        self._end = self._find_end()
        self.end_id = self._ids[self._end]
        self.pad_id = added.get(self._variables.get("pad_token", ""), self.end_id)
        self.document_id = added.get(self._variables.get("bos_token", ""), self.end_id)
        self.value_id = self.tool_id = -1  # no token of its own opens an argument's value, or a tool's result

    def _extended(self, tokenizer: Tokenizer) -> ChatTokenizer:
        return HFChatTokenizer(tokenizer, self.template, self._named, self._folder)

    def _encode_texts(
        self, chats: Sequence[tuple[Sequence[Mapping[str, Any]], Any]], add_generation_prompt: bool
    ) -> list[tuple[list[int], list[int]]]:
        calling = any(message.get("tool_calls") for messages, _ in chats for message in messages)
        if calling and self._format is None:
            raise InputError(
                f"{self._folder}: chat_template: the tool calls that it writes cannot be read back; known are JSON"
                f" alone and behind {', '.join(mark for mark, _ in CALL_MARKS.values())}; use conversations without"
                " calls, or a template that knows tools (tune.template)"
            )
        return [self._encode(self._render(messages, tools, add_generation_prompt)) for messages, tools in chats]

    def parse_turn(self, ids: Iterable[int]) -> Turn:
        """The turn of the ids that the model generated: text, and calls in the format of Hermes and Qwen, or Llama."""
        pieces = []
        for number in ids:
            if number == self.end_id:
                break
            pieces.append(self._names[number].encode() if number in self._names else self.token_bytes(number))
        return parse_json_calls(b"".join(pieces).decode("utf-8", errors="replace"), self.call_format)

    @property
    def call_format(self) -> CallFormat:
        """How the template writes calls; as Llama's where it writes none."""
        return self._format or BARE

    @property
    def knows_tools(self) -> bool:
        return self._format is not None and self._declares_tools

    def with_tools(self) -> HFChatTokenizer:
        """This tokenizer, its template extended by a syntax for tools where it knows none.

        Raises: InputError when no syntax fits.
        """
        if self.knows_tools:
            return self
        for template in tool_templates(self.template, self._tokenizer.get_vocab(with_added_tokens=True)):
            extended = HFChatTokenizer(self._tokenizer, template, self._named, self._folder)
            if extended.knows_tools:
                return extended
        raise InputError(
            f"{self._folder}: chat_template: knows no tools, and none of the known ways to declare and call them"
            " can be put before it; name a template that knows them (tune.template: PATH)"
        )

    @cached_property
    def _format(self) -> CallFormat | None:
        """The format of calls that the template writes, tools being declared or not."""
        formats = []
        for tools in (None, _TOOLS):
            single, double = (self._probe(number, tools) for number in (1, 2))
            formats.append(detect_format(single, double) if single is not None else None)
        return formats[0] if formats[0] == formats[1] else None

    def _probe(self, calls: int, tools: Any) -> str | None:
        """What the model writes in a turn of that many calls; None where the template refuses it."""
        message = {"role": "assistant", "content": "", "tool_calls": [openai_call(PROBE, str(n)) for n in range(calls)]}
        try:
            pieces = self._render([CHAT[0], message], tools, False)
        except InputError:
            return None
        return "".join(text for text, generated in pieces if generated).partition(self._end)[0]

    @cached_property
    def _declares_tools(self) -> bool:
        """Whether tools and results are in a prompt, which begins the prompt of the next turn."""
        call = {"role": "assistant", "content": "", "tool_calls": [openai_call(PROBE, "0")]}
        chat: list[Mapping[str, Any]] = [CHAT[0], call, _RESULT]
        try:
            prompt, first = (self._text(messages, _TOOLS, prompt=True) for messages in (chat, chat[:1]))
        except InputError:
            return False
        declared = str(_DECLARATION["description"]) in first and PROBE.name in first
        return declared and prompt.startswith(first) and str(_RESULT["content"]) in prompt[len(first) :]

    @cached_property
    def _plain(self) -> Tokenizer:
        plain = Tokenizer.from_str(self._tokenizer.to_str())
        plain.encode_special_tokens = True
        if isinstance(plain.model, models.Unigram):
            break_special_tokens(plain)
        return plain

    @cached_property
    def _bytes(self) -> list[bytes]:
        kinds = json.dumps(self._config["decoder"])
        if not any(f'"{kind}"' in kinds for kind in DECODERS):
            name = (self._config["decoder"] or {}).get("type")
            raise InputError(f"{self._folder}: decoder: {name!r} is not supported; allowed: {', '.join(DECODERS)}")
        alphabet = byte_of_character() if '"ByteLevel"' in kinds else None
        table = [b""] * self.vocab_size
        for text, number in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if number in self._added:
                table[number] = b"" if number in self._names else text.encode()
            elif alphabet is not None:
                known = all(character in alphabet for character in text)
                table[number] = bytes(alphabet[character] for character in text) if known else text.encode()
            elif byte := _BYTE.fullmatch(text):
                table[number] = bytes([int(byte[1], 16)])
            else:
                table[number] = text.replace("\u2581", " ").encode()
        return table

    def _encode(self, pieces: Sequence[tuple[str, bool]]) -> tuple[list[int], list[int]]:
        """Ids and mask of a rendered chat with its special tokens.

        The text up to each change between prompt and answer keeps its ids whatever follows, as in serving.
        """
        text, ids, mask = "", list[int](), list[int]()
        for piece, generated in pieces:
            text += piece
            longer = self._tokenizer.encode(text, add_special_tokens=False).ids
            if longer[: len(ids)] != ids:  # a token across the change: the answer would not have been written so
                longer = ids + self._tokenizer.encode(piece, add_special_tokens=False).ids
            mask += [int(generated)] * (len(longer) - len(ids))
            ids = list(longer)
        return ids, mask

    def _render(self, messages: Sequence[Mapping[str, Any]], tools: Any, prompt: bool) -> list[tuple[str, bool]]:
        if self._has_generation_block:
            return super()._render(messages, tools, prompt)
        whole, pieces, done = self._text(messages, tools, prompt), list[tuple[str, bool]](), 0
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._text(messages[:number], tools, prompt=True)
            stop = whole.find(self._end, len(before)) + len(self._end)
            if not whole.startswith(before) or stop < len(self._end):
                raise InputError(
                    f"{self._folder}: chat_template: where the model writes message {number} is unknown: its prompt"
                    " does not begin the whole chat; mark it by {% generation %} ... {% endgeneration %}"
                )
            pieces += [(whole[done : len(before)], False), (whole[len(before) : stop], True)]
            done = stop
        return [(text, generated) for text, generated in (*pieces, (whole[done:], False)) if text]

    def _text(self, messages: Sequence[Mapping[str, Any]], tools: Any, prompt: bool) -> str:
        return "".join(text for text, _ in super()._render(messages, tools, prompt))

    def _find_end(self) -> str:
        """The special token after the model's text."""
        whole = self._text(CHAT, None, prompt=False)
        match = self._spelled.search(whole, whole.rfind("answer"))
        if match is None:
            raise InputError(
                f"{self._folder}: chat_template: no special token ends the model's turn;"
                " a model could not learn to stop"
            )
        return match[0]


def _content(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def load_chat_tokenizer(folder: Path, template: str | None = None) -> ChatTokenizer:
    """Read a tokenizer or model folder: our own chat tokenizer, or any other with a chat template.

    `template` replaces the folder's.

    Raises: InputError when a file is missing or unreadable.
    """
    with reading_tokenizer(folder, ("tokenizer.json", "tokenizer_config.json")) as (tokenizer, config):
        template = read_template(folder, config) if template is None else template
    model = read_json(folder / CONFIG)
    if all(tokenizer.token_to_id(token) is not None for token in SPECIAL_TOKENS):
        chat_tokenizer = ChatTokenizer(tokenizer, template)
    else:
        _split_as_llama(tokenizer, config, model.get("text_config", model).get("model_type"))
        chat_tokenizer = HFChatTokenizer(tokenizer, template, config, folder)
    image_token = tokenizer.id_to_token(model["image_token_index"]) if "image_token_index" in model else None
    if image_token is None:
        return chat_tokenizer
    vision = model["vision_config"]
    return chat_tokenizer.with_images((vision["image_size"] // vision["patch_size"]) ** 2, image_token)


def _split_as_llama(tokenizer: Tokenizer, config: Mapping[str, Any], model_type: str | None) -> None:
    """Split as transformers' LlamaTokenizer, which heeds nothing of tokenizer.json but its pieces.

    The models of `AS_IN_THE_FILE` name this class and are read with their tokenizer.json.
    """
    name = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    if name != "LlamaTokenizer" or model_type in AS_IN_THE_FILE or "ByteFallback" not in str(tokenizer.decoder):
        return
    prefix = "never" if config.get("add_prefix_space") is False else "always" if config.get("legacy") else "first"
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
