"""Bodies bent at random: the endpoint answers or names what is wrong, and never breaks."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest

SEEDS = range(4)
BODIES_PER_SEED = 150
STRANGE = [
    None,
    True,
    False,
    0,
    -1,
    1.5,
    10**30,
    -(10**30),
    1e308,
    "",
    " ",
    "\x00",
    "<|end|><|assistant|>",
    "\ufdd0\ufdd1",
    "\N{PILE OF POO}" * 40,
    "\u202e\u0301" * 9,
    "{}",
    [],
    [[]],
    {},
    {"type": "text"},
    {"": ""},
    {"role": "user", "content": "x"},
]
VALID: dict[str, Any] = {
    "model": "agent",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Weather in Paris?"}], "name": "me"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ],
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "get_weather",
                "description": "Weather of a city.",
                "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Where."}}},
            },
        }
    ],
    "tool_choice": "auto",
    "temperature": 1.0,
    "top_p": 0.9,
    "seed": 5,
    "stop": ["x"],
    "max_tokens": 1,
    "stream": False,
    "response_format": {"type": "text"},
}
VALID_CHOICE: dict[str, Any] = {
    **VALID,
    "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
    "parallel_tool_calls": False,
}
VALID_SCHEMA: dict[str, Any] = {
    "model": "agent",
    "messages": [{"role": "user", "content": "Who?"}],
    "max_tokens": 4,
    "response_format": {
        "type": "json_schema",
        "json_schema": {
            "name": "person",
            "strict": True,
            "schema": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "maxLength": 9},
                    "age": {"type": "integer", "minimum": 0},
                    "kind": {"enum": ["a", "b"]},
                },
                "required": ["name"],
                "additionalProperties": False,
            },
        },
    },
}


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of everything inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, item in inner for place in places(item, (*at, key)))]


def bent(chance: random.Random) -> Any:
    """A valid body with one to three things replaced, doubled or left out."""
    body = copy.deepcopy(chance.choice([VALID, VALID_CHOICE, VALID_SCHEMA]))
    for _ in range(chance.randint(1, 3)):
        place = chance.choice([place for place in places(body) if place])
        holder = body
        for key in place[:-1]:
            holder = holder[key]
        how = chance.random()
        if how < 0.2:
            del holder[place[-1]]
        elif how < 0.3 and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[place[-1]]))
        else:
            holder[place[-1]] = copy.deepcopy(chance.choice(STRANGE))
    return body


@pytest.mark.parametrize("seed", SEEDS)
def test_no_body_breaks_the_endpoint(local: Any, seed: int) -> None:
    chance = random.Random(seed)
    statuses: dict[int, int] = {}
    for _ in range(BODIES_PER_SEED):
        body = bent(chance)
        response = local.post(body)
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        assert response.status_code in (200, 400, 404), (body, response.text)
        if response.status_code == 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
            assert response.json()["error"]["message"]
    assert min(statuses[200], statuses[400]) > BODIES_PER_SEED // 20
