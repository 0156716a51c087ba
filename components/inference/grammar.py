"""Grammar-constrained decoding with llguidance.

A grammar is compiled once per tokenizer and cached; each row that follows it gets a cheap `GrammarConstraint`.
Grammars are in llguidance's dialect of Lark (its docs/syntax.md), with `%json` for JSON schemas.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from components.config.params import InputError
from components.inference.sampling import Allowed
from components.tokenization.chat_tokenizer import ChatTokenizer

CACHED_GRAMMARS = 64
"""Compiled grammars per tokenizer; the least recently used is dropped."""
CLOSING_TOKENS = 64
"""Tokens before its limit at which a row plans its end; more where the shortest text is longer."""
PROBED_TOKENS = 24
"""Tokens beyond the shortest end at which every allowed token is checked for dead ends."""
MAX_PROBED = 32
"""Allowed tokens that are checked for dead ends at most."""
SLACK = 6
"""Tokens by which one token can lengthen the end: an escape, a character's first byte."""
TRIED_TOKENS = 500
"""Tokens for which a grammar is followed when it is compiled, to check that it is satisfiable."""
LIMITS = LLParserLimits(
    max_items_in_row=2_000,
    initial_lexer_fuel=500_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
"""Limits of a compilation and of a step, beyond which they fail."""
SPACING = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
"""JSON with the whitespace of Python's json, as in the training data."""

logger = logging.getLogger("loopwright.grammar")


class GrammarError(InputError):
    """A grammar that cannot be compiled, or is unsatisfiable."""


def json_rule(schema: Mapping[str, Any]) -> str:
    """The grammar expression of a JSON value that fits a schema (`schemas.checked`)."""
    return f"%json {json.dumps({'x-guidance': SPACING, **schema})}"


class Vocabulary:
    """A tokenizer for llguidance, and the grammars compiled for it."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        # llguidance reads these attributes, and calls the object to tokenize.
        self.eos_token_id, self.bos_token_id = tokenizer.end_id, None
        self.special_token_ids = list(tokenizer.special_ids.values())
        self.tokens = [tokenizer.token_bytes(number) for number in range(tokenizer.vocab_size)]
        self._numbers = {token: number for number, token in enumerate(self.tokens) if token}
        self._longest_token = max(map(len, self.tokens))
        for name, number in tokenizer.special_ids.items():
            self.tokens[number] = name.encode()
        self._encode = tokenizer.encode
        self.size, self.end_id = tokenizer.vocab_size, tokenizer.end_id
        self.native = LLTokenizer(self, eos_token=self.end_id)  # type: ignore[arg-type]
        self._grammars: OrderedDict[str, Grammar | GrammarError] = OrderedDict()
        self._lock = threading.Lock()
        self.in_text, self.in_structure = self._ranks()
        self.in_format = self.in_text.copy()
        """`in_text` for strings that letters alone cannot end, such as an e-mail address."""
        for rank, mark in enumerate((b"@", b":", b".", b"/", b"-")):
            self.in_format[[token == mark for token in self.tokens]] = 10 + rank
        self.opening = np.array([bool(set(token) & set(b'"{[,:')) for token in self.tokens])
        self.plain = np.ones(self.size, dtype=np.bool_)
        """Mask of all but the special tokens."""
        self.plain[self.special_token_ids] = False
        self.quote = self._numbers.get(b'"')
        self.letter = next((number for number, token in enumerate(self.tokens) if token == b"z"), self.end_id)

    is_tokenizer_wrapper = True

    def __call__(self, text: str | bytes) -> list[int]:
        """Ids whose bytes are the text: the tokenizer's, or greedy longest matches where that would add a space."""
        left = text.encode() if isinstance(text, str) else text
        ids = self._encode(left.decode("utf-8", errors="replace"))
        if b"".join(self.tokens[number] for number in ids) == left:
            return ids
        ids = []
        while left and (number := self._longest(left)) is not None:
            ids.append(number)
            left = left[len(self.tokens[number]) :]
        return ids

    def _longest(self, text: bytes) -> int | None:
        sizes = range(min(len(text), self._longest_token), 0, -1)
        return next((self._numbers[text[:size]] for size in sizes if text[:size] in self._numbers), None)

    def compile(self, source: str) -> Grammar:
        """The grammar of a source text, compiled or from the cache.

        Raises: GrammarError when it is invalid, too large or unsatisfiable.
        """
        with self._lock:
            cached = self._grammars.get(source)
            if cached is not None:
                self._grammars.move_to_end(source)
        if cached is None:
            try:
                cached = Grammar(self, source)
            except GrammarError as error:
                cached = error  # errors are cached too: they take as long
            with self._lock:
                self._grammars[source] = cached
                while len(self._grammars) > CACHED_GRAMMARS:
                    self._grammars.popitem(last=False)
        if isinstance(cached, GrammarError):
            raise GrammarError(str(cached))
        return cached

    def _ranks(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Heuristic distance of each token from the end, lower is better: inside and outside a string."""
        in_text = np.array([100 + len(token) for token in self.tokens])
        opened = [sum(map(token.count, (b"{", b"["))) - sum(map(token.count, (b"}", b"]"))) for token in self.tokens]
        # Of tokens that open no bracket, the longest is best.
        in_structure = np.array(
            [100 - min(len(token), 60) + 70 * max(0, more) for token, more in zip(self.tokens, opened, strict=True)]
        )
        for rank, mark in enumerate((b"}", b"]", b'"'), start=2):
            in_structure[[token == mark for token in self.tokens]] = rank
        in_text[[token == b'"' for token in self.tokens]] = 2
        for ranks in (in_text, in_structure):
            ranks[[len(token) == 1 and not 32 < token[0] < 127 for token in self.tokens]] = 200
            ranks[self.special_token_ids] = 1
            ranks[self.end_id] = 0
        return in_text, in_structure

    def towards_end(self, mask: Allowed, in_text: NDArray[np.int64]) -> int:
        """The allowed token of the lowest rank, by `in_text` within a string."""
        # A letter is allowed only between the quotes of a string, where a brace ends nothing.
        ranks = in_text if mask[self.letter] else self.in_structure
        allowed = np.flatnonzero(mask)
        return int(allowed[ranks[allowed].argmin()])


@lru_cache(maxsize=4)
def vocabulary_of(tokenizer: ChatTokenizer) -> Vocabulary:
    """The vocabulary of a loaded tokenizer, cached."""
    return Vocabulary(tokenizer)


class Grammar:
    def __init__(self, vocabulary: Vocabulary, source: str) -> None:
        try:
            rules = LLMatcher.grammar_from_lark(source)
            self._start = LLMatcher(vocabulary.native, rules, log_level=0, limits=LIMITS)
        except ValueError as error:
            raise GrammarError(_error_line(str(error))) from error
        if self._start.is_error():
            raise GrammarError(_error_line(self._start.get_error()))
        self.vocabulary = vocabulary
        ahead = self._start.deep_copy()
        end = _greedy(vocabulary, ahead, TRIED_TOKENS, vocabulary.in_text)
        if end is None and _is_stuck(vocabulary, ahead):
            raise GrammarError("too large, or unsatisfiable")
        end = end or _greedy(vocabulary, self._start.deep_copy(), TRIED_TOKENS, vocabulary.in_format)
        self._closing_tokens = max(CLOSING_TOKENS, len(end or ()) + PROBED_TOKENS)

    def constraint(self, closes: bool = False) -> GrammarConstraint:
        """A row's constraint; one that `closes` ends the text before the row's limit, where possible."""
        return GrammarConstraint(self.vocabulary, self._start.deep_copy(), closes, self._closing_tokens)


class GrammarConstraint:
    """The `Constraint` of one row that follows a grammar."""

    def __init__(self, vocabulary: Vocabulary, matcher: LLMatcher, closes: bool, closing_tokens: int) -> None:
        self._vocabulary, self._matcher, self._closes = vocabulary, matcher, closes
        self._closing_tokens = closing_tokens
        self._mask = _mask(vocabulary, matcher)
        self._is_first = True
        self._planned_end: list[int] | None = None
        """The tokens that lead to the end, as last planned."""
        self.finished = False
        self.cut = False
        """The row was ended by its limit: the model might have continued."""

    @property
    def fallback_tokens(self) -> tuple[list[int], list[int]] | None:
        """Fallback for a model that was not trained on JSON, where its text has to be JSON.

        Its free text means an answer rather than a call, and its end token within a string means that the string ends.
        Without this it calls tools at random, and continues strings without end.
        """
        vocabulary, mask = self._vocabulary, self._mask
        if not self._closes or mask[vocabulary.end_id]:
            return None
        if self._is_first:
            words = np.flatnonzero(mask & vocabulary.plain).tolist()
            calls = bool((mask & ~vocabulary.plain).any())
            return (np.flatnonzero(~mask & vocabulary.plain).tolist(), words) if words and calls else None
        quote = vocabulary.quote
        if quote is None or not (mask[vocabulary.letter] and mask[quote]):
            return None
        return [vocabulary.end_id], [quote]

    def allowed(self, left: int) -> Allowed:
        if not self._closes or left > self._closing_tokens:
            return self._mask
        if self._planned_end is None:
            self._planned_end = _closing(self._vocabulary, self._matcher, left)
        end = self._planned_end
        if end is None:
            return self._mask
        if len(end) + SLACK < left:
            return self._without_dead_ends(left, near=left < len(end) + PROBED_TOKENS)
        self.cut = self.cut or int(self._mask.sum()) > 1
        forced = np.zeros_like(self._mask)
        forced[end[0]] = True
        return forced

    def advance(self, token_id: int) -> None:
        if self._planned_end is not None:
            self._planned_end = self._planned_end[1:] if self._planned_end[0] == token_id else None
        self._is_first = False
        accepted = self._matcher.consume_token(token_id)
        special = token_id in self._vocabulary.special_token_ids
        self._closes = self._closes and not special  # a special token begins a call, and calls are not shortened
        if not accepted or token_id == self._vocabulary.end_id:
            self.finished = True
            return
        self._mask = _mask(self._vocabulary, self._matcher)
        if self._matcher.is_error() or not self._mask.any():
            logger.warning("a grammar failed during decoding: %s", _error_line(self._matcher.get_error()))
            self.finished = True

    def _without_dead_ends(self, left: int, near: bool) -> Allowed:
        """The mask without tokens after which the text cannot end; if not `near`, only opening ones are checked."""
        few = near and int(self._mask.sum()) <= MAX_PROBED
        probed = np.flatnonzero(self._mask if few else self._mask & self._vocabulary.opening)
        if len(probed) > MAX_PROBED:
            return self._mask
        mask = self._mask.copy()
        for token in probed.tolist():
            ahead = self._matcher.deep_copy()
            mask[token] = token == self._vocabulary.end_id or (
                ahead.consume_token(token) and _closing(self._vocabulary, ahead, left - 1) is not None
            )
        return mask if mask.any() else self._mask


def _mask(vocabulary: Vocabulary, matcher: LLMatcher) -> Allowed:
    words = np.zeros((vocabulary.size + 31) // 32, dtype=np.int32)
    matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
    return np.unpackbits(words.view(np.uint8), bitorder="little")[: vocabulary.size].view(np.bool_)


def _closing(vocabulary: Vocabulary, matcher: LLMatcher, limit: int) -> list[int] | None:
    """A short text that ends here, end token included, of at most `limit` tokens."""
    for in_text in (vocabulary.in_text, vocabulary.in_format):
        ids = _greedy(vocabulary, matcher.deep_copy(), limit, in_text)
        if ids is not None:
            return ids
    return None


def _greedy(vocabulary: Vocabulary, matcher: LLMatcher, limit: int, in_text: NDArray[np.int64]) -> list[int] | None:
    """The text of the tokens of lowest rank; None where it does not end. Consumes the matcher."""
    ids: list[int] = []
    while len(ids) < limit:
        mask = _mask(vocabulary, matcher)
        if matcher.is_error() or not mask.any():
            return None
        ids.append(vocabulary.towards_end(mask, in_text))
        if ids[-1] == vocabulary.end_id:
            return ids if matcher.is_accepting() else None
        if not matcher.consume_token(ids[-1]):
            return None
    return None


def _is_stuck(vocabulary: Vocabulary, matcher: LLMatcher) -> bool:
    """Whether the matcher finds no continuation."""
    mask = _mask(vocabulary, matcher)
    return matcher.is_error() or not mask.any() or (bool(mask[vocabulary.end_id]) and not matcher.is_accepting())


def _error_line(error: str) -> str:
    """llguidance's error in one line, without the excerpt of the grammar."""
    message = re.split(r"\n +1 \| |\n<non-verbose", error)[0]
    return " ".join(re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", message).split())[:300]
