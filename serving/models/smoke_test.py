"""The smoke test of a loaded version: the answer to its smoke question, compared with that of its release."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Mapping
from dataclasses import dataclass

from components.models.devices import threads_for, use_threads
from serving.engine.backend import (
    Backend,
    BackendNotReady,
    BackendRetired,
    BackendUnavailable,
    Completion,
    Event,
    Failure,
    GenerationRequest,
)
from serving.engine.classifier_worker import ClassifierWorker

QUESTION = "Hello"
"""Smoke question of a version that has none of its own."""
SMOKE_SECONDS = 60.0
"""Longest wait for a smoke test's answer and the slot it needs."""

logger = logging.getLogger("loopwright.follow")


@dataclass(frozen=True)
class Fault:
    """Why a version fails its smoke test."""

    reason: str
    temporary: bool = False
    """The server that runs it cannot answer now, which says nothing of the version."""
    device: str = ""
    """`device_of` the model; empty where it is not known."""


def device_of(loaded: ClassifierWorker | Backend) -> str:
    """Kind of device and dtype of a model's weights, such as `cpu float32`; empty of a model on another server."""
    model = loaded.texts.model if isinstance(loaded, ClassifierWorker) else loaded.model
    if model is None:
        return ""
    weight = next(model.parameters())
    return f"{weight.device.type} {str(weight.dtype).removeprefix('torch.')}"


def smoke_fault(loaded: ClassifierWorker | Backend, tags: Mapping[str, str]) -> Fault | None:
    """Why the answer to a version's `smoke_question` is not its `smoke_answer`; None when it is.

    On another device than that of its release the same weights may choose other words: any answer passes there.
    """
    question, expected, device = tags.get("smoke_question") or QUESTION, tags.get("smoke_answer"), device_of(loaded)
    if device != tags.get("smoke_device", device):
        expected = None
    try:
        if isinstance(loaded, ClassifierWorker):
            use_threads(threads_for(loaded.texts.model.num_parameters))
            answer: str | None = loaded.texts.classify([question])[0].label
        else:
            answer = _chat_answer(loaded, question)
    except BackendRetired:  # the server is stopping
        raise
    except Exception as error:
        temporary = isinstance(error, BackendNotReady) or (isinstance(error, BackendUnavailable) and error.temporary)
        if not temporary:
            logger.exception("%s failed its smoke test", loaded.name)
        return Fault(f"{question!r}: {type(error).__name__}: {error}", temporary, device)
    if answer is None:
        return Fault(f"{question!r}: no answer in {SMOKE_SECONDS:.0f} s", device=device)
    if expected is None:
        return None if answer.strip() else Fault(f"{question!r}: an empty answer", device=device)
    if answer.strip() != expected.strip():
        return Fault(f"{question!r}: answered {answer[:200]!r} instead of {expected[:200]!r}", device=device)
    return None


def _chat_answer(backend: Backend, question: str) -> str | None:
    """The answer; None when it takes too long."""
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    deadline = time.monotonic() + SMOKE_SECONDS
    request = GenerationRequest([{"role": "user", "content": question}])
    # First in the queue: a long queue is not the model's fault.
    task = backend.submit(request, events.put, first=True)
    while True:
        try:
            event = events.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            task.cancel()
            return None
        if isinstance(event, Failure):
            raise event.error
        if isinstance(event, Completion):
            return event.content
