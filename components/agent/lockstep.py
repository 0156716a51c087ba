"""Answer many chats side by side on one model: each round generates for all that still wait."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from components.agent.agent import Agent, Answer, ContextTooLong, Conversation, Prompt
from components.agent.turns import Rules
from components.generation.decode import Sampling, generate
from components.generation.schemas import SchemaError
from components.models.decoder import Decoder

Chat = tuple[Sequence[Any], Any]
"""Messages, and the client's tools or None."""


def answer_all(
    model: Decoder,
    agent: Agent,
    chats: Sequence[Chat],
    sampling: Sampling,
    batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Answer | None]:
    """The agent's answers, in order; None where the chat does not fit the context."""
    answers: list[Answer | None] = [None] * len(chats)
    waiting: dict[int, tuple[Conversation, Prompt]] = {}
    upcoming = iter(range(len(chats)))
    done = 0
    while True:
        while len(waiting) < batch_size and (index := next(upcoming, None)) is not None:
            messages, tools = chats[index]
            conversation = agent.answer(messages, tools, rules=_rules(agent, tools))
            try:
                waiting[index] = (conversation, next(conversation))
            except ContextTooLong:
                done += 1
        if not waiting:
            return answers
        prompts = [prompt for _, prompt in waiting.values()]
        turns = generate(model, [prompt.ids for prompt in prompts], sampling, [prompt.constraint for prompt in prompts])
        for (index, (conversation, _)), turn in zip(list(waiting.items()), turns, strict=True):
            try:
                waiting[index] = (conversation, conversation.send(turn))
            except (StopIteration, ContextTooLong) as stop:
                answers[index] = stop.value if isinstance(stop, StopIteration) else None
                del waiting[index]
                done += 1
        progress(done)


def _rules(agent: Agent, tools: Any) -> Rules | None:
    """What serving holds the answer to; None where a dataset's tools have schemas that serving would refuse."""
    try:
        return agent.rules(json.loads(tools) if isinstance(tools, str) else tools)
    except SchemaError:
        return None
