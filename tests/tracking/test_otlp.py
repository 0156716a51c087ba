"""Traces as a collector gets them: OTLP over HTTP, with the attributes of the conventions for generative AI."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from typing import Any

import pytest

from components.config.params import InputError
from components.tracking.otlp import OtlpTraces
from components.tracking.traces import Span

needs_exporter = pytest.mark.skipif(
    find_spec("opentelemetry.exporter") is None, reason='run pip install "loopwright[otel]"'
)
FIELDS = {
    "completion_id": "chatcmpl-1",
    "model": "agent/7",
    "request_id": "r-1",
    "finish_reason": "stop",
    "prompt_tokens": 11,
    "completion_tokens": 7,
}


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """The bodies that a collector on this machine received."""
    bodies: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    yield bodies
    server.shutdown()
    thread.join()
    server.server_close()


def received(bodies: list[bytes]) -> list[dict[str, Any]]:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    spans = []
    for body in bodies:
        request = ExportTraceServiceRequest.FromString(body)
        for span in request.resource_spans[0].scope_spans[0].spans:
            values = {each.key: each.value for each in span.attributes}
            read = {key: value.int_value or value.string_value for key, value in values.items()}
            spans.append({"name": span.name, "id": span.span_id, "parent": span.parent_span_id, **read})
    return spans


@needs_exporter
def test_an_answer_is_a_trace_with_its_turns_and_tools(collector: list[bytes]) -> None:
    traces = OtlpTraces(share=1.0)
    parts = [Span("queue", "QUEUE", 1.0, 1.1), Span("turn", "LLM", 1.1, 2.0), Span("lookup", "TOOL", 2.0, 2.5)]
    traces.add(Span("answer", "AGENT", 1.0, 3.0, {"messages": "a secret"}, "a secret"), parts, FIELDS)
    traces.close()
    assert b"a secret" not in b"".join(collector)
    spans = {span["name"].split()[0]: span for span in received(collector)}
    root, queue, turn, tool = (spans[name] for name in ("invoke_agent", "queue", "chat", "execute_tool"))
    assert root["name"] == "invoke_agent agent"
    assert (root["gen_ai.usage.input_tokens"], root["gen_ai.usage.output_tokens"]) == (11, 7)
    assert (root["gen_ai.response.id"], root["gen_ai.request.model"]) == ("chatcmpl-1", "agent/7")
    assert {queue["parent"], turn["parent"], tool["parent"]} == {root["id"]}
    assert (turn["name"], turn["gen_ai.operation.name"]) == ("chat agent/7", "chat")
    assert (tool["gen_ai.operation.name"], tool["gen_ai.tool.name"]) == ("execute_tool", "lookup")


@needs_exporter
def test_what_is_not_sampled_is_not_sent(collector: list[bytes]) -> None:
    traces = OtlpTraces(share=0.0)
    traces.add(Span("answer", "AGENT", 1.0, 3.0), [], FIELDS)
    traces.close()
    assert collector == []


@pytest.mark.skipif(find_spec("opentelemetry.exporter") is not None, reason="the extra otel is installed")
def test_a_missing_exporter_is_named() -> None:
    with pytest.raises(InputError, match=r'serve\.traces: otlp: .*pip install "loopwright\[otel\]"'):
        OtlpTraces(share=1.0)
