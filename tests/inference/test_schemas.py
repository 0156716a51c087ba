"""Schemas are cut down to what a grammar holds to, or refused by name; hostile ones take neither time nor memory."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import pytest

from components.inference.grammar import CACHED_GRAMMARS, GrammarError, Vocabulary, json_rule
from components.inference.schemas import SchemaError, checked, pattern_size
from components.tokenization import chat_tokenizer as bpe
from components.tokenization.chat_tokenizer import ChatTokenizer


def text(**keywords: Any) -> dict[str, Any]:
    return {"type": "string", **keywords}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema, "minItems": 1}
    return schema


def test_annotations_and_unknown_keywords_are_dropped() -> None:
    given = {
        "title": "T",
        "type": "object",
        "x-guidance": {"whitespace_pattern": "(a{999}){999}"},
        "properties": {"title": {"type": "string", "format": "color", "default": "x"}, "n": {"examples": [1]}},
        "uniqueItems": False,
    }
    assert checked(given, "s") == {"type": "object", "properties": {"title": {"type": "string"}, "n": {}}}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (3, "s: 3 is not a JSON schema"),
        (False, "s: no value fits this schema"),
        ({"items": 3}, "s.items: 3 is not a JSON schema"),
        ({"properties": {"a": {"if": {}}}}, "s.properties.a.if: the keyword 'if' is not supported; leave it out"),
        ({"anyOf": {}}, r"s.anyOf: \{\}: expected a list of schemas"),
        ({"anyOf": [{}, {"type": "text"}]}, r's.anyOf\[1\].type: "text": expected one or a list of null'),
        ({"required": "a"}, 's.required: "a": expected a list of names'),
        ({"minLength": -1}, "s.minLength: -1: expected a whole number"),
        ({"minimum": True}, "s.minimum: true: expected a number"),
        ({"$ref": "https://example.org/x"}, "a reference within the schema"),
        ({"minProperties": 2}, "s.minProperties: more than 'required' lists"),
        ({"multipleOf": 99991}, "s: multipleOf: .* too large"),
        ({"allOf": [{"multipleOf": 97}, {"multipleOf": 89}, {"multipleOf": 83}]}, "s: multipleOf: .*all of them"),
        ({"multipleOf": 1e-9}, "s: multipleOf"),
        (text(pattern="(a{1000}){1000}"), "s.pattern: more than 20000 characters with repetitions expanded"),
        ({"enum": ["x" * 100_000]}, "s: a schema of more than 100000 characters"),
        (nested(60), r"s(\.items)+: schemas nested more than 40 deep"),
    ],
)
def test_what_is_wrong_is_named(schema: Any, message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        checked(schema, "s")


@pytest.mark.parametrize(
    ("pattern", "size"),
    [("", 0), ("abc", 3), (r"\d{4}", 4), ("(ab){3}", 12), ("((a{10}){10})", 122), ("[^]x{9}]{2,5}", 5), ("a{,3}", 5)],
)
def test_repetitions_of_a_pattern_are_counted(pattern: str, size: int) -> None:
    assert pattern_size(pattern) == size


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    tokenizer = ChatTokenizer(bpe.train(["some words to learn"] * 9, 400), bpe.TEMPLATE_FILE.read_text())
    return Vocabulary(tokenizer)


HOSTILE: dict[str, dict[str, Any]] = {
    "a long string": text(maxLength=10**9),
    "a string too long to end": text(minLength=10**6),
    "alternatives": text(pattern="|".join(f"w{number}x*" for number in range(2_000))),
    "an automaton that doubles": text(pattern="(a|b)*a(a|b){40}"),
    "crossing repetitions": text(pattern="((a|b)*c){1,500}x(.*y){100}"),
    "a long array": {"type": "array", "items": {"type": "integer"}, "minItems": 10**6},
    "arrays of arrays": {"type": "array", "maxItems": 10**6, "items": {"type": "array", "maxItems": 10**6}},
    "many options": {"properties": {f"p{number}": {"type": "integer"} for number in range(2_000)}},
    "a product of options": {
        "allOf": [{"anyOf": [{"properties": {f"a{i}_{j}": text()}} for j in range(4)]} for i in range(6)]
    },
    "references that double": {
        "$defs": {
            **{f"d{i}": {"properties": {key: {"$ref": f"#/$defs/d{i + 1}"} for key in "ab"}} for i in range(25)},
            "d25": {},
        },
        "$ref": "#/$defs/d0",
    },
    "no end": {
        "$defs": {"n": {"type": "object", "properties": {"c": {"$ref": "#/$defs/n"}}, "required": ["c"]}},
        "$ref": "#/$defs/n",
    },
    "itself": {"$ref": "#"},
    "deep": nested(40),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas_are_followed_or_refused_in_bounded_time(vocabulary: Vocabulary, name: str) -> None:
    began = time.process_time()
    with suppress(SchemaError, GrammarError):
        follower = vocabulary.compile(f"start: r\nr: {json_rule(checked(HOSTILE[name], 's'))}").constraint(closes=True)
        for left in range(60, 0, -1):
            if not follower.finished:
                follower.advance(int(follower.allowed(left).nonzero()[0][0]))
    assert time.process_time() - began < 10  # without bounds: minutes, or never


def test_compiled_grammars_are_kept_and_the_oldest_dropped(vocabulary: Vocabulary) -> None:
    first = vocabulary.compile('start: "0"')
    assert vocabulary.compile('start: "0"') is first
    for number in range(1, CACHED_GRAMMARS + 1):
        vocabulary.compile(f'start: "{number}"')
    assert vocabulary.compile('start: "0"') is not first


def test_a_broken_grammar_is_told_in_one_line(vocabulary: Vocabulary) -> None:
    for _ in range(2):  # the second time out of the memory of refusals
        with pytest.raises(GrammarError, match=r'^unknown name: "nothing"$'):
            vocabulary.compile("start: nothing")


def test_grammars_are_read_with_the_tokenizer_of_the_model(vocabulary: Vocabulary) -> None:
    follower = vocabulary.compile('start: " learn" " words"').constraint()
    ids = vocabulary(" learn words")
    for number in [*ids, vocabulary.end_id]:
        assert follower.allowed(9)[number]
        follower.advance(number)
    assert follower.finished
