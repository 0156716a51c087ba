"""A tool call gives one line of text whatever the model asks for."""

from pathlib import Path

import pytest

from components.agent.tools import MAX_RESULT, Tool, call, reference_tools
from components.config import InputError
from components.reference.facts import build
from components.reference.stdlib import library_symbols

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
    build(path, library_symbols(["collections", "json", "heapq"]))
    return reference_tools(path)


OWN = [Tool("fails", "", SCHEMA, fails), Tool("repeats", "", SCHEMA, repeats)]


@pytest.mark.parametrize(
    ("name", "arguments", "result"),
    [
        ("lookup", {"symbol": "json.dumps"}, "Serialize obj to a JSON formatted str."),
        ("bases", {"symbol": "OrderedDict"}, "dict"),
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
        ("repeats", {}, "error: repeats: argument 'count' is missing"),
        ("repeats", {"count": "3"}, "error: repeats: argument 'count' must be integer, not str"),
        ("repeats", {"count": True}, "error: repeats: argument 'count' must be integer, not bool"),
        ("repeats", {"count": 3, "on": 1}, "error: repeats: argument 'on' must be boolean, not int"),
        ("repeats", {"count": 1, "share": "x"}, "error: repeats: argument 'share' must be number, not str"),
        ("repeats", None, "error: repeats: arguments must be an object, not NoneType"),
        ("fails", {"count": 3}, "error: line one line 3"),
        ("lookup", {}, "error: no tool 'lookup'; known: fails, repeats"),
    ],
)
def test_wrong_calls_say_why_in_one_line(name: str, arguments: object, error: str) -> None:
    assert call(OWN, name, arguments) == error


def test_unknown_arguments_are_refused_where_the_schema_says_so(tools: list[Tool]) -> None:
    error = "error: lookup: unknown argument 'x'; known: symbol"
    assert call(tools, "lookup", {"symbol": "json", "x": 1}) == error
    assert call(OWN, "repeats", {"count": 1, "x": 1}) == "word"


def test_results_are_one_bounded_line() -> None:
    result = call(OWN, "repeats", {"count": 1000, "any": object()})
    assert len(result) == MAX_RESULT
    assert "\n" not in result
    assert call([], "x", {}) == "error: no tool 'x'; known: none"


def test_declarations_have_openais_shape(tools: list[Tool]) -> None:
    assert [tool.name for tool in tools] == ["lookup", "bases", "calculate", "search"]
    declaration = tools[0].declaration()
    assert declaration["type"] == "function"
    assert declaration["function"]["parameters"]["required"] == ["symbol"]


def test_tools_without_their_facts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not found"):
        reference_tools(tmp_path / "knowledge.sqlite")
