"""The smoke test of a loaded model: one question through the engine that people would be answered by."""

from __future__ import annotations

import queue
import time
from collections.abc import Mapping

from serving.engine import Ask, Engine, Event, Failed, Finished

QUESTION = "Hello"
"""Asked of a version that was registered without a question of its own."""
PATIENCE_SECONDS = 60.0
"""For the answer, and for a slot that someone else's answer must first leave."""


def smoke_fault(engine: Engine, tags: Mapping[str, str]) -> str:
    """What is wrong with the answer to a version's `smoke_question`, or "" when it is its `smoke_answer`."""
    question, expected = tags.get("smoke_question") or QUESTION, tags.get("smoke_answer")
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    deadline = time.monotonic() + PATIENCE_SECONDS
    ask = Ask([{"role": "user", "content": question}])
    # Before all that wait: a queue of people's questions is no fault of the model's.
    ticket = engine.submit(ask, events.put, first=True)
    while True:
        try:
            event = events.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            ticket.cancel()
            return f"{question!r}: no answer in {PATIENCE_SECONDS:.0f} s"
        if isinstance(event, Failed):
            return f"{question!r}: {type(event.error).__name__}: {event.error}"
        if isinstance(event, Finished):
            return _fault(question, event.content, expected)


def _fault(question: str, said: str, expected: str | None) -> str:
    if expected is None:
        return "" if said.strip() else f"{question!r}: an empty answer"
    if said.strip() != expected.strip():
        return f"{question!r}: answered {said[:200]!r} instead of {expected[:200]!r}"
    return ""
