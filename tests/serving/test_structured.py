"""Client tools and structured answers by OpenAI's own client: of a model that knows, and of random weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import openai
import pytest
import torch
from pydantic import BaseModel, ConfigDict, Field

from components.models.checkpoint import save_decoder
from components.models.decoder import Decoder, DecoderConfig
from components.tokenization import chat_tokenizer as bpe
from components.tokenization.hf_tokenizer import load_chat_tokenizer

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
    "required": ["city"],
    "additionalProperties": False,
}
ORDER = {
    "type": "object",
    "properties": {
        "lines": {
            "type": "array",
            "minItems": 1,
            "maxItems": 2,
            "items": {
                "type": "object",
                "properties": {"sku": {"type": "string", "pattern": "^[A-Z]{2}\\d{3}$"}, "count": {"type": "integer"}},
                "required": ["sku", "count"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["lines"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "place_order", "parameters": ORDER, "strict": True}},
    {"type": "function", "function": {"name": "ping"}},
]
SCHEMAS = {"get_weather": WEATHER, "place_order": ORDER, "ping": {"maxProperties": 0}}
HOT: Any = {"temperature": 2.0, "max_tokens": 250}


class GateDecision(BaseModel):
    model_config = ConfigDict(extra="forbid")

    fine: bool
    score: Annotated[int, Field(ge=0, le=10)]


class Circle(BaseModel):
    kind: Literal["circle"] = "circle"
    radius: Annotated[int, Field(ge=0, le=9)]


class Square(BaseModel):
    kind: Literal["square"] = "square"
    filled: bool


class Group(BaseModel):
    kind: Literal["group"] = "group"
    inner: Annotated[list[Shape], Field(max_length=1)]


Shape = Annotated[Circle | Square | Group, Field(discriminator="kind")]


class Drawing(BaseModel):
    shape: Shape


def random_agent(folder: Path) -> Path:
    """A model folder whose weights mean nothing."""
    bpe.save(bpe.train(["Weather of Paris in celsius, true or null: 12.5 {} []"] * 9, 400), folder / "tokenizer")
    size = load_chat_tokenizer(folder / "tokenizer").vocab_size
    torch.manual_seed(3)
    config = DecoderConfig(
        vocab_size=size,
        embed_dim=32,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        hidden_dim=48,
        max_seq_len=512,
        qk_norm=True,
    )
    save_decoder(
        Decoder(config), folder / "agent", folder / "tokenizer", {"agent.json": '{"tools": [], "max_steps": 2}'}
    )
    return folder / "agent"


@pytest.fixture(scope="module")
def wild(tmp_path_factory: pytest.TempPathFactory, local_app: Any) -> Iterator[openai.OpenAI]:
    folder = tmp_path_factory.mktemp("wild")
    with local_app(random_agent(folder), folder / "home") as app:
        yield openai.OpenAI(base_url="http://testserver/v1", api_key="x", max_retries=0, http_client=app.client)


@pytest.fixture(scope="module")
def client(local: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url="http://testserver/v1", api_key="x", max_retries=0, http_client=local.client)


def asked(client: openai.OpenAI, content: str = "Weather in Paris?", **options: Any) -> Any:
    return client.chat.completions.create(model="agent", messages=[{"role": "user", "content": content}], **options)


def fit(calls: Any, choice: str = "") -> None:
    for call in calls:
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
        assert choice in ("", call.function.name)


@pytest.mark.parametrize("seed", range(6))
def test_random_weights_call_declared_tools_with_arguments_that_fit(wild: openai.OpenAI, seed: int) -> None:
    choice = asked(wild, tools=TOOLS, tool_choice="required", seed=seed, **HOT).choices[0]
    assert choice.finish_reason in ("tool_calls", "length")
    assert bool(choice.message.tool_calls) == (choice.finish_reason == "tool_calls")
    fit(choice.message.tool_calls or ())
    named = {"type": "function", "function": {"name": "place_order"}}
    for _ in range(3):
        choice = asked(wild, tools=TOOLS, tool_choice=named, seed=seed, **HOT).choices[0]
        fit(choice.message.tool_calls or (), "place_order")


def test_random_weights_call_one_tool_at_a_time_when_told(wild: openai.OpenAI) -> None:
    for seed in range(8):
        options = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "seed": seed, **HOT}
        assert len(asked(wild, **options).choices[0].message.tool_calls or ()) <= 1


@pytest.mark.parametrize("max_tokens", [20, 60, 250])
def test_random_weights_answer_as_the_schema_says_or_say_that_they_were_cut(
    wild: openai.OpenAI, max_tokens: int
) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "order", "schema": ORDER}}
    for seed in range(6):
        for stream in (False, True):
            options = {"response_format": form, "seed": seed, "temperature": 2.0, "max_tokens": max_tokens}
            answer = asked(wild, stream=stream, **options)
            chunks = [chunk.choices[0] for chunk in answer] if stream else []
            said = "".join(each.delta.content or "" for each in chunks) or answer.choices[0].message.content
            reason = chunks[-1].finish_reason if stream else answer.choices[0].finish_reason
            assert reason in ("stop", "length")
            if reason == "stop" or max_tokens > 20:
                jsonschema.validate(json.loads(said), ORDER)


def test_random_weights_answer_with_an_object(wild: openai.OpenAI) -> None:
    for seed in range(4):
        said = asked(wild, response_format={"type": "json_object"}, seed=seed, **HOT).choices[0].message.content
        assert isinstance(json.loads(said), dict)


def test_answers_parse_into_pydantic_models(wild: openai.OpenAI) -> None:
    parsed = wild.chat.completions.parse(
        model="agent",
        messages=[{"role": "user", "content": "Is it fine?"}],
        response_format=GateDecision,
        temperature=1.0,
        seed=1,
        max_tokens=200,
    )
    assert isinstance(parsed.choices[0].message.parsed, GateDecision)


def test_discriminated_unions_of_pydantic_are_answers_and_arguments(wild: openai.OpenAI) -> None:
    question: Any = [{"role": "user", "content": "Draw."}]
    kinds = set()
    for seed in range(6):
        chosen = wild.chat.completions.parse(
            model="agent", messages=question, response_format=Drawing, seed=seed, **HOT
        ).choices[0]
        assert isinstance(chosen.message.parsed, Drawing)
        kinds.add(chosen.message.parsed.shape.kind)
    assert len(kinds) > 1
    plain: Any = {"type": "function", "function": {"name": "draw", "parameters": Drawing.model_json_schema()}}
    for tool in (openai.pydantic_function_tool(Drawing, name="draw"), plain):
        choice = asked(wild, tools=[tool], tool_choice="required", seed=1, **HOT).choices[0]
        assert choice.message.tool_calls
        for call in choice.message.tool_calls:
            Drawing.model_validate_json(call.function.arguments)


def test_one_odd_tool_of_many_fails_no_request_but_with_strict(wild: openai.OpenAI) -> None:
    odd: Any = {"name": "odd", "parameters": {"properties": {"a": {"type": "array", "uniqueItems": True}}}}
    choice = asked(wild, tools=[*TOOLS, {"type": "function", "function": odd}], tool_choice="required", seed=2, **HOT)
    fit([call for call in choice.choices[0].message.tool_calls or () if call.function.name != "odd"])
    with pytest.raises(openai.BadRequestError, match="'uniqueItems' is not supported") as refused:
        asked(wild, tools=[*TOOLS, {"type": "function", "function": {**odd, "strict": True}}])
    assert refused.value.code == "invalid_schema"


def test_free_and_held_requests_share_a_batch_and_neither_changes_the_other(wild: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "order", "schema": ORDER}}
    kinds: list[dict[str, Any]] = [{}, {"response_format": form}, {"tools": TOOLS, "tool_choice": "required"}] * 4
    options = [{**kind, "seed": seed, "temperature": 1.0, "max_tokens": 80} for seed, kind in enumerate(kinds)]

    def answer(each: dict[str, Any]) -> Any:
        message = asked(wild, **each).choices[0].message
        return message.content, [call.function.to_dict() for call in message.tool_calls or ()]

    alone = [answer(each) for each in options]
    with ThreadPoolExecutor(len(options)) as together:
        assert list(together.map(answer, options)) == alone


def test_streamed_calls_are_put_together_by_the_client(client: openai.OpenAI) -> None:
    tool: Any = [TOOLS[0]]
    messages: Any = [{"role": "user", "content": "Weather in Paris?"}]
    with client.chat.completions.stream(model="agent", messages=messages, tools=tool) as stream:
        events = [event.type for event in stream]
        [call] = stream.get_final_completion().choices[0].message.tool_calls or ()
    assert "tool_calls.function.arguments.delta" in events
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    assert json.loads(call.function.arguments) == json.loads(
        asked(client, tools=tool).choices[0].message.tool_calls[0].function.arguments
    )


def test_a_tool_is_called_and_its_result_taken(client: openai.OpenAI) -> None:
    """The round trip of every agent: ask, be called, answer the call, be answered."""
    messages: Any = [{"role": "user", "content": "Weather in Paris?"}]
    message = client.chat.completions.create(model="agent", messages=messages, tools=[TOOLS[0]]).choices[0].message
    [call] = message.tool_calls or ()
    messages += [message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    answer = client.chat.completions.create(
        model="agent", messages=messages, tools=[TOOLS[0]], tool_choice="none"
    ).choices[0]
    assert answer.finish_reason in ("stop", "length")
    assert not answer.message.tool_calls


def test_the_agents_own_tools_and_a_form_go_together(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "v", "schema": GateDecision.model_json_schema()}}
    answer = asked(client, "What is 6*7?", response_format=form).choices[0]
    assert answer.finish_reason == "stop", answer.message.content
    GateDecision.model_validate_json(answer.message.content)


def test_openapi_tells_the_forms_exactly(local: Any) -> None:
    schemas = local.client.get("/openapi.json").json()["components"]["schemas"]
    properties = schemas["ChatRequest"]["properties"]
    choice = json.dumps(properties["tool_choice"])
    assert all(word in choice for word in ("none", "auto", "required", "NamedTool"))
    assert "schema" in schemas["AnswerSchema"]["properties"]
    assert schemas["SchemaFormat"]["properties"]["type"]["const"] == "json_schema"
    form = json.dumps(properties["response_format"])
    assert all(name in form for name in ("PlainFormat", "SchemaFormat"))
