"""Traces of answers by OTLP (OpenTelemetry), with the attributes of its conventions for generative AI, `gen_ai.*`.

https://opentelemetry.io/docs/specs/semconv/gen-ai: a span `invoke_agent` for the answer, in it `chat` for each turn of
the model and `execute_tool` for each call. Texts are not sent. The address is in OpenTelemetry's own variables,
`OTEL_EXPORTER_OTLP_ENDPOINT` and its like.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from components.config.params import InputError
from components.tracking.traces import CLOSE_SECONDS, Span


class OtlpTraces:
    """As `Traces`: accepts traces from any thread, and sends a sampled share of them from a thread of its own."""

    def __init__(self, share: float) -> None:
        """Raises: InputError where the extra is not installed."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        except ImportError:
            raise InputError(
                'params.yaml: serve.traces: otlp: the exporter is missing; run pip install "loopwright[otel]"'
            ) from None
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import TraceIdRatioBased

        # No provider of the whole process: MLflow has its own.
        resource = Resource.create({"service.name": "loopwright"})
        self._provider = TracerProvider(sampler=TraceIdRatioBased(share), resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("loopwright")

    def add(self, whole: Span, parts: Sequence[Span], tags: Mapping[str, Any]) -> None:
        """Send an answer's trace, if it is sampled and there is room among those that wait."""
        from opentelemetry.trace import set_span_in_context

        model = str(tags.get("model", ""))
        about = {"gen_ai.provider.name": "loopwright", "gen_ai.request.model": model}
        name = f"invoke_agent {model.partition('/')[0]}"
        root = self._tracer.start_span(name, attributes=about | _answer(tags), start_time=_ns(whole.start))
        context = set_span_in_context(root)
        for part in parts:
            title, attributes = _step(part, model)
            span = self._tracer.start_span(title, context, attributes=about | attributes, start_time=_ns(part.start))
            span.end(_ns(part.end))
        root.end(_ns(whole.end))

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Send what waits, for no longer than `seconds`."""
        self._provider.force_flush(int(seconds * 1000))
        self._provider.shutdown()


def _answer(tags: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of a whole answer, from the fields of its log line."""
    attributes = {
        "gen_ai.operation.name": "invoke_agent",
        "gen_ai.agent.name": str(tags.get("model", "")).partition("/")[0],
        "gen_ai.response.model": tags.get("model"),
        "gen_ai.response.id": tags.get("completion_id"),
        "gen_ai.response.finish_reasons": [tags["finish_reason"]] if "finish_reason" in tags else None,
        "gen_ai.usage.input_tokens": tags.get("prompt_tokens"),
        "gen_ai.usage.output_tokens": tags.get("completion_tokens"),
        "http.request.header.x-request-id": [tags["request_id"]] if "request_id" in tags else None,
    }
    return {key: value for key, value in attributes.items() if value is not None}


def _step(span: Span, model: str) -> tuple[str, dict[str, Any]]:
    if span.kind == "TOOL":
        attributes = {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": span.name}
        return f"execute_tool {span.name}", attributes
    if span.kind == "LLM":
        return f"chat {model}", {"gen_ai.operation.name": "chat"}
    return span.name, {}


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
