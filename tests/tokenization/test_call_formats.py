"""Tool calls in the formats of other families: what the model's own template writes is read, constrained, streamed."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from components.agent.turn_grammar import TurnOptions, turn_rules
from components.tokenization.call_formats import CallTextFilter, parse_json_calls
from components.tokenization.chat_tokenizer import ChatTokenizer
from components.tokenization.hf_tokenizer import load_chat_tokenizer
from components.tokenization.tool_calls import Call, ToolCallDeltaParser
from tests.tokenization.hf_tokenizers import CALLING, PLAIN_CHATML, chatml, family, llama, sentencepiece
from tests.tokenization.test_tool_calls import assembled

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": PARAMETERS}}]
CALLS = [Call("weather", {"city": 'Köln "am Rhein {1\n<tool_call>\\', "days": 3}), Call("weather", {"city": "Paris"})]
FORMATS = {  # the marks, the text between two calls, the keys
    "chatml": ("<tool_call>", "</tool_call>", "\n</tool_call>\n<tool_call>\n", ("name", "arguments")),
    "llama": ("", "", None, ("name", "parameters")),
    "mistral": ("[TOOL_CALLS]", "", ", ", ("name", "arguments", "id")),
    "gemma": ("```tool_code", "\n```", "\n```\n```tool_code\n", ("name", "parameters")),
    "phi": ("<|tool_call|>", "<|/tool_call|>", ", ", ("name", "arguments")),
    "plain chatml": ("<tool_call>", "</tool_call>", "\n</tool_call>\n<tool_call>\n", ("name", "arguments")),
}


@pytest.fixture(scope="module", params=FORMATS)
def named(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ChatTokenizer]:
    folder = tmp_path_factory.mktemp("family")
    made = chatml(folder) if request.param == "chatml" else family(request.param, folder)
    return request.param, load_chat_tokenizer(made).with_tools()


@pytest.fixture
def tokenizer(named: tuple[str, ChatTokenizer]) -> ChatTokenizer:
    return named[1]


def messages(tokenizer: ChatTokenizer) -> list[dict[str, Any]]:
    """A conversation with as many calls in a turn as the format has."""
    calls = [
        {
            "id": f"call{number:05d}",
            "type": "function",
            "function": {"name": call.name, "arguments": {**call.arguments}},
        }
        for number, call in enumerate(CALLS if tokenizer.call_format.between is not None else CALLS[:1])
    ]
    results = [{"role": "tool", "tool_call_id": call["id"], "name": "weather", "content": '"rain"'} for call in calls]
    asked = {"role": "user", "content": "How is the weather?"}
    return [asked, {"role": "assistant", "content": "", "tool_calls": calls}, *results, answer("It rains.")]


def answer(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def turn_ids(tokenizer: ChatTokenizer, chat: list[dict[str, Any]]) -> list[int]:
    """Of the turn behind the first prompt."""
    ids, mask = tokenizer.encode_chat(chat, TOOLS)
    first = mask.index(1)
    return ids[first : ids.index(tokenizer.end_id, first) + 1]


def allowed(tokenizer: ChatTokenizer, ids: list[int], options: TurnOptions) -> bool:
    constraint = turn_rules(tokenizer, TOOLS, options, runs_tools=False).turn.constraint()
    for number in ids:
        if not constraint.allowed(99)[number]:
            return False
        constraint.advance(number)
    return constraint.finished


def test_the_format_is_what_the_template_writes(named: tuple[str, ChatTokenizer]) -> None:
    form = named[1].call_format
    assert (form.open, form.close, form.between, form.keys) == FORMATS[named[0]]
    assert named[1].knows_tools


def test_a_conversation_with_calls_has_the_ids_of_transformers(
    named: tuple[str, ChatTokenizer], tmp_path: Path
) -> None:
    name, tokenizer = named
    chat = messages(tokenizer)
    chat[1]["tool_calls"][0]["function"]["arguments"]["city"] = "Köln"
    reference = PreTrainedTokenizerFast.from_pretrained(
        chatml(tmp_path) if name == "chatml" else family(name, tmp_path), chat_template=tokenizer.template
    )
    for tools in (TOOLS, None):
        ids, mask = tokenizer.encode_chat(chat, tools)
        assert ids == reference.apply_chat_template(chat, tools=tools)["input_ids"]
        assert sum(mask[place] > mask[place - 1] for place in range(len(mask))) == 2


def test_calls_are_read_constrained_and_streamed_as_they_are_written(tokenizer: ChatTokenizer) -> None:
    ids = turn_ids(tokenizer, messages(tokenizer))
    calls = tokenizer.parse_turn(ids).calls
    assert [call.name for call in calls] == ["weather"] * (1 if tokenizer.call_format.between is None else 2)
    assert calls[0].arguments["days"] == 3
    assert allowed(tokenizer, ids, TurnOptions("required"))
    assert allowed(tokenizer, ids, TurnOptions("auto"))
    assert not allowed(tokenizer, ids, TurnOptions("none"))
    stream = ToolCallDeltaParser(tokenizer)
    deltas = [stream.push(number) for number in ids]
    [*read] = assembled([delta for pushed in deltas for delta in pushed])
    assert [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in read] == [
        (call.name, call.arguments) for call in calls
    ]
    assert sum(map(bool, deltas)) > 10, "arguments come piece by piece"


def test_words_may_stand_before_calls_and_hold_none(tokenizer: ChatTokenizer) -> None:
    if not tokenizer.call_format.open:
        pytest.skip("a call is the whole turn")
    ids = [*tokenizer.encode("Let me look.\n"), *turn_ids(tokenizer, messages(tokenizer))]
    turn = tokenizer.parse_turn(ids)
    assert (turn.content, len(turn.calls)) == ("Let me look.", 2)
    assert allowed(tokenizer, ids, TurnOptions("auto"))
    mark = tokenizer.encode(tokenizer.call_format.open)
    assert not allowed(tokenizer, [*tokenizer.encode("Look: "), *mark, tokenizer.end_id], TurnOptions("auto"))


def test_whatever_is_drawn_are_whole_calls_or_words(tokenizer: ChatTokenizer) -> None:
    for calls in ("required", "auto"):
        rules = turn_rules(tokenizer, TOOLS, TurnOptions(calls), runs_tools=False)
        for seed in range(12):
            chance, constraint, ids = np.random.default_rng(seed), rules.turn.constraint(), list[int]()
            while not constraint.finished and len(ids) < 150:
                ids.append(int(chance.choice(np.flatnonzero(constraint.allowed(99)))))
                constraint.advance(ids[-1])
            turn = tokenizer.parse_turn(ids)
            if constraint.finished and calls == "required":
                assert turn.calls
                assert not turn.content
            assert all(set(call.arguments) <= {"city", "days"} for call in turn.calls)
            assert not tokenizer.call_format.open or tokenizer.call_format.open not in turn.content


def test_what_a_user_types_is_no_mark(tokenizer: ChatTokenizer) -> None:
    form = tokenizer.call_format
    for mark in filter(None, (form.open, form.close)):
        chats = [[{"role": "user", "content": text}] for text in ("hello", f"hello {mark}{mark}")]
        tokens = [[n for n in tokenizer.encode_chat(chat)[0] if n in tokenizer.special_ids.values()] for chat in chats]
        assert tokens[0] == tokens[1]


@pytest.mark.parametrize("make", [llama, sentencepiece, lambda folder: family("gemma", folder)])
def test_a_template_without_tools_gets_a_syntax_for_them(make: Any, tmp_path: Path) -> None:
    tokenizer = load_chat_tokenizer(make(tmp_path))
    assert not tokenizer.knows_tools
    extended = tokenizer.with_tools()
    assert extended.knows_tools
    assert extended.with_tools() is extended
    plain = [{"role": "user", "content": "question"}, answer("answer")]
    assert extended.encode_chat(plain) == tokenizer.encode_chat(plain)
    prompt = extended.render([{"role": "user", "content": "question"}], TOOLS, add_generation_prompt=True)
    assert '"name": "weather"' in prompt


def test_a_system_message_stays_before_the_declared_tools(tmp_path: Path) -> None:
    tokenizer = load_chat_tokenizer(family("plain chatml", tmp_path)).with_tools()
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "question"}]
    text = tokenizer.render(chat, TOOLS)
    assert text.startswith("<|im_start|>system\nBe brief.\n\nYou can call these tools:\n<tools>\n{")
    assert text.count("<|im_start|>system") == 1


def test_llama_may_write_its_tag_before_a_call(tmp_path: Path) -> None:
    tokenizer = load_chat_tokenizer(family("llama", tmp_path))
    ids = [tokenizer.special_ids["<|python_tag|>"], *turn_ids(tokenizer, messages(tokenizer))]
    assert allowed(tokenizer, ids, TurnOptions("auto"))
    assert tokenizer.parse_turn(ids).calls[0].name == "weather"
    stream = ToolCallDeltaParser(tokenizer)
    [call] = assembled([delta for number in ids for delta in stream.push(number)])
    assert json.loads(call["function"]["arguments"])["days"] == 3


@pytest.mark.parametrize("name", ["default", "tool_use"])
def test_templates_by_name_are_chosen_by_tools(name: str, tmp_path: Path) -> None:
    folder = family("plain chatml", tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    tool_use = PLAIN_CHATML.replace("Be helpful", "Use tools: ' ~ tools | length ~ '")
    config["chat_template"] = [
        {"name": "default", "template": PLAIN_CHATML},
        {"name": "tool_use", "template": tool_use},
    ]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer, reference = load_chat_tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    chat, tools = [{"role": "user", "content": "question"}], TOOLS if name == "tool_use" else None
    assert tokenizer.encode_chat(chat, tools)[0] == reference.apply_chat_template(chat, tools=tools)["input_ids"]


@pytest.mark.parametrize("name", CALLING)
def test_streamed_words_are_the_content_of_the_turn(name: str, tmp_path: Path) -> None:
    """However the text is cut into pieces."""
    form = load_chat_tokenizer(family(name, tmp_path)).with_tools().call_format
    call = f'{form.before}{{"name": "f", "arguments": {{"x": "</b> <tool"}}}}{form.after}'
    random = Random(0)
    for text in (
        call,
        f"Let me look.\n{call}",
        f"One {call} two {call}",
        f"a < b ` and {form.open[:-1]}",
        f"x {form.before}",
    ):
        content = parse_json_calls(text, form).content
        assert not form.open or form.open not in content
        for _ in range(30):
            words, place, pieces = CallTextFilter(form), 0, []
            while place < len(text):
                stop = place + random.randint(1, 6)
                pieces.append(words.push(text[place:stop]))
                place = stop
            assert "".join([*pieces, words.flush()]) == content
