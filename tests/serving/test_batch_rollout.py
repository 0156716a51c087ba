"""What is evaluated is what is served: chats side by side get the answers that the engine gives each alone."""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any

import pytest

from components.agent import batch_rollout as rollout
from components.agent.batch_rollout import answer_all
from components.inference.sampling import Sampling
from components.models.checkpoint import load_decoder
from serving.engine.backend import Completion, Event, Failure, GenerationRequest
from serving.engine.local import LocalEngine

QUESTIONS = ("Hello", "What is 6*7?", "A story", "Letters", "Weather in Paris?")
NEW_TOKENS = 64


def served(engine: LocalEngine, chat: list[dict[str, Any]]) -> tuple[str, int]:
    told: queue.Queue[Event] = queue.Queue()
    engine.submit(GenerationRequest(chat, rules=engine.agent.rules(), max_tokens=None), told.put)
    while not isinstance(event := told.get(timeout=60), Completion | Failure):
        pass
    assert isinstance(event, Completion)
    return event.content, sum(step["type"] == "call" for step in event.steps)


def test_chats_side_by_side_are_answered_as_the_engine_answers_each(
    agent_folder: Path, engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout, "TOLD", 3)
    monkeypatch.setattr(engine, "max_new_tokens", NEW_TOKENS)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS * 2]
    endless = [{"role": "user", "content": "word " * 400}]
    told: list[int] = []
    sampling = Sampling(NEW_TOKENS, stop_ids=(engine.agent.tokenizer.end_id,))
    answers = answer_all(
        load_decoder(agent_folder),
        engine.agent,
        [(chat, None) for chat in [*chats, endless]],
        sampling,
        batch_size=3,
        progress=told.append,
    )
    assert answers.pop() is None, "too long for the context"
    found = [(one.content, sum(step["type"] == "call" for step in one.steps)) for one in answers if one is not None]
    assert found == [served(engine, chat) for chat in chats]
    assert ("That is 42.", 1) in found
    assert told == [3, 6, 9, 11]
