"""The smoke test of a loaded model: one question through what people would be answered by."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Mapping

from components.models.devices import threads_for, use_threads
from serving.engine.backend import Backend, Completion, Event, Failure, GenerationRequest
from serving.engine.classifier_worker import ClassifierWorker

QUESTION = "Hello"
"""Asked of a version that was registered without a question of its own."""
PATIENCE_SECONDS = 60.0
"""For the answer, and for a slot that someone else's answer must first leave."""

logger = logging.getLogger("loopwright.smoke")


def smoke_fault(loaded: ClassifierWorker | Backend, tags: Mapping[str, str]) -> str:
    """What is wrong with the answer to a version's `smoke_question`, or "" when it is its `smoke_answer`."""
    question, expected = tags.get("smoke_question") or QUESTION, tags.get("smoke_answer")
    if isinstance(loaded, ClassifierWorker):
        return _label_fault(loaded, question, expected)
    return _chat_fault(loaded, question, expected)


def _label_fault(reader: ClassifierWorker, question: str, expected: str | None) -> str:
    try:
        use_threads(threads_for(reader.texts.model.num_parameters))
        said = reader.texts.classify([question])[0].label
    except Exception as error:
        logger.exception("%s cannot classify", reader.name)
        return f"{question!r}: {type(error).__name__}: {error}"
    return _fault(question, said, expected)


def _chat_fault(engine: Backend, question: str, expected: str | None) -> str:
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    deadline = time.monotonic() + PATIENCE_SECONDS
    ask = GenerationRequest([{"role": "user", "content": question}])
    # Before all that wait: a queue of people's questions is no fault of the model's.
    task = engine.submit(ask, events.put, first=True)
    while True:
        try:
            event = events.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            task.cancel()
            return f"{question!r}: no answer in {PATIENCE_SECONDS:.0f} s"
        if isinstance(event, Failure):
            return f"{question!r}: {type(event.error).__name__}: {event.error}"
        if isinstance(event, Completion):
            return _fault(question, event.content, expected)


def _fault(question: str, said: str, expected: str | None) -> str:
    if expected is None:
        return "" if said.strip() else f"{question!r}: an empty answer"
    if said.strip() != expected.strip():
        return f"{question!r}: answered {said[:200]!r} instead of {expected[:200]!r}"
    return ""
