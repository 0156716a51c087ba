"""Conversations: every format becomes the same messages; errors name the turn."""

from __future__ import annotations

import json
from typing import Any

import pytest

from components.config.params import InputError
from components.datasets.conversations import named_roles, read_conversation
from components.datasets.records import decode_json

CALL = {"id": "c7", "type": "function", "function": {"name": "lookup", "arguments": '{"symbol": "json.dumps"}'}}
TOOL = {"type": "function", "function": {"name": "lookup", "description": "Look up", "parameters": {"type": "object"}}}
GREETING = "👋🏽 \u202bשלום\u202c"
ANSWERED = [
    {"role": "user", "content": "What does json.dumps do?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c7", "name": "lookup", "content": "Serialize obj."},
    {"role": "assistant", "content": "It serializes."},
]


def read(**values: Any) -> tuple[list[dict[str, Any]], str | None]:
    return read_conversation("a.jsonl:3", values)


def roles(messages: list[dict[str, Any]]) -> list[str]:
    return [message["role"] for message in messages]


def test_openai_messages_with_tool_calls_stay_as_they_are() -> None:
    messages, tools = read(messages=ANSWERED, tools=[TOOL])
    assert messages == ANSWERED
    assert json.loads(tools or "") == [TOOL]


def test_null_content_text_parts_and_nulls_of_parquet_are_read() -> None:
    turns = [
        {"role": "developer", "content": "Be short.", "tool_calls": None, "name": None},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "👋🏽 \u202bשלום\u202c"}],
        },
        {"role": "assistant", "content": None, "tool_calls": [CALL], "tool_call_id": None},
        {"role": "tool", "content": "ok", "tool_call_id": "c7"},
        {"role": "assistant", "content": "Hello", "tool_calls": []},
    ]
    messages, tools = read(messages=turns, tools=None)
    assert roles(messages) == ["system", "user", "assistant", "tool", "assistant"]
    assert messages[1]["content"] == "Hi " + GREETING
    assert messages[2] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert messages[3]["name"] == "lookup"
    assert tools is None


def test_arguments_given_as_an_object_become_a_string() -> None:
    call = {"function": {"name": "lookup", "arguments": {"symbol": "größe"}}}
    messages, _ = read(messages=[{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}])
    function = {"name": "lookup", "arguments": '{"symbol": "größe"}'}
    assert messages[1]["tool_calls"] == [{"id": "call_1", "type": "function", "function": function}]


def test_old_openai_function_call_and_functions_are_read() -> None:
    turns = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "function_call": {"name": "lookup", "arguments": ""}},
        {"role": "function", "name": "lookup", "content": "ok"},
        {"role": "assistant", "content": "done"},
    ]
    messages, tools = read(messages=turns, functions=[TOOL["function"]])
    assert messages[1]["tool_calls"][0]["function"] == {"name": "lookup", "arguments": "{}"}
    assert messages[2]["tool_call_id"] == messages[1]["tool_calls"][0]["id"]
    assert json.loads(tools or "") == [TOOL]


@pytest.mark.parametrize("human", ["human", "user"])
@pytest.mark.parametrize("gpt", ["gpt", "assistant", "GPT"])
@pytest.mark.parametrize("observation", ["observation", "tool", "function_response"])
def test_sharegpt_turns_become_messages(human: str, gpt: str, observation: str) -> None:
    called = {"name": "lookup", "arguments": {"symbol": "json.dumps"}}
    turns = [
        {"from": "system", "value": "Be short."},
        {"from": human, "value": "What does json.dumps do?"},
        {"from": "function_call", "value": json.dumps(called)},
        {"from": observation, "value": "Serialize obj."},
        {"from": gpt, "value": "It serializes."},
    ]
    messages, tools = read(conversations=turns, tools=json.dumps([TOOL["function"]]))
    renamed = json.loads(json.dumps(ANSWERED).replace("c7", "call_1"))
    assert messages == [{"role": "system", "content": "Be short."}, *renamed]
    assert json.loads(tools or "") == [TOOL]


def test_sharegpt_text_before_a_call_and_calls_side_by_side_are_one_turn() -> None:
    turns = [
        {"from": "human", "value": "Both?"},
        {"from": "gpt", "value": "Let me see."},
        {"from": "function_call", "value": '[{"name": "a", "arguments": "{}"}, {"name": "b", "arguments": {}}]'},
        {"from": "observation", "value": "1"},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "Done."},
    ]
    messages, _ = read(conversations=turns, tools="")
    assert roles(messages) == ["user", "assistant", "tool", "tool", "assistant"]
    assert messages[1]["content"] == "Let me see."
    assert [call["function"]["name"] for call in messages[1]["tool_calls"]] == ["a", "b"]
    assert [message["name"] for message in messages[2:4]] == ["a", "b"]


def test_results_find_their_calls_by_id_in_any_order() -> None:
    calls = [{"id": name, "function": {"name": name, "arguments": "{}"}} for name in ("a", "b")]
    turns = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "b", "content": "2"},
        {"role": "tool", "tool_call_id": "a", "content": "1"},
        {"role": "assistant", "content": "done"},
    ]
    assert [message.get("name") for message in read(messages=turns)[0]] == [None, None, "b", "a", None]


def test_call_and_result_given_as_objects_become_text() -> None:
    turns = [
        {"from": "human", "value": "x"},
        {"from": "function_call", "value": {"name": "a", "arguments": {}}},
        {"from": "observation", "value": {"größe": 1}},
        {"from": "gpt", "value": "y"},
    ]
    assert read(conversations=turns)[0][2]["content"] == '{"größe": 1}'


def test_conversation_as_a_json_string_is_read() -> None:
    assert read(messages=json.dumps(ANSWERED))[0] == ANSWERED


def test_system_column_is_the_first_turn() -> None:
    turns = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]
    assert roles(read(conversations=turns, system="Be short.")[0]) == ["system", "user", "assistant"]
    assert roles(read(conversations=turns, system="")[0]) == ["user", "assistant"]


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ({"input": ""}, "Add up"),
        ({"input": "1 2"}, "Add up\n\n1 2"),
        ({"input": None}, "Add up"),
        ({}, "Add up"),
    ],
)
def test_alpaca_input_follows_the_instruction(given: dict[str, Any], asked: str) -> None:
    messages, _ = read(instruction="Add up", output="3", **given)
    assert messages == [{"role": "user", "content": asked}, {"role": "assistant", "content": "3"}]


def test_alpaca_history_and_system_come_first() -> None:
    messages, _ = read(instruction="c", output="d", system="s", history=[["a", "b"]])
    assert [message["content"] for message in messages] == ["s", "a", "b", "c", "d"]


def calling(call: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [call]}


USER, ANSWER = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"question": "x", "answer": "y"}, r"a\.jsonl:3: no conversation; found columns: question, answer; expected "),
        ({"messages": [USER]}, r"a\.jsonl:3: no assistant turn among 1"),
        ({"messages": []}, r"no assistant turn among 0"),
        ({"messages": "not json"}, r"messages: not JSON: 'not json'"),
        ({"messages": {"role": "user"}}, r"messages: expected a list of turns, found dict"),
        ({"messages": ["x"]}, r"a\.jsonl:3: turn 1: expected an object with role and content, found str"),
        (
            {"messages": [{"role": "narrator", "content": "x"}]},
            r"turn 1: role: 'narrator' is not a role; allowed: ",
        ),
        (
            {"conversations": [{"from": "bong", "value": "x"}]},
            r"from: 'bong' is not a role; allowed: .*--role NAME=ROLE",
        ),
        ({"conversations": [{"value": "x"}]}, r"turn 1: role: None is not a role"),
        ({"messages": [{"role": "user", "content": 7}]}, r"turn 1: content: expected text, found int 7|'7'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            r"turn 1: content: a part of type 'image_url'; conversations hold text parts only",
        ),
        (
            {"messages": [USER, {"role": "tool", "content": "x"}]},
            r"turn 2: tool result without its call: it follows no",
        ),
        (
            {"messages": [*ANSWERED[:2], {"role": "tool", "tool_call_id": "c8", "content": "x"}]},
            r"turn 3: tool result without its call: tool_call_id 'c8' names no open call",
        ),
        (
            {
                "messages": [
                    USER,
                    {"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "{oh"}}]},
                ]
            },
            r"turn 2: arguments of a: not JSON: '\{oh'",
        ),
        (
            {
                "messages": [
                    USER,
                    {"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "[1]"}}]},
                ]
            },
            r"turn 2: arguments of a: expected a JSON object, found '\[1\]'",
        ),
        (
            {"messages": [USER, calling({"id": "x"})]},
            r"turn 2: tool call without a function name",
        ),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": {"a": 1}}]},
            r"turn 2: tool_calls: expected a list, found dict",
        ),
        (
            {"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "{'name': 'a'}"}]},
            r"turn 2: function_call: not JSON: \"\{'name': 'a'\}\"",
        ),
        (
            {"conversations": [{"from": "function_call", "value": '{"name": "a", "arguments": "{oh"}'}]},
            r"turn 1: arguments of a: not JSON",
        ),
        ({"messages": [USER, ANSWER], "tools": "[oh"}, r"a\.jsonl:3: tools: not JSON: '\[oh'"),
        ({"messages": [USER, ANSWER], "tools": {"name": "a"}}, r"tools: expected a list, found dict"),
        ({"messages": [USER, ANSWER], "tools": [{"type": "function"}]}, r"tools: expected functions with a name"),
        (
            {"messages": [USER, ANSWER], "label": True},
            r"found the boolean \"label\": rated answers are of kind preferences",
        ),
        (
            {"conversations": [USER], "chosen": ANSWER, "rejected": ANSWER},
            r"found \"chosen\" and \"rejected\": rated answers",
        ),
        (
            {"instruction": "x", "output": "y", "history": ["x"]},
            r"history: expected pairs of question and answer, found 'x'",
        ),
        ({"instruction": ["x"], "output": "y"}, r"instruction: a part of type 'str'"),
    ],
)
def test_errors_are_reported_with_their_location(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_conversation("a.jsonl:3", values)


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "x", "completion": "y"},
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": [USER], "completion": "y", "messages": None},
        {"instruction": "x", "response": "y"},
        {"question": "x", "response": "y"},
        {"conversation": [USER, ANSWER]},
        {"messages": [USER, {**ANSWER, "weight": 1}], "parallel_tool_calls": True},
        {"messages": [USER, {**ANSWER, "train": True}]},
        {"messages": [{**USER, "weight": 0}, ANSWER]},
    ],
)
def test_other_tools_shapes_are_the_same_conversation(values: dict[str, Any]) -> None:
    assert read(**values) == ([USER, ANSWER], None)


@pytest.mark.parametrize(
    ("marked", "said"),
    [({"weight": 0}, "weight: 0"), ({"weight": 0.5}, "weight: 0.5"), ({"train": False}, "train: False")],
)
def test_a_turn_marked_as_untrained_is_refused(marked: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=rf"a\.jsonl:3: turn 2: {said}: the assistant's turns are all trained on"):
        read_conversation("a.jsonl:3", {"messages": [USER, {**ANSWER, **marked}, USER, ANSWER]})


@pytest.mark.parametrize("name", ["bing", "Bard", "claude", "ai", "chatgpt", "gemini"])
def test_assistants_go_by_many_names(name: str) -> None:
    turns = [{"from": "human", "value": "x"}, {"from": name, "value": "y"}]
    assert read(conversations=turns)[0] == [USER, ANSWER]


def test_roles_may_be_named() -> None:
    turns = [{"from": "Caller", "value": "x"}, {"from": "agent", "value": "y"}]
    known = named_roles(["caller=user", "Agent=assistant"])
    assert read_conversation("a.jsonl:3", {"conversations": turns}, known)[0] == [USER, ANSWER]
    for wrong in ("agent", "=user", "agent=boss"):
        with pytest.raises(InputError, match=rf"--role: '{wrong}' is not NAME=ROLE; allowed roles: system"):
            named_roles([wrong])


@pytest.mark.parametrize("number", [float("nan"), float("inf"), decode_json("9" * 6000), b"\xff"])
def test_arguments_that_json_cannot_hold_are_reported(number: Any) -> None:
    call = calling({"function": {"name": "f", "arguments": {"x": number}}})
    with pytest.raises(InputError, match=r"a\.jsonl:3: turn 2: arguments of f: cannot be written as JSON: "):
        read_conversation("a.jsonl:3", {"messages": [USER, call]})
