"""An encoder-decoder folder as a summarizer: text to text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from components.config.params import InputError
from components.inference.classifier import load_tokenizer
from components.inference.seq2seq import Search, generate_targets
from components.models.checkpoint import load_model
from components.models.devices import best_device
from components.models.encoder_decoder import EncoderDecoder

END = "</s>"
"""Ends a source and a target, in our tokenizers and in T5's own."""
MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class GeneratedText:
    text: str
    ids: list[int]
    """The tokens of the text."""
    ended: bool
    """False when the token limit ended it."""
    source_tokens: int
    """Tokens of the source after truncation."""


class Summarizer:
    """An encoder-decoder and its tokenizer."""

    def __init__(self, model: EncoderDecoder, tokenizer: Tokenizer, no_repeat_ngram_size: int = 0) -> None:
        end_id = tokenizer.token_to_id(END)
        if end_id is None:
            raise InputError(f"tokenizer.json: {END} is missing; an encoder-decoder's targets end with it")
        self.model, self._tokenizer, self._end_id = model.eval(), tokenizer, end_id
        self.max_seq_len = model.config.max_seq_len
        self._no_repeat = no_repeat_ngram_size
        tokenizer.no_truncation()
        tokenizer.no_padding()

    @classmethod
    def load(cls, folder: Path) -> Summarizer:
        """Raises: InputError when the folder holds no encoder-decoder with its tokenizer."""
        model = load_model(folder, device=best_device())
        if not isinstance(model, EncoderDecoder):
            raise InputError(
                f"{folder}: a {type(model).__name__.lower()} is no encoder-decoder; give an encoder-decoder's folder"
            )
        return cls(model, load_tokenizer(folder), _no_repeat_ngram_size(folder / "generation_config.json"))

    def write(self, sources: Sequence[str], beams: int = 1) -> list[str]:
        """The target text of each source, in order; long sources are truncated."""
        return [target.text for target in self.generate(sources, beams)]

    def generate(self, sources: Sequence[str], beams: int = 1) -> list[GeneratedText]:
        """As `write`, with the tokens."""
        encoded = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(sources))]
        # Truncation keeps the end token.
        encoded = [ids if len(ids) <= self.max_seq_len else [*ids[: self.max_seq_len - 1], ids[-1]] for ids in encoded]
        search = Search(MAX_NEW_TOKENS, self._end_id, beams, no_repeat_ngram_size=self._no_repeat)
        targets = generate_targets(self.model, encoded, search)
        return [
            GeneratedText(self.decode(target.ids), target.ids, target.ended, len(ids))
            for target, ids in zip(targets, encoded, strict=True)
        ]

    def count(self, source: str) -> int:
        """Tokens of a source before truncation."""
        return len(self._tokenizer.encode(source).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids))).strip()


def _no_repeat_ngram_size(path: Path) -> int:
    """The setting of `transformers`' generation_config.json; 0 where it has none."""
    if not path.is_file():
        return 0
    try:
        size = json.loads(path.read_text(encoding="utf-8")).get("no_repeat_ngram_size") or 0
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path}: not a readable generation configuration: {error}") from None
    if not isinstance(size, int) or size < 0:
        raise InputError(f"{path}: no_repeat_ngram_size: {size!r}; expected a number of tokens, 0 for none")
    return size
