"""Grammars of a turn: text, structured output or calls of declared tools, in the dialect of `inference/grammar.py`.

Our own template writes a call as `<|call|> name<|argument|> key<|value|> value`, so a tool's JSON schema becomes one
rule per argument. Strings are written raw unless they could be parsed as JSON; all else is JSON. Other families write
the whole call as JSON.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from components.agent.tools import Tool
from components.config.params import InputError
from components.inference.grammar import Grammar, GrammarError, Vocabulary, json_rule, vocabulary_of
from components.inference.schemas import Schema, SchemaError, checked
from components.tokenization.call_formats import PYTHON_TAG
from components.tokenization.chat_tokenizer import ChatTokenizer
from components.tokenization.response_format import schema_keys
from components.tokenization.tool_calls import stands_bare

MAX_RESOLVED = 20
"""Length of a chain of references at most."""
ANY_OBJECT: Schema = {"type": "object"}
"""The schema of `json_object`."""
NO_ARGUMENTS: Schema = {"type": "object", "properties": {}, "additionalProperties": False}
"""The parameters of a function that declares none."""

# BARE: a string that is not parsed as JSON, see `stands_bare`.
_TERMINALS = r"""
WORDS: /(?s:.+)/
NO_OBJECT: /(?s:[^\s\{].*)/
SPACES: /[ \n]{1,2}/
NAME: /[A-Za-z_][A-Za-z0-9_.-]{0,63}/
JSON_LIKE: /(true|false|null|NaN|-?Infinity|-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?)[ \t\n\r]*/
BARE: /(?s:[^ \t\n\r"\[\{].*)/ & ~JSON_LIKE
"""
_CALL_ID = {"type": "string", "pattern": "^[a-zA-Z0-9]{9}$"}
_ANNOTATIONS = {"$schema", "$defs", "definitions"}
PLAIN_ROOT = _ANNOTATIONS | {"type", "properties", "required", "additionalProperties"}
"""Keywords of a function's parameters that our own format supports, beside those of each argument."""

logger = logging.getLogger("loopwright.turns")


@dataclass(frozen=True)
class TurnOptions:
    """Tool choice and response format of a request."""

    calls: Literal["auto", "none", "required"] = "auto"
    """auto: text or calls; none: text; required: at least one call and no text."""
    tool: str | None = None
    """The only tool that may be called."""
    parallel: bool = True
    """A turn may have several calls."""
    schema: Schema | bool | None = None
    """JSON schema of the answer's text; None: any text."""
    strict: bool = False
    """An unsupported schema is refused, instead of enforced as far as possible."""


@dataclass(frozen=True)
class Rules:
    """The grammars of a conversation's turns."""

    turn: Grammar
    last: Grammar
    """Of the agent's last turn."""
    structured: bool
    """The text is JSON, which is closed when the turn nears its limit."""
    keys: tuple[str, ...] = ()
    """Keys of that JSON that its schema names."""


def turn_rules(
    tokenizer: ChatTokenizer, tools: Sequence[Mapping[str, Any]], options: TurnOptions, runs_tools: bool
) -> Rules:
    """The grammars of turns with `tools` (OpenAI's list).

    `runs_tools`: the agent runs them itself, so that its last turn has to be text where a response format is set.

    Raises: SchemaError or InputError, naming the tool's index or `response_format`.
    """
    schema = None if options.schema is None else checked(options.schema, "response_format.json_schema.schema")
    calls = [] if options.calls == "none" else [_function(tool) for tool in tools]
    vocabulary = vocabulary_of(tokenizer)
    try:
        turn = vocabulary.compile(turn_grammar(tokenizer, options, calls, schema))
        last = turn
        if runs_tools and schema is not None:
            last = vocabulary.compile(turn_grammar(tokenizer, TurnOptions("none"), [], schema))
    except GrammarError as error:
        raise _located(tokenizer, options, calls, schema, error) from None
    return Rules(turn, last, schema is not None, tuple(schema_keys(schema)) if schema is not None else ())


def lenient_rules(
    tokenizer: ChatTokenizer, tools: Sequence[Mapping[str, Any]], options: TurnOptions, runs_tools: bool
) -> Rules:
    """`turn_rules` that enforce schemas without `strict` as far as possible; clients validate the rest.

    Raises: as `turn_rules`, for schemas that are invalid, unsatisfiable or strict.
    """
    try:
        return turn_rules(tokenizer, tools, options, runs_tools)
    except SchemaError:
        tools = [_relaxed(tokenizer, tool) for tool in tools]
        if options.schema is not None and not options.strict:
            with suppress(SchemaError):
                usable = partial(_is_usable, vocabulary_of(tokenizer))
                options = replace(options, schema=checked(options.schema, "schema", usable))
        return turn_rules(tokenizer, tools, options, runs_tools)


def _relaxed(tokenizer: ChatTokenizer, tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """A client's tool with the first supported schema of: its own, without unsupported keywords, any object."""
    function = _function(tool)
    if function.get("strict") or function.get("parameters") is None:
        return tool
    vocabulary = vocabulary_of(tokenizer)
    try:
        relaxed = checked(function["parameters"], "", partial(_is_usable, vocabulary))
    except SchemaError:
        return tool  # `turn_rules` reports it
    kinds = relaxed.get("type", "object")
    if "object" not in (kinds if isinstance(kinds, list) else [kinds]):
        return tool
    relaxed |= {"type": "object"}
    plain = {key: value for key, value in relaxed.items() if key in PLAIN_ROOT}
    schemas: tuple[Schema, ...] = (function["parameters"], relaxed, plain)
    for schema in schemas:
        relaxed_function = {**function, "parameters": schema}
        with suppress(SchemaError, GrammarError):
            vocabulary.compile(turn_grammar(tokenizer, TurnOptions("required"), [relaxed_function], None))
            return relaxed_function
    return {**function, "parameters": ANY_OBJECT}


def _is_usable(vocabulary: Vocabulary, pattern: str) -> bool:
    try:
        vocabulary.compile(f"start: r\nr: {json_rule({'type': 'string', 'pattern': pattern})}")
    except GrammarError:
        return False
    return True


def followable(tokenizer: ChatTokenizer, tools: Sequence[Tool]) -> list[Mapping[str, Any]]:
    """The declarations of the agent's own tools for `turn_rules`.

    A tool whose schema is not supported, such as an MCP server's, may be called with any arguments: the model gets a
    violation as the call's result.
    """
    declared: list[Mapping[str, Any]] = []
    for tool in tools:
        declaration = tool.declaration()
        try:
            turn_rules(tokenizer, [declaration], TurnOptions("required"), runs_tools=True)
        except SchemaError as error:
            logger.warning("arguments of the tool %r are not constrained by its schema: %s", tool.name, error)
            declaration = {**declaration, "function": {**declaration["function"], "parameters": ANY_OBJECT}}
        declared.append(declaration)
    return declared


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    function: Mapping[str, Any] = tool.get("function", tool)
    return function


def _located(
    tokenizer: ChatTokenizer,
    options: TurnOptions,
    calls: Sequence[Mapping[str, Any]],
    schema: Schema | None,
    error: GrammarError,
) -> InputError:
    """The error with the schema that it comes from."""
    vocabulary = vocabulary_of(tokenizer)
    if schema is not None:
        try:
            vocabulary.compile(turn_grammar(tokenizer, TurnOptions("none"), [], schema))
        except GrammarError as cause:
            return SchemaError(f"response_format.json_schema.schema: {cause}")
    for index, function in enumerate(calls):
        try:
            vocabulary.compile(turn_grammar(tokenizer, TurnOptions("required"), [function], None))
        except GrammarError as cause:
            return SchemaError(f"tools[{index}].function.parameters: {cause} (tool {function['name']!r})")
    return SchemaError(f"tools: {error}; send fewer or smaller ones")


def turn_grammar(
    tokenizer: ChatTokenizer, options: TurnOptions, functions: Sequence[Mapping[str, Any]], schema: Schema | None
) -> str:
    """The grammar of a turn that may call `functions` (of OpenAI's tools) and whose text is free or of a schema.

    Raises: SchemaError.
    """
    turn = _Turn() if tokenizer.native else _HFTurn(tokenizer)
    return turn.grammar(options, functions, schema)


class _Turn:
    """A turn in the format of our own chat template."""

    space = '" "'
    """Before the text."""
    text = "WORDS"
    """Terminal of free text."""

    def __init__(self) -> None:
        self._rules: list[str] = []

    def grammar(self, options: TurnOptions, functions: Sequence[Mapping[str, Any]], schema: Schema | None) -> str:
        calls = " | ".join(
            self._call(function, f"tools[{index}].function.parameters")
            for index, function in enumerate(functions)
            if options.tool in (None, function["name"])
        )
        text = f"{self.space} {self.text if schema is None else self._rule(json_rule(schema))}"
        several = self._several(f"({calls})", options.parallel)
        if not functions:
            start = text if schema is not None else f"({text})?"
        elif options.calls == "required":
            start = several
        elif schema is None:
            start = self._mixed(text, several)
        else:
            start = f"{text} | {several}"
        return "\n".join([f"start: {start}", *self._rules, _TERMINALS])

    def _several(self, call: str, parallel: bool) -> str:
        """One call or, if `parallel`, several."""
        return f"{call}+" if parallel else call

    def _mixed(self, text: str, several: str) -> str:
        """Text, calls, or calls behind text."""
        return f"({text})? ({several})?"

    def _rule(self, body: str) -> str:
        """Add a rule; returns its name."""
        self._rules.append(f"r{len(self._rules)}: {body}")
        return f"r{len(self._rules) - 1}"

    def _terminal(self, body: str) -> str:
        """Add a terminal, which is one regular expression; returns its name."""
        self._rules.append(f"T{len(self._rules)}: {body}")
        return f"T{len(self._rules) - 1}"

    def _call(self, function: Mapping[str, Any], where: str) -> str:
        declared = function.get("parameters")
        parameters = _resolved(checked(NO_ARGUMENTS if declared is None else declared, where), where)
        unsupported = sorted(set(parameters) - PLAIN_ROOT)
        if unsupported or parameters.get("type", "object") != "object":
            problem = f"the keyword {unsupported[0]!r}" if unsupported else f"type {parameters['type']!r}"
            raise SchemaError(f"{where}: {problem} is not supported here; an object with 'properties' is expected")
        definitions = {key: value for key, value in parameters.items() if key in _ANNOTATIONS}
        properties: dict[str, Any] = dict(parameters.get("properties", {}))
        required = parameters.get("required", [])
        extra = parameters.get("additionalProperties", not properties)
        for name in required:
            properties.setdefault(name, parameters.get("additionalProperties", True))
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
        """Alternatives for an argument's value; `branch`: the schema is a branch of `anyOf`."""
        if schema is False:
            raise SchemaError(f"{where}: no value fits this schema")
        schema = _resolved({} if schema is True else schema, where, definitions)
        kinds = schema.get("type", [])
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if "enum" in schema or "const" in schema:
            yield from self._choices(schema, definitions)
        elif set(schema) == {"anyOf"} and not branch:
            for index, part in enumerate(schema["anyOf"]):
                yield from self._values(part, definitions, f"{where}.anyOf[{index}]", branch=True)
        else:
            if "string" in kinds or not schema:
                yield from self._bare(schema)
            yield self._rule(json_rule({**definitions, **schema}))

    def _choices(self, schema: Schema, definitions: Schema) -> Iterator[str]:
        """An enumeration as the template writes its values; with other keywords, as JSON."""
        if set(schema) - {"enum", "const", "type"} or {"enum", "const"} <= set(schema):
            yield self._rule(json_rule({**definitions, **schema}))
            return
        kinds = schema.get("type", [])
        for value in schema.get("enum", [schema.get("const")]):
            if not kinds or any(_is(value, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)):
                bare = isinstance(value, str) and stands_bare(value)
                yield _literal(value if bare else json.dumps(value, ensure_ascii=False))

    def _bare(self, schema: Schema) -> Iterator[str]:
        """A raw string, where the schema limits only its length."""
        if {"pattern", "format", "anyOf", "oneOf", "allOf"} & set(schema):
            return
        shortest, longest = max(1, schema.get("minLength", 0)), schema.get("maxLength")
        if longest is not None and longest < shortest:
            return
        if longest is None and shortest == 1:
            yield "BARE"
            return
        yield self._terminal(f"BARE & /(?s:.{{{shortest},{'' if longest is None else longest}}})/")


class _HFTurn(_Turn):
    """A turn of another model family, whose calls are JSON objects (`CallFormat`)."""

    space = '" "?'

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        super().__init__()
        self._format, self._ids = tokenizer.call_format, tokenizer.special_ids
        mark = self._format.open
        self.text = self._terminal(f"WORDS & ~/(?s:.*){re.escape(mark)}(?s:.*)/") if mark else "NO_OBJECT"

    def grammar(self, options: TurnOptions, functions: Sequence[Mapping[str, Any]], schema: Schema | None) -> str:
        parallel = options.parallel and self._format.between is not None
        return super().grammar(replace(options, parallel=parallel), functions, schema)

    def _several(self, call: str, parallel: bool) -> str:
        form = self._format
        more = f"({self._spelled(form.between or '')} {call})*" if parallel else ""
        tag = f"<[{self._ids[PYTHON_TAG]}]>?" if not form.open and PYTHON_TAG in self._ids else ""
        before = f"SPACES? {self._spelled(form.open)} {tag} {self._spelled(form.before[len(form.open) :])}"
        return f"{before} {call} {more} {self._spelled(form.after)}"

    def _mixed(self, text: str, several: str) -> str:
        mark = self._format.open
        if not mark or mark in self._ids:
            return super()._mixed(text, several)
        # The mark is text itself: its last character ends the words, and a call follows.
        self._rules.append(f"lead[lazy]: /(?s:.*)/ {_literal(mark)}")
        return f"({text})? | lead {several.removeprefix(f'SPACES? {_literal(mark)}')}"

    def _spelled(self, text: str) -> str:
        """Text with special tokens as a sequence of the grammar."""
        parts = re.split("(" + ("|".join(map(re.escape, self._ids)) or "(?!)") + ")", text)
        return " ".join(f"<[{self._ids[part]}]>" if part in self._ids else _literal(part) for part in parts if part)

    def _call(self, function: Mapping[str, Any], where: str) -> str:
        parameters = checked(NO_ARGUMENTS if function.get("parameters") is None else function["parameters"], where)
        if parameters.setdefault("type", "object") != "object":
            raise SchemaError(f"{where}: type {parameters['type']!r} is not supported here; expected an object")
        definitions = {key: parameters.pop(key) for key in _ANNOTATIONS & set(parameters)}
        values = {"name": {"const": function["name"]}, "id": _CALL_ID}
        properties = {key: values.get(key, parameters) for key in self._format.keys}
        whole = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
        return self._rule(json_rule({**definitions, **whole}))


def _resolved(schema: Schema, where: str, definitions: Schema | None = None) -> Schema:
    """The schema that a bare `$ref` refers to."""
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
    raise SchemaError(f"{where}.$ref: circular references")


def _is(value: Any, kind: str) -> bool:
    """Whether a JSON value has a schema's type."""
    if isinstance(value, bool) or value is None:
        return kind == ("null" if value is None else "boolean")
    if isinstance(value, int | float):
        return kind == "number" or (kind == "integer" and value == int(value))
    return kind == ("string" if isinstance(value, str) else "array" if isinstance(value, list) else "object")


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
