"""What one turn of the model may be: words, a structured answer, calls of declared tools, and nothing in between."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from components.agent.tools import Tool
from components.agent.turn_grammar import Wish, turn_grammar
from components.config.params import InputError
from components.inference.grammar import Follower, Grammar, GrammarError, vocabulary_of
from components.inference.schemas import Schema, SchemaError, checked
from components.tokenization.chat_tokenizer import ChatTokenizer
from components.tokenization.response_format import schema_keys

ANY_OBJECT: Schema = {"type": "object"}
"""What `json_object` asks for."""

logger = logging.getLogger("loopwright.turns")


@dataclass(frozen=True)
class Rules:
    """The grammars of a conversation's turns."""

    turn: Grammar
    last: Grammar
    """Of the last turn that the agent may take."""
    structured: bool
    """The words are JSON, which is closed when the turn nears its limit."""
    keys: tuple[str, ...] = ()
    """Of that JSON, as far as its schema names them."""

    def follow(self, last: bool) -> Follower:
        return (self.last if last else self.turn).follow(self.structured)


def turn_rules(tokenizer: ChatTokenizer, tools: Sequence[Mapping[str, Any]], wish: Wish, runs_tools: bool) -> Rules:
    """What the turns of an agent may be that knows `tools` (OpenAI's list).

    `runs_tools`: the agent runs them itself, so that its last turn has to be words where these have a form.

    Raises: SchemaError or InputError, naming the tool's place or `response_format`.
    """
    schema = None if wish.schema is None else checked(wish.schema, "response_format.json_schema.schema")
    calls = [] if wish.calls == "none" else [_function(tool) for tool in tools]
    vocabulary = vocabulary_of(tokenizer)
    try:
        turn = vocabulary.compile(turn_grammar(tokenizer, wish, calls, schema))
        last = turn
        if runs_tools and schema is not None:
            last = vocabulary.compile(turn_grammar(tokenizer, Wish("none"), [], schema))
    except GrammarError as error:
        raise _blamed(tokenizer, wish, calls, schema, error) from None
    return Rules(turn, last, schema is not None, tuple(schema_keys(schema)) if schema is not None else ())


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
            vocabulary.compile(turn_grammar(tokenizer, Wish("none"), [], schema))
        except GrammarError as own:
            return SchemaError(f"response_format.json_schema.schema: {own}")
    for place, function in enumerate(calls):
        try:
            vocabulary.compile(turn_grammar(tokenizer, Wish("required"), [function], None))
        except GrammarError as own:
            return SchemaError(f"tools[{place}].function.parameters: {own} (tool {function['name']!r})")
    return SchemaError(f"tools: {error}; send fewer or smaller ones")
