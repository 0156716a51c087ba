"""The routes in one process: what is answered, in which shape, and what every kind of bad input gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from components.feedback.store import Store
from serving.models.alias_watcher import ServingModels

GREETING = "Grüße, naïve façade: 日本語 and \N{SNOWMAN}."
STORY = "One two three four five six seven eight nine ten. The end of it. And then some more words."
USER = {"role": "user", "content": "Hello"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def chunks(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_completion_has_openai_shape_and_steps(local: Any) -> None:
    answer = local.ask("What is 6*7?").json()
    assert answer["id"].startswith("chatcmpl-")
    assert (answer["object"], answer["model"]) == ("chat.completion", "agent/1")
    [choice] = answer["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == "That is 42."
    assert [step["type"] for step in choice["message"]["steps"]] == ["call", "result"]
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 0


def test_stream_has_role_first_reason_last_and_the_same_words(local: Any) -> None:
    response = local.ask("What is 6*7?", stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    told = chunks(response.text)
    deltas = [chunk["choices"][0]["delta"] for chunk in told]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == "That is 42."
    assert [step["type"] for delta in deltas for step in delta.get("steps", [])] == ["call", "result"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in told] == [None] * (len(told) - 1) + ["stop"]
    assert len({chunk["id"] for chunk in told}) == 1
    assert all("usage" not in chunk for chunk in told)


def test_stream_can_include_usage(local: Any) -> None:
    told = chunks(local.ask("Hello", stream=True, stream_options={"include_usage": True}).text)
    assert told[-1]["choices"] == []
    assert told[-1]["usage"]["completion_tokens"] > 0
    assert all(chunk["usage"] is None for chunk in told[:-1])


def test_content_parts_of_text_are_joined(local: Any) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert local.ask(parts).json()["choices"][0]["message"]["content"] == GREETING


def test_calls_of_the_clients_tools_are_handed_back(local: Any) -> None:
    [choice] = local.ask("Weather in Paris?", tools=[WEATHER]).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    [call] = choice["message"]["tool_calls"]
    assert call["type"] == "function"
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
    told = chunks(local.ask("Weather in Paris?", tools=[WEATHER], stream=True).text)
    deltas = [chunk["choices"][0]["delta"] for chunk in told if "tool_calls" in chunk["choices"][0]["delta"]]
    [first], *more = (delta["tool_calls"] for delta in deltas)
    assert (first["index"], first["function"]) == (0, {"name": "get_weather", "arguments": ""})
    assert "".join(piece["function"]["arguments"] for [piece] in more) == call["function"]["arguments"]
    assert told[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_tool_choice_none_calls_nothing(local: Any) -> None:
    [choice] = local.ask("Weather in Paris?", tools=[WEATHER], tool_choice="none").json()["choices"]
    assert "tool_calls" not in choice["message"]
    assert local.ask("What is 6*7?", tool_choice="none").json()["choices"][0]["message"]["steps"] == []


def test_results_of_the_clients_tools_are_taken(local: Any) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    messages = [
        {"role": "user", "content": "Weather in Paris?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    assert local.post({"messages": messages, "tools": [WEATHER]}).status_code == 200


@pytest.mark.parametrize(
    "options",
    [
        {"n": 1, "user": "me", "seed": 3, "stop": None, "temperature": None, "top_p": 0, "max_tokens": 3},
        {"frequency_penalty": 0, "logprobs": False, "logit_bias": {}, "response_format": {"type": "text"}},
        {"store": True, "metadata": {"a": "b"}, "service_tier": "auto", "never_heard_of": [1, {"x": 2}]},
        {"model": "agent"},
        {"model": "agent/1"},
        {"stop": ["a", "b"], "tools": [], "tool_choice": "auto", "parallel_tool_calls": False},
    ],
)
def test_harmless_options_are_taken(local: Any, options: dict[str, Any]) -> None:
    assert local.ask("Hello", **options).status_code == 200


def test_prompt_beyond_the_context_has_openais_code(local: Any) -> None:
    for stream in (False, True):
        response = local.ask("long " * 400, stream=stream)
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert error["param"] == "messages"
        assert "tokens do not fit the model's context of 256" in error["message"]


def test_unknown_model_is_not_found(local: Any) -> None:
    for model in ("gpt-5", "agent/7", "agent@challenger"):
        response = local.ask("Hello", model=model)
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"
        assert response.json()["error"]["message"] == f"model: {model!r} is not served here; served: agent/1"


def test_models_are_listed_with_version(local: Any) -> None:
    listed = local.client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [(model["id"], model["version"]) for model in listed["data"]] == [("agent/1", "1")]
    assert local.client.get("/v1/models/agent/1").json() == listed["data"][0]
    assert local.client.get("/v1/models/nope").status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nope", 404),
        ("GET", "/v1/nope", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/feedback", 405),
        ("GET", "/v1/lineage/chatcmpl-unknown", 404),
        ("GET", "/docs/assets/nope.js", 404),
    ],
)
def test_every_error_has_openais_shape(local: Any, method: str, path: str, status: int) -> None:
    response = local.client.request(method, path)
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert path in error["message"] or "completion" in error["message"]


def test_bug_is_a_500_in_shape_without_its_details(local: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("what nobody should read")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "add_exchange", broken)
        response = local.ask("Hello")
        assert response.status_code == 500
        assert response.json()["error"]["message"] == "the server failed on this request; its log has the traceback"


def test_loading_and_draining_answer_503(agent_folder: Path, tmp_path: Path, local_app: Any) -> None:
    with local_app(agent_folder, tmp_path) as app:
        assert app.client.get("/readyz").status_code == 200
        serving_models, app.serving.models.serving_models = app.serving.models.serving_models, ServingModels()
        assert app.client.get("/readyz").status_code == 503
        loading = app.ask("Hello")
        assert (loading.status_code, loading.json()["error"]["code"]) == (503, "loading")
        app.serving.models.serving_models = serving_models
        app.serving.draining = True
        draining = app.ask("Hello")
        assert (draining.status_code, draining.json()["error"]["code"]) == (503, "draining")
        assert draining.headers["Retry-After"]
        assert app.client.get("/readyz").status_code == 503
        assert app.client.get("/livez").status_code == 200


def test_feedback_is_taken_and_traced(local: Any) -> None:
    asked = local.ask("What is 6*7?", user="me").json()
    vote = {"completion_id": asked["id"], "rating": "down", "correction": "42", "comment": "too long"}
    response = local.client.post("/v1/feedback", json=vote)
    assert response.status_code == 202
    traced = local.client.get(f"/v1/lineage/{asked['id']}").json()
    assert traced["model"] == "agent/1"
    assert traced["request"]["messages"] == [{"role": "user", "content": "What is 6*7?"}]
    assert traced["answer"]["content"] == "That is 42."
    assert len(traced["answer"]["steps"]) == 2
    assert [(item["id"], item["correction"]) for item in traced["feedback"]] == [(response.json()["id"], "42")]
    assert traced["version"] == {
        "name": "agent",
        "version": "1",
        "run_id": "r1",
        "tags": {"git_commit": "c0ffee"},
    }


def test_idempotency_key_gives_the_same_id(local: Any) -> None:
    vote = {"completion_id": local.ask("Hello").json()["id"], "rating": "up"}
    headers = {"Idempotency-Key": "abc"}
    ids = {local.client.post("/v1/feedback", json=vote, headers=headers).json()["id"] for _ in range(3)}
    assert len(ids) == 1
    long_key = local.client.post("/v1/feedback", json=vote, headers={"Idempotency-Key": "k" * 300})
    assert long_key.status_code == 400


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"rating": "up"}, 400, "completion_id: missing"),
        ({"completion_id": "x", "rating": "meh"}, 400, "rating: \"meh\": Input should be 'up' or 'down'"),
        ({"completion_id": 5, "rating": "up"}, 400, "completion_id: 5: Input should be a valid string"),
        ({"completion_id": "x", "rating": "up", "coment": "y"}, 400, "coment: "),
        ({"completion_id": "x", "rating": "up", "correction": ""}, 400, "at least 1 character"),
        ({"completion_id": "x", "rating": "up"}, 404, "'x' is not a completion of this endpoint"),
    ],
)
def test_bad_feedback_is_refused(local: Any, body: Any, status: int, message: str) -> None:
    response = local.client.post("/v1/feedback", json=body)
    assert response.status_code == status
    assert message in response.json()["error"]["message"]


def test_cut_and_cancelled_answers_are_on_record(local: Any) -> None:
    asked = local.ask("A story", max_tokens=3).json()
    recorded = local.serving.store.completion(asked["id"])
    assert recorded["answer"]["finish_reason"] == "length"
    assert recorded["answer"]["completion_tokens"] == 3


def test_stream_is_on_record_before_its_last_chunk(local: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    add_answer = Store.add_answer

    def noted(store: Store, completion_id: str, answer: Any) -> None:
        add_answer(store, completion_id, answer)
        order.append("stored")

    monkeypatch.setattr(Store, "add_answer", noted)
    with local.client.stream("POST", "/v1/chat/completions", json={"messages": [USER], "stream": True}) as response:
        order += ["last" for line in response.iter_lines() if '"finish_reason":"stop"' in line]
    assert order == ["stored", "last"]


def test_metrics_have_bounded_labels(local: Any) -> None:
    for number in range(5):
        local.client.get(f"/nope/{number}")
        local.client.get(f"/v1/lineage/{number}")
    local.ask("Hello")
    text = local.client.get("/metrics").text
    assert 'loopwright_requests_total{route="other",status="404"}' in text
    assert 'loopwright_requests_total{route="/v1/lineage/{completion_id}",status="404"}' in text
    assert 'loopwright_requests_total{route="/v1/chat/completions",status="200"}' in text
    assert 'loopwright_tokens_total{kind="completion"}' in text
    assert 'loopwright_queue{state="waiting"} 0.0' in text
    assert 'loopwright_model_version{name="agent"} 1.0' in text
    assert "nope" not in text


def test_pages_and_schema_need_no_network(local: Any) -> None:
    page = local.client.get("/docs").text
    assert "//" not in page.replace("<!--", "").replace("http://testserver", "")
    for asset in ("swagger-ui-bundle.js", "swagger-ui.css"):
        assert f"/docs/assets/{asset}" in page
        assert local.client.get(f"/docs/assets/{asset}").status_code == 200
    schema = local.client.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/feedback", "/v1/models", "/livez"} <= set(schema["paths"])
    assert "422" not in json.dumps(schema)
