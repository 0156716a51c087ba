"""Grammars that hold generated tokens to a form: the only door to llguidance.

A grammar is compiled once for a tokenizer and kept; each row that follows it gets a cheap `GrammarConstraint`.
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

KEPT_GRAMMARS = 64
"""Compiled grammars per tokenizer; the longest unused goes first."""
CLOSING_TOKENS = 64
"""So near its limit a row looks for the way to its end, sooner where the shortest text is longer."""
PROBED_TOKENS = 24
"""So near the way's length it looks where other tokens lead."""
MOST_PROBED = 32
"""Tokens whose way to the end is looked for, where few may come next."""
SLACK = 6
"""Tokens by which one token can lengthen the way to the end unforeseen: an escape, a character's first byte."""
TRIED_TOKENS = 500
"""So far a grammar is followed before it is used, to see that it can be."""
LIMITS = LLParserLimits(
    max_items_in_row=2_000,
    initial_lexer_fuel=500_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
"""A compilation or a step that needs more ends in an error instead of taking the machine."""
SPACING = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
"""JSON is written as Python's json writes it, and as conversations are told in training."""

logger = logging.getLogger("loopwright.grammar")


class GrammarError(InputError):
    """A grammar that cannot be compiled, or that no text fits."""


def json_rule(schema: Mapping[str, Any]) -> str:
    """The part of a grammar for a JSON value that fits a schema (`schemas.checked`)."""
    return f"%json {json.dumps({'x-guidance': SPACING, **schema})}"


class Vocabulary:
    """The tokens of one tokenizer as grammars see them, and the grammars compiled for it."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        # llguidance reads these attributes and calls the object for the ids of a text.
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
        """The same within a string that letters alone never end, such as an address."""
        for rank, mark in enumerate((b"@", b":", b".", b"/", b"-")):
            self.in_format[[token == mark for token in self.tokens]] = 10 + rank
        self.opening = np.array([bool(set(token) & set(b'"{[,:')) for token in self.tokens])
        self.plain = np.ones(self.size, dtype=np.bool_)
        """All but the special tokens."""
        self.plain[self.special_token_ids] = False
        self.quote = self._numbers.get(b'"')
        self.letter = next((number for number, token in enumerate(self.tokens) if token == b"z"), self.end_id)

    is_tokenizer_wrapper = True

    def __call__(self, text: str | bytes) -> list[int]:
        """Ids whose bytes are the text: the tokenizer's, or the longest that fit where it would put a space before."""
        given = text.encode() if isinstance(text, str) else text
        ids = self._encode(given.decode("utf-8", errors="replace"))
        if b"".join(self.tokens[number] for number in ids) == given:
            return ids
        ids = []
        while given and (number := self._longest(given)) is not None:
            ids.append(number)
            given = given[len(self.tokens[number]) :]
        return ids

    def _longest(self, text: bytes) -> int | None:
        """The longest token that the text begins with."""
        sizes = range(min(len(text), self._longest_token), 0, -1)
        return next((self._numbers[text[:size]] for size in sizes if text[:size] in self._numbers), None)

    def compile(self, source: str) -> Grammar:
        """The grammar of a source text, compiled or kept from before.

        Raises: GrammarError when it is wrong, too large, or no text fits it.
        """
        with self._lock:
            known = self._grammars.get(source)
            if known is not None:
                self._grammars.move_to_end(source)
        if known is None:
            try:
                known = Grammar(self, source)
            except GrammarError as error:
                known = error  # a refused grammar is as dear to compile as another
            with self._lock:
                self._grammars[source] = known
                while len(self._grammars) > KEPT_GRAMMARS:
                    self._grammars.popitem(last=False)
        if isinstance(known, GrammarError):
            raise GrammarError(str(known))
        return known

    def _ranks(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """How readily each token leads to an end: lower is better, inside a string and outside of one."""
        in_text = np.array([100 + len(token) for token in self.tokens])
        opened = [sum(map(token.count, (b"{", b"["))) - sum(map(token.count, (b"}", b"]"))) for token in self.tokens]
        # Of what opens nothing, the longest token goes furthest.
        in_structure = np.array(
            [100 - min(len(token), 60) + 70 * max(0, more) for token, more in zip(self.tokens, opened, strict=True)]
        )
        for place, mark in enumerate((b"}", b"]", b'"')):
            in_structure[[token == mark for token in self.tokens]] = place + 2
        in_text[[token == b'"' for token in self.tokens]] = 2
        for ranks in (in_text, in_structure):
            ranks[[len(token) == 1 and not 32 < token[0] < 127 for token in self.tokens]] = 200
            ranks[self.special_token_ids] = 1
            ranks[self.end_id] = 0
        return in_text, in_structure

    def towards_end(self, mask: Allowed, in_text: NDArray[np.int64]) -> int:
        """The allowed token that looks shortest, by these ranks within a string."""
        # Between the quotes of a string a letter may stand; a brace is no end there.
        ranks = in_text if mask[self.letter] else self.in_structure
        allowed = np.flatnonzero(mask)
        return int(allowed[ranks[allowed].argmin()])


@lru_cache(maxsize=4)
def vocabulary_of(tokenizer: ChatTokenizer) -> Vocabulary:
    """The one vocabulary of a loaded tokenizer."""
    return Vocabulary(tokenizer)


class Grammar:
    """A compiled grammar."""

    def __init__(self, vocabulary: Vocabulary, source: str) -> None:
        try:
            rules = LLMatcher.grammar_from_lark(source)
            self._start = LLMatcher(vocabulary.native, rules, log_level=0, limits=LIMITS)
        except ValueError as error:
            raise GrammarError(_told(str(error))) from error
        if self._start.is_error():
            raise GrammarError(_told(self._start.get_error()))
        self.vocabulary = vocabulary
        ahead = self._start.deep_copy()
        way = _greedy(vocabulary, ahead, TRIED_TOKENS, vocabulary.in_text)
        if way is None and _is_stuck(vocabulary, ahead):
            raise GrammarError("too large to follow, or nothing fits it")
        way = way or _greedy(vocabulary, self._start.deep_copy(), TRIED_TOKENS, vocabulary.in_format)
        self._closing_tokens = max(CLOSING_TOKENS, len(way or ()) + PROBED_TOKENS)

    def constraint(self, closes: bool = False) -> GrammarConstraint:
        """A row's constraint; one that `closes` finds an end before its limit, where there is one."""
        return GrammarConstraint(self.vocabulary, self._start.deep_copy(), closes, self._closing_tokens)


class GrammarConstraint:
    """One row that follows a grammar, as a `Constraint`."""

    def __init__(self, vocabulary: Vocabulary, matcher: LLMatcher, closes: bool, closing_tokens: int) -> None:
        self._vocabulary, self._matcher, self._closes = vocabulary, matcher, closes
        self._closing_tokens = closing_tokens
        self._mask = _mask(vocabulary, matcher)
        self._begins = True
        self._way: list[int] | None = None
        """The way to the end that was found last."""
        self.finished = False
        self.cut = False
        """The row was led to an end before its limit: it might have gone on."""

    @property
    def fallback_tokens(self) -> tuple[list[int], list[int]] | None:
        """What a model means that was never taught JSON, where its words have to be.

        Words of its own are a wish to answer, not to call what it can; and at an end within a string it has said what
        it had to say: there the string is closed. Without this it calls at random, and rambles on in strings.
        """
        vocabulary, mask = self._vocabulary, self._mask
        if not self._closes or mask[vocabulary.end_id]:
            return None
        if self._begins:
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
        way = self._way_to_the_end(left)
        if way is None:
            return self._mask
        if len(way) + SLACK < left:
            return self._without_dead_ends(left, near=left < len(way) + PROBED_TOKENS)
        self.cut = self.cut or int(self._mask.sum()) > 1
        only = np.zeros_like(self._mask)
        only[way[0]] = True
        return only

    def advance(self, token_id: int) -> None:
        if self._way is not None:
            self._way = self._way[1:] if self._way[0] == token_id else None
        self._begins = False
        taken = self._matcher.consume_token(token_id)
        special = token_id in self._vocabulary.special_token_ids
        self._closes = self._closes and not special  # a special token begins a call, and calls are never cut short
        if not taken or token_id == self._vocabulary.end_id:
            self.finished = True
            return
        self._mask = _mask(self._vocabulary, self._matcher)
        if self._matcher.is_error() or not self._mask.any():
            logger.warning("a grammar could not be followed further: %s", _told(self._matcher.get_error()))
            self.finished = True

    def _way_to_the_end(self, left: int) -> list[int] | None:
        if self._way is None:
            self._way = _closing(self._vocabulary, self._matcher, left)
        return self._way

    def _without_dead_ends(self, left: int, near: bool) -> Allowed:
        """What is allowed, less what begins something that cannot be ended any more; `near` the way's length, all."""
        few = near and int(self._mask.sum()) <= MOST_PROBED
        probed = np.flatnonzero(self._mask if few else self._mask & self._vocabulary.opening)
        if len(probed) > MOST_PROBED:
            return self._mask
        mask = self._mask.copy()
        for token in probed.tolist():
            ahead = self._matcher.deep_copy()
            taken = token == self._vocabulary.end_id or ahead.consume_token(token)
            mask[token] = taken and (
                token == self._vocabulary.end_id or _closing(self._vocabulary, ahead, left - 1) is not None
            )
        return mask if mask.any() else self._mask


def _mask(vocabulary: Vocabulary, matcher: LLMatcher) -> Allowed:
    words = np.zeros((vocabulary.size + 31) // 32, dtype=np.int32)
    matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
    return np.unpackbits(words.view(np.uint8), bitorder="little")[: vocabulary.size].view(np.bool_)


def _closing(vocabulary: Vocabulary, matcher: LLMatcher, limit: int) -> list[int] | None:
    """A short way to the end, its token included, in at most `limit` tokens."""
    for in_text in (vocabulary.in_text, vocabulary.in_format):
        way = _greedy(vocabulary, matcher.deep_copy(), limit, in_text)
        if way is not None:
            return way
    return None


def _greedy(vocabulary: Vocabulary, matcher: LLMatcher, limit: int, in_text: NDArray[np.int64]) -> list[int] | None:
    """The way of the tokens that look shortest. Uses up the matcher."""
    way: list[int] = []
    while len(way) < limit:
        mask = _mask(vocabulary, matcher)
        if matcher.is_error() or not mask.any():
            return None
        way.append(vocabulary.towards_end(mask, in_text))
        if way[-1] == vocabulary.end_id:
            return way if matcher.is_accepting() else None
        if not matcher.consume_token(way[-1]):
            return None
    return None


def _is_stuck(vocabulary: Vocabulary, matcher: LLMatcher) -> bool:
    """Whether no text fits that begins as the matcher's has begun, as far as it can tell."""
    mask = _mask(vocabulary, matcher)
    return matcher.is_error() or not mask.any() or (bool(mask[vocabulary.end_id]) and not matcher.is_accepting())


def _told(error: str) -> str:
    """llguidance's error in one line, without the lines of the grammar around it."""
    said = re.split(r"\n +1 \| |\n<non-verbose", error)[0]
    return " ".join(re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", said).split())[:300]
