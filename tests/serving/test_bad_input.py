"""What every kind of bad input gets: a 400 in OpenAI's shape that names the field and its value."""

from __future__ import annotations

import json
from typing import Any

import pytest

USER = {"role": "user", "content": "Hello"}


def with_user(**options: Any) -> dict[str, Any]:
    return {"messages": [USER], **options}


def with_message(**message: Any) -> dict[str, Any]:
    return {"messages": [message]}


def tool(name: str, **parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def strict(name: str, **parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, "strict": True}}


def answer_as(schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    return with_user(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema, **more}})


BAD_BODIES: list[tuple[Any, str | None, str]] = [
    ([], None, "body: []: "),
    ("text", None, "body: "),
    ({}, "messages", "messages: missing; it is required"),
    ({"messages": []}, "messages", "messages: []: List should have at least 1 item"),
    ({"messages": "hi"}, "messages", 'messages: "hi": Input should be a valid list'),
    ({"messages": [None]}, "messages[0]", "messages[0]: null"),
    ({"messages": [{"content": "hi"}]}, "messages[0].role", "messages[0].role: missing"),
    (
        with_message(role="robot", content="x"),
        "messages[0].role",
        "messages[0].role: \"robot\": Input should be 'system'",
    ),
    (with_message(role="user"), "messages[0]", "a message of role 'user' needs content"),
    (with_message(role="user", content=5), "messages[0].content", "5: expected a string or a list of content parts"),
    (with_message(role="user", content=[{"type": "text"}]), "messages[0].content[0].text", "missing"),
    (with_message(role="user", content=["x"]), "messages[0].content[0]", "messages[0].content[0]"),
    (
        with_message(role="user", content=[{"type": "image_url", "image_url": {"url": "data:"}}]),
        "messages[0].content[0]",
        "this model reads text only",
    ),
    (with_message(role="user", content=[{"type": "hologram"}]), "messages[0].content[0]", "unknown part"),
    (with_message(role="tool", content="x"), "messages[0]", "needs tool_call_id"),
    (with_message(role="user", content="x", tool_calls=[]) | {"n": 2}, "n", "n: 2: Input should be 1"),
    (
        with_message(
            role="assistant",
            tool_calls=[{"id": "a", "type": "function", "function": {"name": "f", "arguments": "[1]"}}],
        ),
        "messages[0].tool_calls[0].function",
        "expected a JSON object as text",
    ),
    (with_user(temperature=False), "temperature", "temperature: false: Input should be a valid number"),
    (with_user(temperature="0.5"), "temperature", "valid number"),
    (with_user(temperature=2.5), "temperature", "temperature: 2.5: Input should be less than or equal to 2"),
    (with_user(temperature=-1), "temperature", "greater than or equal to 0"),
    (with_user(top_p=1.5), "top_p", "less than or equal to 1"),
    (with_user(max_tokens=0), "max_tokens", "greater than or equal to 1"),
    (with_user(max_tokens=1.5), "max_tokens", "valid integer"),
    (with_user(max_tokens=True), "max_tokens", "valid integer"),
    (with_user(seed="7"), "seed", "valid integer"),
    (with_user(seed=2**64), "seed", "seed"),
    (with_user(stream="yes"), "stream", "valid boolean"),
    (with_user(stop=5), "stop", "expected a string or a list of at most 4 strings"),
    (with_user(stop=["a"] * 5), "stop", "at most 4 items"),
    (with_user(stop=[""]), "stop[0]", "at least 1 character"),
    (with_user(stop=""), "stop", "at least 1 character"),
    (with_user(n=0), "n", "Input should be 1"),
    (with_user(user=5), "user", "valid string"),
    (with_user(tools={}), "tools", "valid list"),
    (with_user(tools=[{"type": "function"}]), "tools[0].function", "missing"),
    (with_user(tools=[{"type": "function", "function": {"name": "a b"}}]), "tools[0].function.name", "match pattern"),
    (
        with_user(tools=[{"type": "function", "function": {"name": "f", "parameters": {"properties": []}}}]),
        "tools[0].function",
        "parameters.properties: expected an object",
    ),
    (
        with_user(
            tools=[
                {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"description": 1}}}}}
            ]
        ),
        "tools[0].function",
        "parameters.properties.a.description: expected a string",
    ),
    (with_user(tool_choice="required"), "tool_choice", 'tool_choice: "required": needs tools'),
    (with_user(tool_choice="any"), "tool_choice", "Input should be 'none', 'auto' or 'required'"),
    (with_user(tool_choice=5), "tool_choice", "tool_choice: 5: expected 'none', 'auto', 'required' or {'type'"),
    (with_user(tool_choice={"type": "function", "function": {"name": "f"}}), "tool_choice", "is not one of the tools"),
    (with_user(tools=[tool("f"), tool("f")]), "tools", "two tools have the same name"),
    (with_user(tools=[tool("f", type="array")]), "tools[0].function.parameters", "type 'array' is not supported here"),
    (with_user(tools=[tool("f", oneOf=[])]), "tools[0].function.parameters", "the keyword 'oneOf' is not supported"),
    (
        with_user(tools=[tool("e"), strict("f", properties={"a": {"type": "array", "uniqueItems": True}})]),
        "tools[1].function.parameters.properties.a.uniqueItems",
        "the keyword 'uniqueItems' is not supported; leave it out",
    ),
    (
        with_user(tools=[tool("f"), strict("g", properties={"a": {"type": "string", "pattern": "(?=a)b"}})]),
        "tools[1].function.parameters",
        "look-ahead and look-behind, is not supported (tool 'g')",
    ),
    (
        with_user(response_format={"type": "json_schema", "json_schema": {}}),
        "response_format.json_schema.name",
        "missing",
    ),
    (with_user(response_format={"type": "xml"}), "response_format", "expected an object of type 'text', 'json_object'"),
    (with_user(response_format="json"), "response_format", "expected an object of type"),
    (
        answer_as({"not": {}}, strict=True),
        "response_format.json_schema.schema.not",
        "the keyword 'not' is not supported",
    ),
    (
        answer_as({"type": "strin"}),
        "response_format.json_schema.schema.type",
        "expected one or a list of null, boolean",
    ),
    (answer_as({"minimum": 3, "maximum": 1, "type": "integer"}), "response_format.json_schema.schema", "Unsatisfiable"),
    (answer_as({"$ref": "#"}), "response_format.json_schema.schema", "too large, or unsatisfiable"),
    (with_user(logprobs=True), "logprobs", "logprobs: true: not supported by this endpoint; leave it out"),
    (with_user(frequency_penalty=0.5), "frequency_penalty", "not supported"),
    (with_user(stream_options={"include_usage": True}), None, "stream_options: only allowed with stream true"),
    (with_user(functions=[{"name": "f"}]), "functions", "not supported"),
]


@pytest.mark.parametrize(("body", "param", "message"), BAD_BODIES, ids=[str(case[2])[:40] for case in BAD_BODIES])
def test_bad_field_is_named_with_its_value(local: Any, body: Any, param: str | None, message: str) -> None:
    response = local.post(body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert message in error["message"]
    assert error["param"] == param
    assert len(error["message"]) < 400


BAD_BYTES = [
    (b"", "body: missing"),
    (b"{", "body: not valid JSON: EOF"),
    (b'{"messages": "\xff"}', "body: not valid JSON"),
    (b"\xff\xfe{}", "body: not valid JSON"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "body: not valid JSON"),
    (b"[" * 100_000, "recursion limit"),
    (b'{"messages": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001, "recursion limit"),
    (b'{"temperature": NaN}', "body: not valid JSON"),
    (b'{"seed": ' + b"9" * 5000 + b"}", "body: not valid JSON"),
]


@pytest.mark.parametrize(("content", "message"), BAD_BYTES, ids=[str(case[0][:12]) for case in BAD_BYTES])
def test_broken_json_is_a_bad_request(local: Any, content: bytes, message: str) -> None:
    headers = {"Content-Type": "application/json"}
    response = local.client.post("/v1/chat/completions", content=content, headers=headers)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_deep_tool_schema_is_taken_or_refused_but_no_bug(local: Any) -> None:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(60):
        schema = {"type": "object", "properties": {"a": schema}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    assert local.ask("Hello", tools=[tool]).status_code in (200, 400)


@pytest.mark.parametrize("depth", [150, 400, 990, 100_000])
def test_deep_call_arguments_are_taken_or_refused_but_no_bug(local: Any, depth: int) -> None:
    function = {"name": "f", "arguments": '{"a": ' + "[" * depth + "]" * depth + "}"}
    call = {"id": "c", "type": "function", "function": function}
    response = local.post({"messages": [USER, {"role": "assistant", "tool_calls": [call]}, USER]})
    assert response.status_code == 400  # too deep, or else too long for the tiny model
    expected = "expected a JSON object" if depth > 200 else "do not fit the model's context"
    assert expected in response.json()["error"]["message"]


def test_body_without_json_type_is_refused(local: Any) -> None:
    response = local.client.post("/v1/chat/completions", content=json.dumps(with_user()))
    assert response.status_code == 400
    assert "send it with Content-Type: application/json" in response.json()["error"]["message"]
