"""OpenAI's deltas of calls: joined they are the calls, whatever the model wrote."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import numpy as np
import pytest

from components.agent.turn_grammar import TurnOptions, turn_rules
from components.tokenization import chat_tokenizer as bpe
from components.tokenization.call_formats import CallFormat, CallTextFilter, parse_json_calls
from components.tokenization.chat_tokenizer import ChatTokenizer
from components.tokenization.tool_calls import ToolCallDeltaParser, openai_call

VALUES = [
    *("Paris", "", " led", "12", "12 apples", "1e", "-", "-Infinity", "-In", "true", "truest", "n", "nul", "NaN", "07"),
    *('"quoted"', "{", "[x", 'a "b" \\ c\n\u0007', "日本語 \N{SNOWMAN} \U0001f600", "x" * 80, "1.5.2", "1 2"),
    *(1, -2.5, 10**30, True, None, [], {}, [1, {"a": ["b", None]}], {"k": "v", "é": [0.1]}),
]


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer(bpe.train(["Weather of Paris true null 12.5"] * 9, 400), bpe.TEMPLATE_FILE.read_text())


def assembled(deltas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The calls that a client of the stream puts together."""
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        if "id" in delta:
            assert delta["index"] == len(calls)
            calls.append({key: value for key, value in delta.items() if key != "index"})
            calls[-1]["function"] = dict(delta["function"])
        else:
            calls[delta["index"]]["function"]["arguments"] += delta["function"]["arguments"]
    return calls


def streamed(tokenizer: ChatTokenizer, ids: list[int]) -> tuple[list[dict[str, Any]], ToolCallDeltaParser]:
    stream = ToolCallDeltaParser(tokenizer)
    return [delta for number in ids for delta in stream.push(number)], stream


def turn(tokenizer: ChatTokenizer, *calls: tuple[str, dict[str, Any]]) -> list[int]:
    written = [{"function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    return tokenizer.encode_chat([{"role": "assistant", "content": "Well.", "tool_calls": written}])[0][1:]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: json.dumps(value)[:20])
def test_the_pieces_of_a_call_make_the_call(tokenizer: ChatTokenizer, value: Any) -> None:
    ids = turn(tokenizer, ("f", {}), ("g", {"a": value, "b": value}), ("f", {"c": value}))
    deltas, stream = streamed(tokenizer, ids)
    calls = tokenizer.parse_turn(ids).calls
    assert calls[1].arguments == {"a": value, "b": value}
    expected = [openai_call(call, number) for call, number in zip(calls, stream.ids, strict=True)]
    assert assembled(deltas) == expected


def test_the_pieces_of_any_calls_make_the_calls(tokenizer: ChatTokenizer) -> None:
    schema = {"type": "object", "properties": {"a": {}, "b": {"type": "string"}, "c": {"type": "array"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {**schema, "required": ["a", "b"]}}}]
    rule = turn_rules(tokenizer, tools, TurnOptions("required"), runs_tools=False)
    for seed in range(40):
        chance, follower, ids = np.random.default_rng(seed), rule.turn.constraint(), list[int]()
        while not follower.finished and len(ids) < 200:
            ids.append(int(chance.choice(np.flatnonzero(follower.allowed(99)))))
            follower.advance(ids[-1])
        if not follower.finished:
            ids.append(tokenizer.end_id)
        deltas, stream = streamed(tokenizer, ids)
        calls = tokenizer.parse_turn(ids).calls
        if follower.finished:
            expected = [openai_call(call, number) for call, number in zip(calls, stream.ids, strict=True)]
            assert assembled(deltas) == expected


def test_the_name_comes_first_and_long_text_in_pieces(tokenizer: ChatTokenizer) -> None:
    ids = turn(tokenizer, ("f", {"text": "a long story about nothing " * 5}))
    deltas, stream = streamed(tokenizer, ids)
    assert deltas[0] == {
        "index": 0,
        "id": stream.ids[0],
        "type": "function",
        "function": {"name": "f", "arguments": ""},
    }
    assert len(deltas) > 20


def test_a_call_that_was_cut_is_not_closed(tokenizer: ChatTokenizer) -> None:
    ids = turn(tokenizer, ("f", {"text": "some words"}))[:-1]
    [call] = assembled(streamed(tokenizer, ids)[0])
    with pytest.raises(ValueError, match=r"Unterminated|delimiter"):
        json.loads(call["function"]["arguments"])


FORM = CallFormat("<tool_call>", "</tool_call>")
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": "</b> <tool"}}\n</tool_call>'
BARE = ' {"name": "f", "parameters": {"city": "Paris"}}'


@pytest.mark.parametrize(
    "text",
    [
        "plain words",
        "a < b and <tool> is no mark <tool_cal",
        CALL,
        f"Let me look.\n{CALL}",
        f"{CALL}\n{CALL}",
        f"{CALL}\nDone, a < b.",
        f"One {CALL} two {CALL} three",
        BARE,
        '{"answer": 42}',
        "  {not json",
        "",
    ],
)
def test_streamed_words_of_another_familys_turn_hold_no_call(text: str) -> None:
    """However the text is cut into pieces, joined they are the content of the whole turn."""
    expected = parse_json_calls(text, FORM).content
    random = Random(0)
    for longest in (1, 2, 5, 100):
        for _ in range(20):
            words, place, pieces = CallTextFilter(FORM), 0, []
            while place < len(text):
                stop = place + random.randint(1, longest)
                pieces.append(words.push(text[place:stop]))
                place = stop
            pieces.append(words.flush())
            assert "".join(pieces) == expected
            assert "<tool_call>" not in "".join(pieces)


def test_a_call_that_was_cut_off_is_no_text() -> None:
    words = CallTextFilter(FORM)
    assert words.push('I look. <tool_call>\n{"name": "f", "argum') + words.flush() == "I look."
