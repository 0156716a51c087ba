"""The four steps, driven by hand: what the model is shown, and what comes of what it writes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from components.agent.agent import GAVE_UP, Agent, Answer, ContextTooLong
from components.agent.tools import Tool
from components.agent.turn_grammar import Rules, TurnOptions
from components.config.params import InputError
from components.tokenization import chat_tokenizer as bpe
from components.tokenization.chat_tokenizer import ChatTokenizer
from components.tokenization.tool_calls import Call
from examples.stdlib_agent import facts

QUESTION = [{"role": "user", "content": "What is six times seven?"}]


def fail(text: str) -> str:
    raise RuntimeError("no paper left")


def shout(text: str) -> str:
    return text.upper()


def tool(name: str, function: Any) -> Tool:
    schema = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
    return Tool(name=name, description=name, parameters=schema, function=function)


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer(bpe.train(["six times seven is forty two"] * 9, 400), bpe.TEMPLATE_FILE.read_text())


@pytest.fixture
def agent(tokenizer: ChatTokenizer) -> Agent:
    return Agent(tokenizer, [tool("echo", shout), tool("print", fail)], max_steps=3, context_len=200)


def written(tokenizer: ChatTokenizer, content: str = "", calls: Sequence[tuple[str, dict[str, Any]]] = ()) -> list[int]:
    """The ids a model would write for this turn."""
    tool_calls = [{"function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    return tokenizer.encode_chat([{"role": "assistant", "content": content, "tool_calls": tool_calls}])[0][1:]


def drive(
    agent: Agent, turns: Sequence[list[int]], tools: Any = None, rules: Rules | None = None
) -> tuple[Answer, list[str]]:
    """The answer to scripted turns of the model, and the prompts it was shown."""
    conversation = agent.answer(QUESTION, tools, rules=rules)
    prompts = [next(conversation)]
    for turn in turns:
        try:
            prompts.append(conversation.send(turn))
        except StopIteration as stop:
            return stop.value, [agent.tokenizer.decode(prompt.ids) for prompt in prompts]
    raise AssertionError("the agent asked for one more turn")


def test_words_alone_are_the_answer(agent: Agent) -> None:
    answer, prompts = drive(agent, [written(agent.tokenizer, "It is 42.")])
    assert (answer.content, answer.steps, answer.finish_reason) == ("It is 42.", (), "stop")
    assert len(prompts) == 1


def test_a_call_is_run_and_its_result_shown(agent: Agent) -> None:
    turns = [written(agent.tokenizer, calls=[("echo", {"text": "seven"})]), written(agent.tokenizer, "SEVEN it is.")]
    answer, prompts = drive(agent, turns)
    assert answer.content == "SEVEN it is."
    assert answer.steps == (
        {"type": "call", "name": "echo", "arguments": {"text": "seven"}},
        {"type": "result", "name": "echo", "content": "SEVEN"},
    )
    assert prompts[1].endswith(" echo text seven SEVEN")
    assert answer.completion_tokens == sum(map(len, turns))


def test_two_calls_of_one_turn_are_both_run(agent: Agent) -> None:
    calls = [("echo", {"text": "a"}), ("echo", {"text": "b"})]
    answer, _ = drive(agent, [written(agent.tokenizer, calls=calls), written(agent.tokenizer, "done")])
    assert [step["content"] for step in answer.steps if step["type"] == "result"] == ["A", "B"]


def test_errors_of_a_tool_are_shown_to_the_model(agent: Agent) -> None:
    turns = [
        written(agent.tokenizer, calls=[("print", {"text": "x"}), ("fax", {})]),
        written(agent.tokenizer, "Sorry."),
    ]
    answer, prompts = drive(agent, turns)
    results = [step["content"] for step in answer.steps if step["type"] == "result"]
    assert results[0].startswith("error: ")
    assert "no paper left" in results[0]
    assert results[1].startswith("error: ")
    assert all(result in prompts[1] for result in results)
    assert answer.content == "Sorry."


def test_the_last_step_may_not_call(agent: Agent) -> None:
    answer, prompts = drive(agent, [written(agent.tokenizer, calls=[("echo", {"text": "again"})])] * 3)
    assert answer.content == GAVE_UP.format(steps=3)
    assert len(prompts) == 3


def test_a_turn_cut_by_its_limit_says_so_and_calls_nothing(agent: Agent) -> None:
    cut = written(agent.tokenizer, calls=[("echo", {"text": "seven"})])[:-1]
    answer, _ = drive(agent, [cut])
    assert (answer.finish_reason, answer.steps) == ("length", ())


def test_where_words_have_a_form_a_call_without_end_gives_way_to_them(agent: Agent) -> None:
    rules = agent.rules(options=TurnOptions(schema={"type": "object"}))
    good, cut = ([("echo", {"text": text})] for text in ("seven", "seven " * 30))
    turns = [
        written(agent.tokenizer, calls=good),
        written(agent.tokenizer, calls=cut)[:-1],
        written(agent.tokenizer, '{"result": 42}'),
    ]
    answer, prompts = drive(agent, turns, rules=rules)
    assert (answer.content, answer.finish_reason) == ('{"result": 42}', "stop")
    assert [step["type"] for step in answer.steps] == ["call", "result"]
    assert prompts[1] == prompts[2]
    assert answer.completion_tokens == sum(map(len, turns))
    twice, _ = drive(agent, [turns[1], turns[1]], rules=rules)
    assert (twice.content, twice.finish_reason, twice.steps) == ("", "length", ())


def test_an_agent_that_was_taught_forms_is_told_the_keys(tokenizer: ChatTokenizer) -> None:
    schema = {"type": "object", "properties": {"result": {"type": "integer"}, "sure": {"type": "boolean"}}}
    for forms in (True, False):
        agent = Agent(tokenizer, [tool("echo", shout)], max_steps=3, context_len=200, forms=forms)
        for options, told in ((TurnOptions(), ""), (TurnOptions(schema=schema), "Answer in JSON: result, sure")):
            answer = agent.answer(QUESTION, rules=agent.rules(options=options))
            shown = tokenizer.decode(next(answer).ids)
            assert ("Answer in JSON" in shown) == bool(told and forms)
            assert not forms or shown.startswith(f" {told}" if told else " What")


def test_a_clients_tools_are_the_clients_to_call(agent: Agent) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {}}}}}]
    answer, prompts = drive(agent, [written(agent.tokenizer, calls=[("weather", {"city": "Rome"})])], tools)
    assert answer.tool_calls == (Call("weather", {"city": "Rome"}),)
    assert (answer.finish_reason, answer.steps) == ("tool_calls", ())
    assert "weather" in prompts[0]


def test_a_prompt_without_room_to_answer_is_refused(agent: Agent) -> None:
    conversation = agent.answer([{"role": "user", "content": "word " * 400}])
    with pytest.raises(ContextTooLong, match="tokens do not fit the model's context of 200"):
        next(conversation)


def test_an_unknown_tool_in_the_model_folder_is_named(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    bpe.save(bpe.train(["text"] * 9, 400), tmp_path)
    facts.build(tmp_path / "knowledge.sqlite", [])
    (tmp_path / "agent.json").write_text('{"tools": ["teleport"], "max_steps": 2}')
    with pytest.raises(InputError, match=r"agent.json.*teleport"):
        Agent.load(tmp_path, context_len=100)
