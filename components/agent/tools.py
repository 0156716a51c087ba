"""What the agent can do besides talk: tools, their JSON schemas, and one way to call them that always gives text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.reference.arithmetic import calculate
from components.reference.knowledge import Knowledge, one_line

MAX_RESULT = 400
"""Characters of a result shown to the model."""

_PYTHON_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": type(None),
}


@dataclass(frozen=True)
class Tool:
    """One function that the model may call with JSON arguments."""

    name: str
    description: str
    parameters: dict[str, Any]
    """JSON schema of the arguments, an object."""
    function: Callable[..., str]

    def declaration(self) -> dict[str, Any]:
        """The entry of an OpenAI `tools` list."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


def reference_tools(knowledge_path: Path) -> list[Tool]:
    """The five tools of the reference agent.

    Raises: InputError when the knowledge file is missing or broken.
    """
    knowledge = Knowledge(knowledge_path)
    return [
        _tool("lookup", "What a symbol of the standard library is or does.", "symbol", knowledge.lookup),
        _tool("bases", "The direct base classes of a class.", "symbol", knowledge.bases),
        _tool("module", "The module that a symbol is in.", "symbol", knowledge.module),
        _tool("calculate", "The value of an arithmetic expression.", "expression", calculate),
        _tool("search", "The symbol of the standard library that fits a description.", "query", knowledge.search),
    ]


def _tool(name: str, description: str, argument: str, function: Callable[[str], str]) -> Tool:
    properties = {argument: {"type": "string"}}
    schema = {"type": "object", "properties": properties, "required": [argument], "additionalProperties": False}
    return Tool(name, description, schema, lambda **arguments: function(arguments[argument]))


def call(tools: Iterable[Tool], name: str, arguments: object) -> str:
    """The tool's result in one line, or `error: ...` that the model can relay; never raises."""
    known = {tool.name: tool for tool in tools}
    if name not in known:
        return _error(f"no tool {name!r}; known: {', '.join(known) or 'none'}")
    wrong = _misfit(known[name].parameters, arguments)
    if wrong:
        return _error(f"{name}: {wrong}")
    assert isinstance(arguments, dict)
    try:
        return one_line(str(known[name].function(**arguments)), MAX_RESULT)
    except Exception as error:  # noqa: BLE001 - whatever a tool does, the conversation goes on
        return _error(str(error) or type(error).__name__)


def _error(text: str) -> str:
    return one_line(f"error: {text}", MAX_RESULT)


def _misfit(schema: Mapping[str, Any], arguments: object) -> str:
    """Why the arguments do not fit the schema; empty when they do."""
    if not isinstance(arguments, dict):
        return f"arguments must be an object, not {type(arguments).__name__}"
    properties = schema.get("properties", {})
    for name in schema.get("required", []):
        if name not in arguments:
            return f"argument {name!r} is missing"
    for name, value in arguments.items():
        if name not in properties:
            if schema.get("additionalProperties", True) is False:
                return f"unknown argument {name!r}; known: {', '.join(properties)}"
        elif not _fits(properties[name], value):
            return f"argument {name!r} must be {properties[name]['type']}, not {type(value).__name__}"
    return ""


def _fits(schema: Mapping[str, Any], value: object) -> bool:
    expected = schema.get("type")
    if not isinstance(expected, str) or expected not in _PYTHON_TYPES:
        return True
    if isinstance(value, bool) and expected != "boolean":
        return False
    return isinstance(value, _PYTHON_TYPES[expected])
