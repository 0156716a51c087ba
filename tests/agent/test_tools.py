"""A tool call gives one line of text whatever the model asks for, and a tool uses only what it has permission for."""

from __future__ import annotations

import os
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from components.agent.saved_tools import as_tools
from components.agent.tools import MAX_RESULT, Tool, call
from components.config.params import InputError
from examples.stdlib_agent.agent_tools import tools as stdlib_tools
from examples.stdlib_agent.facts import build
from examples.stdlib_agent.stdlib import library_symbols

SCHEMA = {
    "type": "object",
    "properties": {"count": {"type": "integer"}, "share": {"type": "number"}, "on": {"type": "boolean"}, "any": {}},
    "required": ["count"],
}


def fails(count: int, **_: object) -> str:
    raise ZeroDivisionError(f"line one\nline {count}")


def repeats(count: int, **_: object) -> str:
    return "word \n" * count


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> list[Tool]:
    path = tmp_path_factory.mktemp("tools") / "knowledge.sqlite"
    build(path, library_symbols(["builtins", "collections", "json", "heapq"]))
    return as_tools(stdlib_tools(path.parent))


OWN = [Tool("fails", "", SCHEMA, fails), Tool("repeats", "", SCHEMA, repeats)]


@pytest.mark.parametrize(
    ("name", "arguments", "result"),
    [
        ("lookup", {"symbol": "json.dumps"}, "Serialize obj to a JSON formatted str."),
        ("bases", {"symbol": "OrderedDict"}, "dict"),
        ("module", {"symbol": "dict"}, "builtins"),
        ("module", {"symbol": "collections"}, "error: collections is a module itself"),
        ("calculate", {"expression": "37*12"}, "444"),
        ("search", {"query": "n largest elements"}, "heapq.nlargest: Find the n largest elements in a dataset."),
        ("lookup", {"symbol": "json.nothing"}, "not found: json.nothing"),
        ("bases", {"symbol": "json.dumps"}, "error: json.dumps is a function, not a class"),
        ("calculate", {"expression": "1/0"}, "error: 1/0 divides by zero"),
    ],
)
def test_reference_tools_answer(tools: list[Tool], name: str, arguments: dict[str, str], result: str) -> None:
    assert call(tools, name, arguments) == result


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("nothing", {}, "error: no tool 'nothing'; known: fails, repeats"),
        ("repeats", {}, "error: repeats: 'count' is a required property"),
        ("repeats", {"count": "3"}, "error: repeats: argument 'count': '3' is not of type 'integer'"),
        ("repeats", {"count": True}, "error: repeats: argument 'count': True is not of type 'integer'"),
        ("repeats", {"count": 3, "on": 1}, "error: repeats: argument 'on': 1 is not of type 'boolean'"),
        ("repeats", {"count": 1, "share": "x"}, "error: repeats: argument 'share': 'x' is not of type 'number'"),
        ("repeats", None, "error: repeats: arguments must be an object, not NoneType"),
        ("fails", {"count": 3}, "error: line one line 3"),
        ("lookup", {}, "error: no tool 'lookup'; known: fails, repeats"),
    ],
)
def test_wrong_calls_say_why_in_one_line(name: str, arguments: object, error: str) -> None:
    assert call(OWN, name, arguments) == error


def test_unknown_arguments_are_refused_where_the_schema_says_so(tools: list[Tool]) -> None:
    assert call(tools, "lookup", {"symbol": "json", "x": 1}).endswith("not allowed ('x' was unexpected)")
    assert call(OWN, "repeats", {"count": 1, "x": 1}) == "word"


def test_results_are_one_bounded_line() -> None:
    result = call(OWN, "repeats", {"count": 1000, "any": object()})
    assert len(result) == MAX_RESULT
    assert "\n" not in result
    assert call([], "x", {}) == "error: no tool 'x'; known: none"


def test_declarations_have_openais_shape(tools: list[Tool]) -> None:
    assert [tool.name for tool in tools] == ["lookup", "bases", "module", "calculate", "search"]
    assert tools[1].declaration() == {
        "type": "function",
        "function": {
            "name": "bases",
            "description": "The direct bases of a class: `A`, `A and B`, `A, B and C`.",
            "parameters": {
                "type": "object",
                "properties": {"symbol": {"type": "string"}},
                "required": ["symbol"],
                "additionalProperties": False,
            },
        },
    }


def test_tools_without_their_facts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not found"):
        stdlib_tools(tmp_path)


@dataclass
class Place:
    city: str
    zip: int = 0


class Unit(BaseModel):
    name: Literal["celsius", "kelvin"]


def weather(
    place: Place,
    days: Annotated[int, Field(ge=1, description="How many.")] = 1,
    hours: list[float] | None = None,
    unit: Unit | None = None,
    style: Literal["short", "long"] = "short",
) -> dict[str, Any]:
    """What the weather
    will be.

    Not part of the description.
    """
    assert isinstance(place, Place)
    return {"place": place, "days": days, "unit": unit, "hours": hours, "style": style}


def test_a_function_is_a_tool_by_its_hints() -> None:
    tool = Tool.of(weather)
    assert (tool.name, tool.description) == ("weather", "What the weather will be.")
    assert tool.parameters["required"] == ["place"]
    properties = tool.parameters["properties"]
    assert properties["days"] == {"type": "integer", "minimum": 1, "default": 1, "description": "How many."}
    assert properties["style"] == {"type": "string", "enum": ["short", "long"], "default": "short"}
    assert tool.parameters["$defs"]["Place"]["properties"]["city"] == {"type": "string"}
    assert "title" not in str(tool.parameters["properties"])


def test_arguments_become_what_the_hints_say_and_results_json() -> None:
    arguments = {"place": {"city": "Rome"}, "unit": {"name": "kelvin"}, "hours": [1, 2.5]}
    answer = '{"place":{"city":"Rome","zip":0},"days":1,"unit":{"name":"kelvin"},"hours":[1.0,2.5],"style":"short"}'
    assert call([Tool.of(weather)], "weather", arguments) == answer


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"place": {"zip": 1}}, "error: weather: argument 'place': 'city' is a required property"),
        ({"place": {"city": "x"}, "days": 0}, "error: weather: argument 'days': 0 is less than the minimum of 1"),
        ({"place": {"city": "x"}, "hours": ["y"]}, "error: weather: argument 'hours[0]': 'y' is not of type 'number'"),
        ({"place": {"city": "x"}, "style": "odd"}, "error: weather: argument 'style': 'odd' is not one of"),
    ],
)
def test_arguments_that_do_not_fit_the_hints_are_named(arguments: dict[str, Any], error: str) -> None:
    assert call([Tool.of(weather)], "weather", arguments).startswith(error)


def no_hint(x) -> str:  # type: ignore[no-untyped-def]
    """Text."""
    return str(x)


def no_docstring(x: str) -> str:
    return x


def several(*names: str) -> str:
    """Text."""
    return ""


def any_names(**values: str) -> str:
    """Text."""
    return ""


async def later(x: str) -> str:
    """Text."""
    return x


def no_schema(x: socket.socket) -> str:
    """Text."""
    return str(x)


def unknown_hint(x: Nothing) -> str:  # type: ignore[name-defined]  # noqa: F821
    """Text."""
    return str(x)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (no_hint, r"tool no_hint: parameter x: a tool's parameters have a name and a type hint"),
        (several, r"tool several: parameter \*names: 'str': a tool's parameters have a name and a type hint"),
        (any_names, r"tool any_names: parameter \*\*values: 'str': a tool's parameters have a name and a type hint"),
        (no_docstring, r"tool no_docstring: it has no docstring; its first paragraph tells the model what it does"),
        (later, r"tool later: an async function cannot be a tool; define it with def alone"),
        (lambda x: x, r"tool <lambda>: a name has up to 64 letters, digits, '_' and '-'; define it with def"),
        (no_schema, r"tool no_schema: its type hints have no JSON schema: .*socket.*"),
        (unknown_hint, r"tool unknown_hint: its type hints have no JSON schema: name 'Nothing' is not defined"),
    ],
)
def test_what_cannot_be_a_tool_is_said_in_one_line(function: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}$"):
        Tool.of(function)


def test_two_tools_of_one_name_are_refused() -> None:
    with pytest.raises(InputError, match=r"^tool weather: two tools have this name; give each its own$"):
        as_tools([weather, Tool.of(weather)])


def test_a_schema_never_makes_us_fetch_what_it_refers_to() -> None:
    tool = Tool("far", "", {"type": "object", "properties": {"x": {"$ref": "http://127.0.0.1:9/x"}}}, repeats)
    assert call([tool], "far", {"x": 1}).startswith("error: ")


def read(path: str) -> str:
    """A file."""
    return Path(path).read_text(encoding="utf-8")


def spawn() -> str:
    """A process."""
    return subprocess.run(["true"], check=True).args[0]


def connect() -> str:
    """A connection."""
    with socket.socket() as client:
        client.settimeout(1)
        return str(client.connect_ex(("127.0.0.1", 9)))


def erase(path: str) -> str:
    """Gone."""
    os.remove(path)
    return "erased"


@pytest.mark.parametrize("function", [read, spawn, connect, erase])
def test_a_tool_uses_nothing_without_permission(function: Any, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("secret")
    arguments = {"path": str(path)} if function in (read, erase) else {}
    result = call([Tool.of(function)], function.__name__, arguments)
    assert result.startswith("error: the tool has no permission for ")
    assert path.read_text() == "secret"


def test_a_tool_uses_what_it_has_permission_for(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("open")
    assert call([Tool.of(read, permissions=["files"])], "read", {"path": str(path)}) == "open"
    assert call([Tool.of(connect, permissions=["files"])], "connect", {}).startswith(
        "error: the tool has no permission for network"
    )
    assert call([Tool.of(connect, permissions=["network"])], "connect", {}).isdecimal()


def test_a_pattern_of_a_server_that_backtracks_for_ever_holds_no_thread() -> None:
    schema = {"type": "object", "properties": {"text": {"type": "string", "pattern": "^(a+)+$"}}}
    tool = Tool("echo", "Echo.", schema, lambda text: text)
    assert call([tool], "echo", {"text": "a" * 64 + "b"}) == "a" * 64 + "b"
    schema["patternProperties"], schema["additionalProperties"] = {"^(a+)+$": {}}, False
    assert call([tool], "echo", {"text": "a" * 64 + "b"}) == "a" * 64 + "b"
