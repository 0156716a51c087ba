"""Whatever is picked among what a turn allows, the calls are whole and fit their schemas, and so do the words."""

from __future__ import annotations

import datetime
import ipaddress
import json
import uuid
from typing import Any

import jsonschema
import numpy as np
import pytest
from pydantic import TypeAdapter

from components.agent.tools import Tool
from components.agent.turn_grammar import ANY_OBJECT, Rules, TurnOptions, followable, lenient_rules, turn_rules
from components.config.params import InputError
from components.inference.schemas import FORMATS, SchemaError
from components.tokenization import chat_tokenizer as bpe
from components.tokenization.chat_tokenizer import ChatTokenizer
from components.tokenization.hf_tokenizer import load_chat_tokenizer
from tests.tokenization.hf_tokenizers import chatml, llama, sentencepiece

SEEDS = range(12)
READ: dict[str, TypeAdapter[Any]] = {
    "date": TypeAdapter(datetime.date),
    "date-time": TypeAdapter(datetime.datetime),
    "time": TypeAdapter(datetime.time),
    "uuid": TypeAdapter(uuid.UUID),
    "ipv4": TypeAdapter(ipaddress.IPv4Address),
    "ipv6": TypeAdapter(ipaddress.IPv6Address),
}
CLOSED = {"type": "object", "additionalProperties": False}
ADDRESS = {
    **CLOSED,
    "properties": {"street": {"type": "string"}, "zip": {"type": "string", "pattern": r"^\d{5}$"}},
    "required": ["street", "zip"],
}
NODE = {
    **CLOSED,
    "properties": {"v": {"type": "boolean"}, "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]}},
    "required": ["v", "next"],
}


def closed(*required: str, **properties: Any) -> dict[str, Any]:
    return {**CLOSED, "properties": properties, "required": list(required or properties)}


UNION = {
    "discriminator": {"mapping": {"a": "#/$defs/A", "b": "#/$defs/B"}, "propertyName": "k"},
    "oneOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}],
}
BRANCHES = {
    "A": closed("x", k={"const": "a", "default": "a", "type": "string"}, x={"type": "integer", "maximum": 9}),
    "B": closed("y", k={"const": "b", "default": "b", "type": "string"}, y={"type": "boolean"}),
}
"""As pydantic writes them: the tag has a default, and is required all the same."""

OBJECTS: dict[str, dict[str, Any]] = {
    "no arguments": closed(),
    "a string": closed(city={"type": "string"}),
    "optional": closed("a", a={"type": "integer"}, b={"type": "boolean"}, c={"type": "null"}),
    "integers": closed(n={"type": "integer", "minimum": -3, "maximum": 12}, m={"type": "integer", "multipleOf": 5}),
    "numbers": closed(x={"type": "number"}, y={"type": "number", "exclusiveMinimum": 0, "maximum": 2.5}),
    "lengths": closed(s={"type": "string", "minLength": 3, "maxLength": 5}, t={"type": "string", "maxLength": 2}),
    "enum": closed(u={"enum": ["C", "F", "true", "12", " x", "", 'a"b', None, 3, 2.5, [1], {"a": 1}]}),
    "typed enum": closed(u={"type": "string", "enum": ["celsius", "fahrenheit"]}, v={"const": "on"}, w={"const": 1}),
    "union": closed(s={"type": ["string", "null", "integer"]}),
    "anyOf": closed(t={"anyOf": [{"type": "string", "minLength": 3, "maxLength": 6}, {"type": "boolean"}]}),
    "anything": closed(a={}, b={"description": "whatever", "default": 3}),
    "pattern": closed(p={"type": "string", "pattern": "^[a-f]{2,4}-\\d+$"}),
    "formats": closed(**{name: {"type": "string", "format": name} for name in ("time", "ipv4", "uuid")}),
    "array": closed(tags={"type": "array", "items": {"type": "string", "maxLength": 5}, "minItems": 1, "maxItems": 3}),
    "tuple": closed(p={"type": "array", "prefixItems": [{"type": "integer"}, {"type": "boolean"}], "items": False}),
    "nested": closed(o=closed(x={"type": "number"}, deep=closed(y={"type": "array", "items": ADDRESS}))),
    "references": {**closed(n={"$ref": "#/$defs/Node"}), "$defs": {"Node": NODE}},
    "a reference as root": {
        "$ref": "#/$defs/A",
        "$defs": {"A": closed(b={"$ref": "#/$defs/B"}), "B": {"type": "null"}},
    },
    "allOf": closed(a={"allOf": [{"type": "integer", "minimum": 2}, {"maximum": 4}]}),
    "oneOf": closed(a={"oneOf": [closed(k={"const": "a"}), closed(k={"const": "b"}, n={"type": "integer"})]}),
    "discriminated": {**closed(p=UNION), "$defs": BRANCHES},
    "nested unions": {
        **closed(p={"oneOf": [UNION, {"$ref": "#/$defs/C"}]}),
        "$defs": {
            **BRANCHES,
            "C": closed("k", k={"const": "c"}, kids={"type": "array", "items": UNION, "maxItems": 2}),
        },
    },
    "a map": {"type": "object", "additionalProperties": {"type": "integer"}},
    "open": {"type": "object"},
    "more": {"type": "object", "properties": {"a": {"type": "null"}}, "additionalProperties": {"type": "boolean"}},
    "required beyond": {"type": "object", "properties": {}, "required": ["b"], "additionalProperties": {"const": 7}},
    "odd names": closed(**{"a b": {"type": "integer"}, 'q"uote': {"type": "null"}, "日本": {"type": "boolean"}}),
}
VALUES: dict[str, Any] = {
    "object": {"type": "object"},
    "true": True,
    "numbers": {"type": "array", "items": {"type": "integer"}, "minItems": 2},
    "literals": {"enum": [1, "a", None, [], {"b": False}]},
    "a string": {"type": "string", "minLength": 4},
    "a range": {"type": "number", "minimum": 0.5, "maximum": 2.5},
    "steps": {"type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 9},
    "keys": {"type": "object", "patternProperties": {"^n_": {"type": "integer"}}, "additionalProperties": False},
    "counted": {"type": "object", "additionalProperties": {"type": "null"}, "minProperties": 1},
    "draft 7": {"$schema": "http://json-schema.org/draft-07/schema#", "type": "array", "items": [{"type": "null"}]},
}


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    text = ["Weather of Paris, true or null: 12.5 {} [] json.dumps camelCase some_name celsius street"]
    return ChatTokenizer(bpe.train(text * 9, 420), bpe.TEMPLATE_FILE.read_text())


def tool(name: str, parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def written(rule: Rules, seed: int, limit: int = 160, last: bool = False) -> tuple[list[int], bool]:
    """A turn of a model that picks evenly among what it may, and whether it was closed for its limit."""
    chance = np.random.default_rng(seed)
    follower = (rule.last if last else rule.turn).constraint(rule.structured)
    ids: list[int] = []
    while len(ids) < limit and not follower.finished:
        mask = follower.allowed(limit - len(ids))
        assert mask.any()
        ids.append(int(chance.choice(np.flatnonzero(mask))))
        follower.advance(ids[-1])
    return ids, follower.cut


def fits(value: Any, schema: Any) -> bool:
    """Raises: ValidationError where it does not."""
    cls = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    cls.check_schema(schema)
    cls(schema, format_checker=cls.FORMAT_CHECKER).validate(value)
    return bool(json.dumps(value).encode())  # no half of a surrogate pair


@pytest.mark.parametrize("name", OBJECTS)
def test_calls_name_a_declared_tool_and_fit_its_schema(tokenizer: ChatTokenizer, name: str) -> None:
    schema = OBJECTS[name]
    rule = turn_rules(
        tokenizer, [tool("first", schema), tool("other.one-2", None)], TurnOptions("required"), runs_tools=False
    )
    whole = 0
    for seed in SEEDS:
        ids, _ = written(rule, seed)
        if ids[-1] != tokenizer.end_id:
            continue
        turn = tokenizer.parse_turn(ids)
        assert turn.calls
        assert not turn.content
        for call in turn.calls:
            assert fits(call.arguments, schema if call.name == "first" else {"maxProperties": 0})
            json.dumps(call.arguments, allow_nan=False)
            assert call.name in ("first", "other.one-2")
            whole += call.name == "first"
    assert whole


@pytest.mark.parametrize("name", [*OBJECTS, *VALUES])
@pytest.mark.parametrize("limit", [16, 40, 160])
def test_structured_answers_fit_their_schema_however_short_they_must_be(
    tokenizer: ChatTokenizer, name: str, limit: int
) -> None:
    schema = {**OBJECTS, **VALUES}[name]
    rule = turn_rules(tokenizer, [], TurnOptions(schema=schema), runs_tools=False)
    ended = 0
    for seed in SEEDS[:4]:
        ids, _ = written(rule, seed, limit)
        if ids[-1] == tokenizer.end_id:
            assert fits(json.loads(tokenizer.parse_turn(ids).content), schema)
            ended += 1
    assert ended == 4 or limit < 160


def test_an_answer_is_closed_before_its_limit_and_says_that_it_was_cut(tokenizer: ChatTokenizer) -> None:
    rule = turn_rules(tokenizer, [], TurnOptions(schema=closed(story={"type": "string"})), runs_tools=False)
    for seed in SEEDS:
        ids, cut = written(rule, seed, limit=30)
        story = json.loads(tokenizer.parse_turn(ids).content)["story"]
        assert ids[-1] == tokenizer.end_id
        assert cut == (len(ids) > 30 - 8) or not story


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("family", ["own", "foreign"])
def test_answers_of_every_format_are_closed(
    request: pytest.FixtureRequest, tokenizer: ChatTokenizer, name: str, family: str
) -> None:
    """Though a string of letters alone never ends an address, nor what is opened too late an answer."""
    reader = tokenizer if family == "own" else request.getfixturevalue("chatml_tokenizer")
    value = {"type": "string", "format": name}
    schema = {"type": "object", "properties": {"a": value, "b": {"type": "array", "items": value}}, "required": ["a"]}
    rule = turn_rules(reader, [], TurnOptions(schema=schema), runs_tools=False)
    for seed in SEEDS[:3]:
        for limit in (64, 110):
            ids, _ = written(rule, seed, limit)
            assert ids[-1] == reader.end_id, reader.decode(ids)
            answer = json.loads(reader.parse_turn(ids).content if reader.native else reader.decode(ids))
            assert fits(answer, schema)
            if name in READ:
                for text in (answer["a"], *answer.get("b", ())):
                    READ[name].validate_python(text)


@pytest.fixture(scope="module")
def chatml_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return load_chat_tokenizer(chatml(tmp_path_factory.mktemp("chatml")))


def test_what_needs_more_than_the_limit_is_not_ended(tokenizer: ChatTokenizer) -> None:
    rule = turn_rules(tokenizer, [], TurnOptions(schema={"type": "string", "minLength": 100}), runs_tools=False)
    ids, cut = written(rule, 0, limit=20)
    assert len(ids) == 20
    assert not cut


@pytest.mark.parametrize("options", [TurnOptions("auto"), TurnOptions("auto", parallel=False), TurnOptions("none")])
def test_free_words_stay_free(tokenizer: ChatTokenizer, options: TurnOptions) -> None:
    rule = turn_rules(tokenizer, [tool("first", closed())], options, runs_tools=False)
    said = [{"role": "assistant", "content": 'Well: {"a": <|call|> "日本" \n "unclosed'}]
    ids = tokenizer.encode_chat(said)[0][1:]
    follower = rule.turn.constraint(rule.structured)
    for left, number in zip(range(len(ids), 0, -1), ids, strict=True):
        assert follower.allowed(left)[number]
        follower.advance(number)
    assert follower.finished
    assert not follower.cut


def first_tokens(rule: Rules, last: bool = False) -> np.ndarray[Any, Any]:
    return (rule.last if last else rule.turn).constraint(rule.structured).allowed(100)


def test_the_choice_of_tools_decides_what_a_turn_begins_with(tokenizer: ChatTokenizer) -> None:
    call, end = tokenizer.special_ids["<|call|>"], tokenizer.end_id
    tools = [tool("first", closed()), tool("second", closed())]
    for options, may_call, may_end in (
        (TurnOptions("auto"), True, True),
        (TurnOptions("none"), False, True),
        (TurnOptions("required"), True, False),
        (TurnOptions("auto", schema=True), True, False),
        (TurnOptions("none", schema=True), False, False),
    ):
        mask = first_tokens(turn_rules(tokenizer, tools, options, runs_tools=False))
        assert (mask[call], mask[end]) == (may_call, may_end), options
    assert not first_tokens(turn_rules(tokenizer, tools, TurnOptions(schema=True), runs_tools=True), last=True)[call]


def test_where_words_have_a_form_other_words_are_a_wish_for_it_and_an_end_closes_a_string(
    tokenizer: ChatTokenizer,
) -> None:
    tools = [tool("first", closed())]
    form = closed(said={"type": "string"}, sure={"type": "boolean"})
    rule = turn_rules(tokenizer, tools, TurnOptions(schema=form), runs_tools=True)
    follower = rule.turn.constraint(rule.structured)
    wished, given = follower.fallback_tokens or ([], [])
    allowed, special = follower.allowed(99), set(tokenizer.special_ids.values())
    assert set(given) == set(np.flatnonzero(allowed)) - special
    assert set(wished) == set(np.flatnonzero(~allowed)) - special
    assert allowed[tokenizer.special_ids["<|call|>"]]
    told = []
    for token in tokenizer.encode_chat([{"role": "assistant", "content": '{"said": "Par", "sure": true}'}])[0][1:]:
        follower.advance(token)
        told.append((tokenizer.decode([token]), follower.fallback_tokens))
    [quote] = tokenizer.encode('"')
    inside = [text for text, fallback_tokens in told if fallback_tokens == ([tokenizer.end_id], [quote])]
    assert "".join(inside).endswith("Par"), told
    assert {fallback_tokens for text, fallback_tokens in told if text not in inside} == {None}


@pytest.mark.parametrize(
    "options", [TurnOptions(), TurnOptions("none"), TurnOptions("required"), TurnOptions("required", schema=True)]
)
def test_where_words_are_free_or_none_a_wish_is_what_it_is(tokenizer: ChatTokenizer, options: TurnOptions) -> None:
    call = {"function": {"name": "first", "arguments": {"s": "x"}}}
    said: dict[str, Any] = {"role": "assistant", "content": "Paris" if options.calls == "none" else ""}
    if options.calls != "none":
        said["tool_calls"] = [call]
    tools = [tool("first", closed(s={"type": "string"}))]
    rule = turn_rules(tokenizer, tools, options, runs_tools=False)
    follower = rule.turn.constraint(rule.structured)
    for token in tokenizer.encode_chat([said])[0][1:]:
        assert follower.fallback_tokens is None
        follower.advance(token)
    assert follower.finished


def test_one_tool_can_be_asked_for_and_one_call(tokenizer: ChatTokenizer) -> None:
    tools = [tool("first", closed()), tool("second", closed())]
    for seed in SEEDS:
        ids, _ = written(turn_rules(tokenizer, tools, TurnOptions("required", tool="second"), runs_tools=False), seed)
        assert {call.name for call in tokenizer.parse_turn(ids).calls} == {"second"}
        ids, _ = written(turn_rules(tokenizer, tools, TurnOptions("required", parallel=False), runs_tools=False), seed)
        assert len(tokenizer.parse_turn(ids).calls) == 1


def test_calls_as_the_template_writes_them_are_allowed(tokenizer: ChatTokenizer) -> None:
    """What a model learned must stay possible, token by token."""
    schema = closed(s={"type": "string"}, a={}, n={"type": ["string", "integer"]}, o={"type": "object"})
    rule = turn_rules(tokenizer, [tool("first", schema)], TurnOptions("auto"), runs_tools=False)
    for text in (
        "Paris",
        "json.dumps",
        "12",
        "12 apples",
        "true",
        "",
        " led",
        '"quoted"',
        "[x]",
        "日本",
        "nan",
        "a\nb",
    ):
        arguments = {"s": text, "a": text, "n": text, "o": {"k": [1, None, 2.5, text]}}
        call = {"function": {"name": "first", "arguments": arguments}}
        ids = tokenizer.encode_chat([{"role": "assistant", "content": "Well.", "tool_calls": [call]}])[0][1:]
        follower = rule.turn.constraint(rule.structured)
        for number in ids:
            assert follower.allowed(99)[number], (text, tokenizer.decode([number]))
            follower.advance(number)
        assert follower.finished


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"type": "array"}, r"tools\[1\].function.parameters: type 'array' is not supported here"),
        ({"anyOf": [{}]}, r"parameters: the keyword 'anyOf' is not supported here; an object with 'properties'"),
        (closed(a={"not": {}}), r"parameters.properties.a.not: the keyword 'not' is not supported; leave it out"),
        (closed(a=False), r"parameters.properties.a: no value fits this schema"),
        (closed(a={"$ref": "#/$defs/Lost"}), r"parameters.properties.a.\$ref: '#/\$defs/Lost': no such schema"),
        ({"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/A"}}}, "circular references"),
        (closed(a={"enum": []}), r"a.enum: \[\]: expected a list of values"),
        (closed(a={"type": "integer", "minimum": 2, "maximum": 1}), r"Unsatisfiable schema.*\(tool 'second'\)"),
    ],
)
def test_a_tool_that_cannot_be_held_to_is_named(tokenizer: ChatTokenizer, parameters: Any, message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        turn_rules(tokenizer, [tool("first", closed()), tool("second", parameters)], TurnOptions(), runs_tools=False)
    assert issubclass(SchemaError, InputError)


ODD: dict[str, dict[str, Any]] = {
    "uniqueItems": {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}},
    "not": {"type": "object", "properties": {"a": {"not": {"type": "null"}}}},
    "if": {"type": "object", "properties": {"a": {}}, "if": {"required": ["a"]}, "then": {"required": ["b"]}},
    "dependentRequired": {"type": "object", "properties": {"a": {}, "b": {}}, "dependentRequired": {"a": ["b"]}},
    "contains": closed(a={"type": "array", "items": {"type": "string"}, "contains": {"const": "x"}}),
    "patternProperties": {"type": "object", "patternProperties": {"^x-": {"type": "string"}}},
    "propertyNames": {"type": "object", "propertyNames": {"pattern": "^a"}},
    "root anyOf": {"type": "object", "properties": {"a": {}, "b": {}}, "anyOf": [{"required": ["a"]}]},
    "root union": {"anyOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}], "$defs": BRANCHES},
    "nulls": {"type": "object", "properties": {"a": {"type": "string", "description": None}}, "required": None},
    "no properties": {"type": "object", "properties": None},
    "Decimal": closed(a={"anyOf": [{"type": "number"}, {"type": "string", "pattern": r"^(?!^[-+.]*$)[+-]?0*\d*$"}]}),
    "look-behind": closed(a={"type": "string", "pattern": "(?<=a)b"}),
    "keys with look-ahead": closed(a={"type": "object", "patternProperties": {"^(?!x)": {"type": "null"}}}),
    "unknown required": {"type": "object", "properties": {"a": {}}, "required": ["a", "ghost"]},
    "impossible required": closed("a", "ghost", a={"type": "null"}),
    "unknown format": closed(a={"type": "integer", "format": "int64"}),
    "type or null": {"type": ["object", "null"], "properties": {"a": {"type": "null"}}},
    "overlapping oneOf": closed(a={"oneOf": [{"type": "string"}, {"minLength": 2}]}),
    "remote": closed(a={"$ref": "https://example.org/schema"}),
    "lost": closed(a={"$ref": "#/$defs/Lost"}),
    "many properties": closed(a={"type": "object", "minProperties": 3}),
    "fine multiples": closed(a={"type": "number", "multipleOf": 1e-9}),
    "draft 4": closed(a={"type": "number", "minimum": 0, "exclusiveMinimum": True}),
}


@pytest.mark.parametrize("name", ODD)
def test_without_strict_a_schema_is_held_to_as_far_as_possible(tokenizer: ChatTokenizer, name: str) -> None:
    tools = [tool("first", closed(n={"type": "integer"})), tool("odd", ODD[name])]
    rule = lenient_rules(tokenizer, tools, TurnOptions("required"), runs_tools=False)
    names = set()
    for seed in SEEDS:
        ids, _ = written(rule, seed)
        for call in tokenizer.parse_turn(ids).calls if ids[-1] == tokenizer.end_id else ():
            names.add(call.name)
            if call.name == "first":
                assert fits(call.arguments, closed(n={"type": "integer"}))
    assert names == {"first", "odd"}
    form = lenient_rules(tokenizer, [], TurnOptions(schema=ODD[name]), runs_tools=False) if name != "lost" else None
    ids = written(form, 0)[0] if form else []
    assert not form or json.loads(tokenizer.parse_turn(ids).content) is not ...


def test_what_can_be_held_to_beside_the_rest_is(tokenizer: ChatTokenizer) -> None:
    item = {"type": "string", "pattern": "^[a-f]{2}$"}
    schema = closed(a={"type": "array", "items": item, "uniqueItems": True, "minItems": 1}, b={"not": {}, "const": 3})
    known = closed(a={"type": "array", "items": item, "minItems": 1}, b={"const": 3})
    rule = lenient_rules(tokenizer, [tool("f", schema)], TurnOptions("required"), runs_tools=False)
    form = lenient_rules(tokenizer, [], TurnOptions(schema=schema), runs_tools=False)
    for seed in SEEDS:
        ids, _ = written(rule, seed)
        for call in tokenizer.parse_turn(ids).calls if ids[-1] == tokenizer.end_id else ():
            assert fits(call.arguments, known)
        assert fits(json.loads(tokenizer.parse_turn(written(form, seed)[0]).content), known)


@pytest.mark.parametrize("name", ["uniqueItems", "not", "if", "root anyOf", "look-behind", "overlapping oneOf"])
def test_strict_schemas_that_cannot_be_held_to_are_refused(tokenizer: ChatTokenizer, name: str) -> None:
    function = {"name": "odd", "parameters": ODD[name], "strict": True}
    tools = [tool("first", closed()), {"type": "function", "function": function}]
    with pytest.raises(SchemaError, match=r"^tools\[1\].function.parameters"):
        lenient_rules(tokenizer, tools, TurnOptions(), runs_tools=False)
    if name != "root anyOf":
        with pytest.raises(SchemaError, match=r"^response_format.json_schema.schema"):
            lenient_rules(tokenizer, [], TurnOptions(schema=ODD[name], strict=True), runs_tools=False)


def test_wrong_schemas_are_refused_with_strict_and_without(tokenizer: ChatTokenizer) -> None:
    for parameters in (closed(a={"type": "strin"}), closed(a={"minLength": -1}), {"type": "array"}, {"oneOf": []}):
        with pytest.raises(SchemaError, match=r"^tools\[0\].function.parameters"):
            lenient_rules(tokenizer, [tool("f", parameters)], TurnOptions(), runs_tools=False)


def test_an_own_tool_that_cannot_be_held_to_is_called_with_anything(tokenizer: ChatTokenizer) -> None:
    closed_tool = Tool("first", "", closed(), str)
    odd = Tool("odd", "", closed(a={"type": "array", "uniqueItems": True}), str)
    beyond = Tool("beyond", "", closed(a={"type": "string", "pattern": "(?=a)b"}), str)
    declared = followable(tokenizer, [closed_tool, odd, beyond])
    assert [tool["function"]["parameters"] for tool in declared] == [closed(), ANY_OBJECT, ANY_OBJECT]
    assert [tool["function"]["name"] for tool in declared] == ["first", "odd", "beyond"]


@pytest.fixture(scope="module", params=[chatml, llama, sentencepiece])
def foreign(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return load_chat_tokenizer(request.param(tmp_path_factory.mktemp("foreign")))


@pytest.mark.parametrize("name", ["optional", "references", "pattern", "no arguments"])
def test_calls_and_answers_in_the_formats_of_other_families_fit_too(foreign: ChatTokenizer, name: str) -> None:
    tools = [tool("first", OBJECTS[name]), tool("second", None)]
    required = turn_rules(foreign, tools, TurnOptions("required"), runs_tools=False)
    answer = turn_rules(foreign, tools, TurnOptions("none", schema=OBJECTS[name]), runs_tools=False)
    called = ended = 0
    for seed in SEEDS:
        ids, _ = written(required, seed, limit=300)
        if ids[-1] == foreign.end_id:
            calls = foreign.parse_turn(ids).calls
            assert calls
            for call in calls:
                assert fits(call.arguments, OBJECTS[name] if call.name == "first" else {"maxProperties": 0})
                called += call.name == "first"
        ids, _ = written(answer, seed, limit=300)
        if ids[-1] == foreign.end_id:
            assert fits(json.loads(foreign.decode(ids)), OBJECTS[name])
            ended += 1
    assert called
    assert ended


def test_words_of_other_families_stay_free(foreign: ChatTokenizer) -> None:
    rule = turn_rules(foreign, [tool("first", closed())], TurnOptions(), runs_tools=False)
    follower = rule.turn.constraint(rule.structured)
    for number in [*foreign.encode("Well, then: hello?"), foreign.end_id]:
        assert follower.allowed(99)[number]
        follower.advance(number)
    assert follower.finished
