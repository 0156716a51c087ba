"""Batched rollout: answers many chats in one continuous batch; as one ends, the next takes its slot."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from components.agent.agent import Agent, Answer, ContextTooLong, Conversation, Prompt
from components.agent.tool_policy import OPEN, ToolPolicy
from components.agent.turn_grammar import Rules
from components.inference.batching import ContinuousBatch, Row
from components.inference.sampling import Sampling
from components.inference.schemas import SchemaError
from components.media.messages import PicturesUnsupported
from components.models.decoder import Decoder

Chat = tuple[Sequence[Any], Any]
"""Messages, and the client's tools or None."""
TOLD = 64
"""Answers between two reports of progress."""


def answer_all(
    model: Decoder,
    agent: Agent,
    chats: Sequence[Chat],
    sampling: Sampling,
    batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
    policy: ToolPolicy = OPEN,
) -> list[Answer | None]:
    """The agent's answers, in order; None where the chat does not fit the context, or has pictures it cannot read.

    Each answer is independent of the other chats: with a seed, each chat uses the random numbers of that seed.
    """
    if not chats:
        return []
    rollout = _Rollout(agent, chats, sampling, progress, policy)
    slots = ContinuousBatch(model, batch_size)
    while True:
        rollout.begin(slots.free)
        if not slots.prefilling:
            slots.admit(rollout.next_rows(slots))
        if not (slots.prefilling or slots.decoding):
            return rollout.answers
        for row in slots.advance():
            rollout.end_turn(row)


class _Rollout:
    """The running conversations, and those that have not started."""

    def __init__(
        self,
        agent: Agent,
        chats: Sequence[Chat],
        sampling: Sampling,
        progress: Callable[[int], None],
        policy: ToolPolicy,
    ) -> None:
        self._agent, self._chats, self._sampling, self._progress = agent, chats, sampling, progress
        self._policy = policy
        self._upcoming = iter(range(len(chats)))
        self._waiting: deque[Row] = deque()
        self._done = 0
        self.answers: list[Answer | None] = [None] * len(chats)
        self.talks: dict[Row, tuple[int, Conversation]] = {}
        """The chat of each row."""

    def begin(self, free: int) -> None:
        """Start conversations for the free slots that no waiting turn will take."""
        while len(self._waiting) < free and (index := next(self._upcoming, None)) is not None:
            messages, tools = self._chats[index]
            conversation = self._agent.answer(messages, tools, rules=_rules(self._agent, tools), policy=self._policy)
            self._go_on(index, conversation, partial(next, conversation))

    def next_rows(self, slots: ContinuousBatch) -> list[Row]:
        return [self._waiting.popleft() for _ in range(slots.group(list(self._waiting)))]

    def end_turn(self, row: Row) -> None:
        """Send a generated turn to its conversation, whose next turn precedes the chats that have not started."""
        index, conversation = self.talks.pop(row)
        self._go_on(index, conversation, partial(conversation.send, row.generated))

    def _go_on(self, index: int, conversation: Conversation, step: Callable[[], Prompt]) -> None:
        try:
            prompt = step()
        except (StopIteration, ContextTooLong, PicturesUnsupported) as stop:
            self.answers[index] = stop.value if isinstance(stop, StopIteration) else None
            self._done += 1
            if self._done % TOLD == 0 or self._done == len(self._chats):
                self._progress(self._done)
            return
        s = self._sampling
        row = Row(
            prompt.ids,
            s.max_new_tokens,
            s.temperature,
            s.top_p,
            s.seed,
            s.stop_ids,
            prompt.constraint,
            pictures=prompt.pictures,
        )
        self.talks[row] = index, conversation
        self._waiting.append(row)


def _rules(agent: Agent, tools: Any) -> Rules | None:
    """The grammars that serving uses; None where a dataset's tools have schemas that serving refuses."""
    try:
        return agent.rules(json.loads(tools) if isinstance(tools, str) else tools)
    except SchemaError:
        return None
