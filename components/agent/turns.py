"""What one turn of the model may be: words, a structured answer, calls of declared tools, and nothing in between.

A call is written as the chat template has it (`<|call|> name<|argument|> key<|value|> value`), so a tool's JSON schema
becomes one rule for each argument. Strings stand as they are unless they could be read as JSON; all else is JSON.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from components.agent.tools import Tool
from components.config import InputError
from components.data.tokenizer import ChatTokenizer, stands_bare
from components.generation.grammar import Follower, Grammar, GrammarError, json_rule, vocabulary_of
from components.generation.schemas import Schema, SchemaError, checked

ANY_OBJECT: Schema = {"type": "object"}
"""What `json_object` asks for."""
MAX_RESOLVED = 20
"""References that lead to references."""

logger = logging.getLogger("loopwright.turns")

# A string that no reader takes for JSON: see the tokenizer's `stands_bare`.
_TERMINALS = r"""
WORDS: /(?s:.+)/
NAME: /[A-Za-z_][A-Za-z0-9_.-]{0,63}/
JSON_LIKE: /(true|false|null|NaN|-?Infinity|-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?)[ \t\n\r]*/
BARE: /(?s:[^ \t\n\r"\[\{].*)/ & ~JSON_LIKE
"""
_ANNOTATIONS = {"$schema", "$defs", "definitions"}


@dataclass(frozen=True)
class Wish:
    """What a request wants its answer to be."""

    calls: Literal["auto", "none", "required"] = "auto"
    """auto: words or calls; none: words; required: calls alone, at least one."""
    tool: str | None = None
    """The only one that may be called."""
    parallel: bool = True
    """A turn may hold several calls."""
    schema: Schema | bool | None = None
    """JSON schema of the answer's words; None: any words."""


@dataclass(frozen=True)
class Rules:
    """The grammars of a conversation's turns."""

    turn: Grammar
    last: Grammar
    """Of the last turn that the agent may take."""
    structured: bool
    """The words are JSON, which is closed when the turn nears its limit."""

    def follow(self, last: bool) -> Follower:
        return (self.last if last else self.turn).follow(self.structured)


def turn_rules(tokenizer: ChatTokenizer, tools: Sequence[Mapping[str, Any]], wish: Wish, runs_tools: bool) -> Rules:
    """What the turns of an agent may be that knows `tools` (OpenAI's list).

    `runs_tools`: the agent runs them itself, so that its last turn has to be words where these have a form.

    Raises: SchemaError or InputError, naming the tool's place or `response_format`.
    """
    schema = None if wish.schema is None else checked(wish.schema, "response_format.json_schema.schema")
    calls = [] if wish.calls == "none" else [_function(tool) for tool in tools]
    rule = _Turn(wish, calls, schema).source()
    vocabulary = vocabulary_of(tokenizer)
    try:
        turn = vocabulary.compile(rule)
        words = _Turn(Wish("none"), [], schema).source()
        last = vocabulary.compile(words) if runs_tools and schema is not None else turn
    except GrammarError as error:
        raise _blamed(tokenizer, wish, calls, schema, error) from None
    return Rules(turn, last, schema is not None)


def followable(tokenizer: ChatTokenizer, tools: Sequence[Tool]) -> list[Mapping[str, Any]]:
    """The agent's own tools as `turn_rules` takes them.

    One whose schema no grammar can hold to, as an MCP server's may be, may be called with any arguments: what does not
    fit is told to the model when the tool is called.
    """
    declared: list[Mapping[str, Any]] = []
    for tool in tools:
        declaration = tool.declaration()
        try:
            turn_rules(tokenizer, [declaration], Wish("required"), runs_tools=True)
        except SchemaError as error:
            logger.warning("arguments of the tool %r are not held to its schema: %s", tool.name, error)
            declaration = {**declaration, "function": {**declaration["function"], "parameters": ANY_OBJECT}}
        declared.append(declaration)
    return declared


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    function: Mapping[str, Any] = tool.get("function", tool)
    return function


def _blamed(
    tokenizer: ChatTokenizer, wish: Wish, calls: Sequence[Mapping[str, Any]], schema: Schema | None, error: GrammarError
) -> InputError:
    """The error with the place that it comes from."""
    vocabulary = vocabulary_of(tokenizer)
    if schema is not None:
        try:
            vocabulary.compile(_Turn(Wish("none"), [], schema).source())
        except GrammarError as own:
            return SchemaError(f"response_format.json_schema.schema: {own}")
    for place, function in enumerate(calls):
        try:
            vocabulary.compile(_Turn(Wish("required"), [function], None).source())
        except GrammarError as own:
            return SchemaError(f"tools[{place}].function.parameters: {own} (tool {function['name']!r})")
    return SchemaError(f"tools: {error}; send fewer or smaller ones")


class _Turn:
    """The grammar of one turn, written rule by rule."""

    def __init__(self, wish: Wish, functions: Sequence[Mapping[str, Any]], schema: Schema | None) -> None:
        self._rules: list[str] = []
        calls = " | ".join(
            self._call(function, f"tools[{place}].function.parameters")
            for place, function in enumerate(functions)
            if wish.tool in (None, function["name"])
        )
        words = '" " WORDS' if schema is None else f'" " {self._rule(json_rule(schema))}'
        if not functions:
            self._start = words if schema is not None else f"({words})?"
            return
        several = "+" if wish.parallel else ""
        if wish.calls == "auto" and schema is None:
            self._start = f"({words})? ({calls}){'*' if wish.parallel else '?'}"
        elif wish.calls == "auto":
            self._start = f"{words} | ({calls}){several}"
        else:
            self._start = f"({calls}){several}"

    def source(self) -> str:
        return "\n".join([f"start: {self._start}", *self._rules, _TERMINALS])

    def _rule(self, body: str) -> str:
        """A new rule; its name."""
        self._rules.append(f"r{len(self._rules)}: {body}")
        return f"r{len(self._rules) - 1}"

    def _terminal(self, body: str) -> str:
        """A new terminal, which is one regular expression; its name."""
        self._rules.append(f"T{len(self._rules)}: {body}")
        return f"T{len(self._rules) - 1}"

    def _call(self, function: Mapping[str, Any], where: str) -> str:
        given = function.get("parameters")
        root = {"type": "object", "properties": {}, "additionalProperties": False} if given is None else given
        parameters = _resolved(checked(root, where), where)
        misplaced = sorted(set(parameters) - _ANNOTATIONS - {"type", "properties", "required", "additionalProperties"})
        if misplaced or parameters.get("type", "object") != "object":
            wrong = f"the keyword {misplaced[0]!r}" if misplaced else f"type {parameters['type']!r}"
            raise SchemaError(f"{where}: {wrong} is not supported here; an object with 'properties' is expected")
        definitions = {key: value for key, value in parameters.items() if key in _ANNOTATIONS}
        properties: dict[str, Any] = dict(parameters.get("properties", {}))
        required = parameters.get("required", [])
        extra = parameters.get("additionalProperties", not properties)
        for name in required:
            properties.setdefault(name, extra)
        body = [f"<|call|> {_literal(' ' + str(function['name']))}"]
        for name, schema in properties.items():
            if schema is False and name not in required:
                continue
            argument = self._argument(_literal(" " + name), schema, definitions, f"{where}.properties.{name}")
            body.append(argument if name in required else f"({argument})?")
        if extra is not False:
            others = f"NAME & ~({' | '.join(map(_literal, properties))})" if properties else "NAME"
            key = f'" " {self._terminal(others)}'
            body.append(f"({self._argument(key, extra, definitions, f'{where}.additionalProperties')})*")
        return self._rule(" ".join(body))

    def _argument(self, key: str, schema: Any, definitions: Schema, where: str) -> str:
        value = " | ".join(self._values(schema, definitions, where))
        return f'<|argument|> {key} <|value|> " " ({value})'

    def _values(self, schema: Any, definitions: Schema, where: str, branch: bool = False) -> Iterator[str]:
        """Alternatives for the text of an argument's value; `branch`: of one of its alternatives."""
        if schema is False:
            raise SchemaError(f"{where}: no value fits this schema")
        schema = _resolved({} if schema is True else schema, where, definitions)
        kinds = schema.get("type", [])
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if "enum" in schema or "const" in schema:
            yield from self._choices(schema, definitions)
        elif set(schema) == {"anyOf"} and not branch:
            for place, part in enumerate(schema["anyOf"]):
                yield from self._values(part, definitions, f"{where}.anyOf[{place}]", branch=True)
        else:
            if "string" in kinds or not schema:
                yield from self._bare(schema)
            yield self._rule(json_rule({**definitions, **schema}))

    def _choices(self, schema: Schema, definitions: Schema) -> Iterator[str]:
        """An enumeration as the template would write it; with other keywords beside it, as JSON."""
        if set(schema) - {"enum", "const", "type"} or {"enum", "const"} <= set(schema):
            yield self._rule(json_rule({**definitions, **schema}))
            return
        kinds = schema.get("type", [])
        for value in schema.get("enum", [schema.get("const")]):
            if not kinds or any(_is(value, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)):
                bare = isinstance(value, str) and stands_bare(value)
                yield _literal(value if bare else json.dumps(value, ensure_ascii=False))

    def _bare(self, schema: Schema) -> Iterator[str]:
        """A string that stands as it is, where the schema bounds nothing but its length."""
        if {"pattern", "format", "anyOf", "oneOf", "allOf"} & set(schema):
            return
        shortest, longest = max(1, schema.get("minLength", 0)), schema.get("maxLength")
        if longest is not None and longest < shortest:
            return
        if longest is None and shortest == 1:
            yield "BARE"
            return
        yield self._terminal(f"BARE & /(?s:.{{{shortest},{'' if longest is None else longest}}})/")


def _resolved(schema: Schema, where: str, definitions: Schema | None = None) -> Schema:
    """The schema that a bare `$ref` leads to."""
    definitions = schema if definitions is None else definitions
    for _ in range(MAX_RESOLVED):
        if set(schema) - _ANNOTATIONS != {"$ref"}:
            return schema
        path = str(schema["$ref"]).split("/")
        if len(path) != 3 or path[0] != "#" or path[1] not in ("$defs", "definitions"):
            raise SchemaError(f"{where}.$ref: {schema['$ref']!r} is not supported here; '#/$defs/NAME' is")
        target = definitions.get(path[1], {}).get(path[2])
        if not isinstance(target, dict):
            raise SchemaError(f"{where}.$ref: {schema['$ref']!r}: no such schema")
        schema = {**{key: value for key, value in schema.items() if key in _ANNOTATIONS}, **target}
    raise SchemaError(f"{where}.$ref: references lead in a circle")


def _is(value: Any, kind: str) -> bool:
    """Whether a JSON value is of a schema's type."""
    if isinstance(value, bool) or value is None:
        return kind == ("null" if value is None else "boolean")
    if isinstance(value, int | float):
        return kind == "number" or (kind == "integer" and value == int(value))
    return kind == ("string" if isinstance(value, str) else "array" if isinstance(value, list) else "object")


def _literal(text: str) -> str:
    """A text in a grammar."""
    return json.dumps(text, ensure_ascii=False)
