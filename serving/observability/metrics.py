"""Metrics of the endpoint for Prometheus, and of one request: its counts, its log line and its trace.

Every label has a bounded number of values.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from components.tracking.traces import Span, Traces
from serving.engine.backend import AgentStep, Completion, Event, Failure, Start, TextDelta, ToolCallDelta
from serving.observability.logs import FACTS

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
TOKEN_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
_Over = Literal["livesum", "livemostrecent"]

logger = logging.getLogger("loopwright.answers")


class Metrics:
    """The endpoint's counters; `route` is a route's template or "other", never a raw path."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        count, time, size, gauge = self._counter, self._seconds, self._sizes, self._gauge
        self.requests = count("requests", "HTTP requests.", "route", "status")
        self.seconds = time("request", "Wall time of a request, streams to their last byte.", SECONDS, "route")
        self.first_text_seconds = time(
            "first_text", "Wall time from a chat request to the first text of its answer.", SECONDS
        )
        self.inter_token_seconds = time(
            "inter_token",
            "Wall time between two pieces of text of an answer; a piece is nearly always a token.",
            TOKEN_SECONDS,
        )
        self.queue_seconds = time(
            "queue", "Wall time from a chat request to the slot in which it is answered.", SECONDS
        )
        self.tool_calls = count(
            "tool_calls",
            "Tools that models called: the agent's own by name, other for what is none, client for the client's.",
            "tool",
        )
        self.tokens = count("tokens", "Tokens read and written.", "kind")
        self.answers = count("answers", "Finished answers.", "finish_reason")
        self.feedback = count("feedback", "Votes taken in.", "rating")
        self.texts = count("texts", "Texts read.", "route")
        self.truncated = count(
            "truncated_texts",
            "Texts of which only the beginning was read: they are longer than the model reads.",
            "route",
        )
        self.chat_batch = size("chat", "Chat requests that wrote a token in one step of the model.")
        self.classify_batch = size("classify", "Texts that were classified in one go.")
        self.embed_batch = size("embed", "Texts that were embedded in one go.")
        self.role_answers = count("role_answers", "Finished answers, by what the model was.", "role")
        self._role_feedback = count(
            "role_feedback",
            "Votes taken in, by what the model they are about is: champion, challenger or former.",
            "role",
            "rating",
        )
        self._queue = gauge("queue", "Chat requests that wait for a slot or run in one.", "livesum", "state")
        self._model = gauge("model_version", "Version of the model that answers.", "livemostrecent", "name")
        self._challenger = gauge(
            "challenger_version",
            "Version of the model that has a share of the requests; 0: none has.",
            "livemostrecent",
            "name",
        )

    def _counter(self, name: str, says: str, *labels: str) -> Counter:
        return Counter(f"loopwright_{name}", says, labels, registry=self.registry)

    def _seconds(self, name: str, says: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"loopwright_{name}_seconds", says, labels, buckets=buckets, registry=self.registry)

    def _sizes(self, name: str, says: str) -> Histogram:
        return Histogram(f"loopwright_{name}_batch_size", says, buckets=BATCHES, registry=self.registry)

    def _gauge(self, name: str, says: str, over: _Over, label: str) -> Gauge:
        """`over`: what several worker processes' values come to."""
        return Gauge(f"loopwright_{name}", says, [label], multiprocess_mode=over, registry=self.registry)

    def vote(self, rating: str, role: str) -> None:
        self.feedback.labels(rating).inc()
        self._role_feedback.labels(role, rating).inc()

    def queue(self, waiting: int, running: int) -> None:
        self._queue.labels("waiting").set(waiting)
        self._queue.labels("running").set(running)

    def model(self, champion: str, challenger: str | None) -> None:
        """Say which `NAME/VERSION` answer."""
        name = champion.partition("/")[0]
        self._model.labels(name).set(_number(champion))
        self._challenger.labels(name).set(_number(challenger or ""))

    def text(self) -> bytes:
        """Prometheus' text format, over all worker processes where a server runs several."""
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return generate_latest(self.registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)


def _number(model: str) -> float:
    version = model.partition("/")[2]
    return float(version) if version.isdigit() else 0


class RequestMetrics:
    """One request from its arrival to its last event; `see` is called from one thread at a time."""

    def __init__(self, completion_id: str, model: str, tools: Collection[str], metrics: Metrics) -> None:
        self.completion_id, self.model = completion_id, model
        self._tools, self._metrics = tools, metrics
        self._began = self._mark = time.time()
        self._clock = time.perf_counter()
        self._texted: float | None = None
        self._first_text: float | None = None
        self._queued = 0.0
        self.spans: list[Span] = []

    @property
    def seconds(self) -> float:
        """Since the request came."""
        return time.perf_counter() - self._clock

    def see(self, event: Event) -> None:
        """Count an event, and remember what a trace tells of it."""
        if isinstance(event, TextDelta | ToolCallDelta):
            self._text()
        elif isinstance(event, Start):
            self._queued = self.seconds
            self._metrics.queue_seconds.observe(self._queued)
            self._span("queue", "QUEUE")
        elif isinstance(event, AgentStep):
            self._step(event.step)
        elif isinstance(event, Completion):
            self._finish(event)
        elif isinstance(event, Failure):
            facts = {"completion_id": self.completion_id, "model": self.model, "seconds": round(self.seconds, 4)}
            logger.warning("not answered: %s", event.error, extra={FACTS: facts})

    def trace(self, traces: Traces, asked: Any, answered: str) -> None:
        """Hand what was seen to whoever keeps traces."""
        facts = {"completion_id": self.completion_id, "model": self.model}
        traces.add(Span("answer", "AGENT", self._began, time.time(), asked, answered), self.spans, facts)

    def _text(self) -> None:
        now = self.seconds
        if self._texted is None:
            self._first_text = now
            self._metrics.first_text_seconds.observe(now)
        else:
            self._metrics.inter_token_seconds.observe(now - self._texted)
        self._texted = now

    def _step(self, step: dict[str, Any]) -> None:
        name = str(step["name"])
        if step["type"] == "call":
            self._metrics.tool_calls.labels(name if name in self._tools else "other").inc()
            self._span("turn", "LLM", outputs={name: step["arguments"]})
        else:
            self._span(name, "TOOL", outputs=step["content"])

    def _finish(self, finished: Completion) -> None:
        self._span("turn", "LLM", outputs=finished.content)
        if finished.tool_calls:
            self._metrics.tool_calls.labels("client").inc(len(finished.tool_calls))
        facts = {
            "completion_id": self.completion_id,
            "model": self.model,
            "finish_reason": finished.finish_reason,
            "prompt_tokens": finished.prompt_tokens,
            "completion_tokens": finished.completion_tokens,
            "tool_calls": sum(step["type"] == "call" for step in finished.steps) + len(finished.tool_calls),
            "seconds": round(self.seconds, 4),
            "queue_seconds": round(self._queued, 4),
            "first_text_seconds": None if self._first_text is None else round(self._first_text, 4),
        }
        logger.info("answered", extra={FACTS: facts})

    def _span(self, name: str, kind: str, outputs: Any = None) -> None:
        """What went on since the last mark."""
        now = time.time()
        self.spans.append(Span(name, kind, self._mark, now, None, outputs))
        self._mark = now
