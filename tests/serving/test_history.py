"""Whatever OpenAI's API takes back in a history, of its own answers or ours, is taken back."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessage

from components.tokenization.hf_tokenizer import load_chat_tokenizer

USER = {"role": "user", "content": "Weather in Paris?"}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def client(local: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url="http://testserver/v1", api_key="x", max_retries=0, http_client=local.client)


def call(arguments: Any, **more: Any) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": function}], **more}


def result(content: Any = "sunny") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "c", "content": content}


def custom_call() -> dict[str, Any]:
    used = {"id": "c", "type": "custom", "custom": {"name": "get_weather", "input": "Paris"}}
    return {"role": "assistant", "content": None, "tool_calls": [used]}


HISTORIES: dict[str, list[dict[str, Any]]] = {
    "no arguments": [call(""), result()],
    "null as text": [call("null"), result()],
    "null": [call(None), result()],
    "spaces": [call("  "), result()],
    "cut": [call('{"city": "Par'), result("error: not valid JSON")],
    "cut behind a key": [call('{"city"'), result("error")],
    "half of a pair": [call('{"city": "\\ud83d'), result("error")],
    "a number without end": [call('{"city": ' + "9" * 5000 + "}"), result()],
    "all fields": [
        call(
            "{}",
            content=None,
            refusal=None,
            annotations=[],
            audio=None,
            function_call=None,
            name=None,
            index=0,
            steps=[],
        ),
        result(),
    ],
    "empty content": [call("{}", content=""), result()],
    "no parts": [call("{}", content=[]), result()],
    "parts": [call("{}", content=[{"type": "text", "text": "I look."}]), result([{"type": "text", "text": "sunny"}])],
    "no content": [{"role": "assistant", "content": None}],
    "content absent": [{"role": "assistant"}],
    "refusal": [{"role": "assistant", "content": None, "refusal": "No."}],
    "refusal as part": [{"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}],
    "no calls": [{"role": "assistant", "content": "Sunny.", "tool_calls": None}],
    "names": [{"role": "assistant", "content": "Sunny.", "name": "bot"}, {**result(), "name": "get_weather"}],
    "unanswered call": [call("{}")],
    "developer": [{"role": "developer", "content": "Be brief."}],
    "developer in parts": [{"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}],
    "functions": [
        {"role": "assistant", "content": None, "function_call": {"name": "get_weather", "arguments": "{}"}},
        {"role": "function", "name": "get_weather", "content": "sunny"},
    ],
    "custom tool": [custom_call(), result()],
}


@pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES)
def test_a_history_of_openais_api_is_taken(local: Any, history: list[dict[str, Any]]) -> None:
    response = local.post({"messages": [USER, *history, USER], "tools": [WEATHER], "max_tokens": 2})
    if "9" * 5000 in str(history):  # it is taken, and longer than the tiny model reads
        assert response.json()["error"]["code"] == "context_length_exceeded"
    else:
        assert response.status_code == 200, response.json()


@pytest.mark.parametrize("arguments", ["", "null", None, "{}", " "])
def test_no_arguments_are_the_same_however_they_are_kept(local: Any, arguments: Any) -> None:
    counts = {
        local.post({"messages": [USER, call(kept), result(), USER], "max_tokens": 1}).json()["usage"]["prompt_tokens"]
        for kept in (arguments, "{}")
    }
    assert len(counts) == 1


def test_a_cut_call_is_shown_as_the_text_that_it_is(agent_folder: Any) -> None:
    tokenizer = load_chat_tokenizer(agent_folder)
    shown = tokenizer.render([USER, call('{"city": "Par', content=""), result()])
    whole = tokenizer.render([USER, call('{"arguments": "{\\"city\\": \\"Par"}', content=""), result()])
    assert shown == whole


def test_arguments_that_are_json_but_no_object_are_refused(local: Any) -> None:
    response = local.post({"messages": [USER, call("[1]"), result()]})
    assert response.status_code == 400
    assert "arguments: expected a JSON object as text" in response.json()["error"]["message"]


def accepted(client: openai.OpenAI, message: ChatCompletionMessage) -> bool:
    """Put an answer back as clients do: as it is, as the dictionary that it is, with and without what is unset."""
    results = [{"role": "tool", "tool_call_id": one.id, "content": "sunny"} for one in message.tool_calls or []]
    answers = []
    for put in (message, message.model_dump(), message.model_dump(exclude_none=True), json.loads(message.to_json())):
        messages: Any = [USER, put, *results, USER]
        answers += client.chat.completions.create(
            model="agent", messages=messages, tools=[WEATHER], max_tokens=2
        ).choices
    return len(answers) == 4


def test_our_answers_are_taken_back_by_openais_client(client: openai.OpenAI) -> None:
    create = client.chat.completions.create
    for content, options in (
        ("Hello", {}),
        ("What is 6*7?", {}),  # with steps
        ("Letters", {"max_tokens": 3}),
        ("Weather in Paris?", {"tools": [WEATHER]}),
        ("Weather in Paris?", {"tools": [WEATHER], "max_tokens": 4}),  # a call that is cut off
        ("Hello", {"response_format": {"type": "json_object"}, "max_tokens": 8}),
    ):
        asked: Any = [{"role": "user", "content": content}]
        assert accepted(client, create(model="agent", messages=asked, **options).choices[0].message)  # type: ignore[call-overload]
        with client.chat.completions.stream(model="agent", messages=asked, **options) as stream:
            try:
                for _ in stream:
                    pass
                message = stream.get_final_completion().choices[0].message
            except openai.LengthFinishReasonError as cut:  # the client's own helper raises for what was cut
                message = cut.completion.choices[0].message
        assert accepted(client, message)
