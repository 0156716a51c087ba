"""What one answer took, seen event by event: Prometheus' counts, one line in the log, and a trace of its steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from typing import Any

from components.tracking.traces import Span, Traces
from serving.engine.backend import AgentStep, Completion, Event, Failure, Start, TextDelta, ToolCallDelta
from serving.observability.logs import FACTS
from serving.observability.metrics import Metrics

logger = logging.getLogger("loopwright.answers")


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
