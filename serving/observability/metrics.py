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
from prometheus_client.registry import Collector

from components.tracking.otlp import OtlpTraces
from components.tracking.traces import Span, Traces
from serving.engine.backend import AgentStep, Completion, Event, Failure, Start, TextDelta, ToolCallDelta
from serving.observability.logs import FIELDS, REQUEST_ID

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
TOKEN_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
_MultiprocessMode = Literal["livesum", "livemostrecent"]

logger = logging.getLogger("loopwright.answers")


class Metrics:
    """The endpoint's metrics; `route` is a route's template or "other", never a raw path."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        count, time, size, gauge = self._counter, self._seconds, self._sizes, self._gauge
        self.requests = count("requests", "HTTP requests.", "route", "status")
        self.seconds = time("request", "Wall time of a request, streams to their last byte.", SECONDS, "route")
        self.first_text_seconds = time("first_text", "Wall time from a chat request to its first text.", SECONDS)
        self.inter_token_seconds = time(
            "inter_token", "Wall time between two text deltas of an answer, most of one token each.", TOKEN_SECONDS
        )
        self.queue_seconds = time("queue", "Wall time of a chat request in the queue.", SECONDS)
        self.tool_calls = count(
            "tool_calls", "Tool calls: own tools by name, other for unknown names, client for the client's.", "tool"
        )
        self.tokens = count("tokens", "Prompt and completion tokens.", "kind")
        self.answers = count("answers", "Completed answers.", "finish_reason")
        self.feedback = count("feedback", "Votes stored.", "rating")
        self.texts = count("texts", "Texts classified or embedded.", "route")
        self.truncated = count("truncated_texts", "Texts truncated to the model's context.", "route")
        self.chat_batch = size("chat", "Chat requests in one decode step.")
        self.classify_batch = size("classify", "Texts in one classification batch.")
        self.embed_batch = size("embed", "Texts in one embedding batch.")
        self.role_answers = count("role_answers", "Completed answers by the model's role.", "role")
        self._role_feedback = count(
            "role_feedback", "Votes by the answering model's role now: champion, challenger, former.", "role", "rating"
        )
        self.errors = count("errors", "Errors that the server answered, by their code.", "code")
        description = "Connections closed without the app, by status (0: no response) and reason."
        self.refused = count("refused_connections", description, "status", "reason")
        self._platform: Collector | None = None
        self._queue = gauge("queue", "Chat requests that wait for a slot or run in one.", "livesum", "state")
        self._model = gauge("model_version", "Version of the champion.", "livemostrecent", "name")
        self._challenger = gauge("challenger_version", "Version of the challenger; 0: none.", "livemostrecent", "name")

    def _counter(self, name: str, description: str, *labels: str) -> Counter:
        return Counter(f"loopwright_{name}", description, labels, registry=self.registry)

    def _seconds(self, name: str, description: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"loopwright_{name}_seconds", description, labels, buckets=buckets, registry=self.registry)

    def _sizes(self, name: str, description: str) -> Histogram:
        return Histogram(f"loopwright_{name}_batch_size", description, buckets=BATCHES, registry=self.registry)

    def _gauge(self, name: str, description: str, mode: _MultiprocessMode, label: str) -> Gauge:
        return Gauge(f"loopwright_{name}", description, [label], multiprocess_mode=mode, registry=self.registry)

    def observe_platform(self, collector: Collector) -> None:
        """Add what a collector reads at each scrape."""
        self._platform = collector
        self.registry.register(collector)

    def vote(self, rating: str, role: str) -> None:
        self.feedback.labels(rating).inc()
        self._role_feedback.labels(role, rating).inc()

    def queue(self, waiting: int, running: int) -> None:
        self._queue.labels("waiting").set(waiting)
        self._queue.labels("running").set(running)

    def model(self, champion: str, challenger: str | None) -> None:
        """Set the `NAME/VERSION` that answer."""
        name = champion.partition("/")[0]
        self._model.labels(name).set(_number(champion))
        self._challenger.labels(name).set(_number(challenger or ""))

    def text(self) -> bytes:
        """Prometheus' text format, aggregated over all worker processes where there are several."""
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            return generate_latest(self.registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        if self._platform is not None:
            registry.register(self._platform)
        return generate_latest(registry)


def _number(model: str) -> float:
    version = model.partition("/")[2]
    return float(version) if version.isdigit() else 0


class RequestMetrics:
    """Metrics, log line and trace of one request; `observe` is called from one thread at a time."""

    def __init__(self, completion_id: str, model: str, tools: Collection[str], metrics: Metrics) -> None:
        self._fields: dict[str, Any] = {"completion_id": completion_id, "model": model}
        if request_id := REQUEST_ID.get():  # events come on threads that do not know it
            self._fields["request_id"] = request_id
        self._tools, self._metrics = tools, metrics
        self._started = self._span_start = time.time()
        self._clock = time.perf_counter()
        self._first_text: float | None = None
        self._last_text = 0.0
        self._queue_seconds = 0.0
        self.spans: list[Span] = []

    @property
    def seconds(self) -> float:
        """Since the request arrived."""
        return time.perf_counter() - self._clock

    def observe(self, event: Event) -> None:
        """Count an event, and add its span to the trace."""
        if isinstance(event, TextDelta | ToolCallDelta):
            self._text()
        elif isinstance(event, Start):
            self._queue_seconds = self.seconds
            self._metrics.queue_seconds.observe(self._queue_seconds)
            self._span("queue", "QUEUE")
        elif isinstance(event, AgentStep):
            self._step(event.step)
        elif isinstance(event, Completion):
            self._finish(event)
        elif isinstance(event, Failure):
            fields = {**self._fields, "seconds": round(self.seconds, 4)}
            logger.warning("not answered: %s", event.error, extra={FIELDS: fields})

    def trace(self, traces: Traces | OtlpTraces, request: Any, answer: str) -> None:
        traces.add(Span("answer", "AGENT", self._started, time.time(), request, answer), self.spans, self._fields)

    def _text(self) -> None:
        now = self.seconds
        if self._first_text is None:
            self._first_text = now
            self._metrics.first_text_seconds.observe(now)
        else:
            self._metrics.inter_token_seconds.observe(now - self._last_text)
        self._last_text = now

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
        self._fields |= {
            "finish_reason": finished.finish_reason,
            "prompt_tokens": finished.prompt_tokens,
            "completion_tokens": finished.completion_tokens,
        }
        fields = {
            **self._fields,
            "tool_calls": sum(step["type"] == "call" for step in finished.steps) + len(finished.tool_calls),
            "seconds": round(self.seconds, 4),
            "queue_seconds": round(self._queue_seconds, 4),
            "first_text_seconds": None if self._first_text is None else round(self._first_text, 4),
        }
        logger.info("answered", extra={FIELDS: fields})

    def _span(self, name: str, kind: str, outputs: Any = None) -> None:
        """Add a span that began where the previous one ended."""
        now = time.time()
        self.spans.append(Span(name, kind, self._span_start, now, None, outputs))
        self._span_start = now
