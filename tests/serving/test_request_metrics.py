"""What is seen of an answer: metrics with bounded labels, one line in the log without secrets, and its trace."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from components.tracking.mlflow_client import connect
from components.tracking.mlflow_database import EXPERIMENT
from components.tracking.traces import Span, Traces
from serving.engine.backend import AgentStep, Completion, Start, TextDelta
from serving.observability.logs import FIELDS, JsonLines
from serving.observability.metrics import Metrics, RequestMetrics


def finished(**given: Any) -> Completion:
    facts = {"content": "It does.", "steps": [], "tool_calls": [], "finish_reason": "stop"}
    return Completion(**{**facts, "prompt_tokens": 5, "completion_tokens": 3, **given})


def test_an_answer_is_one_line_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()
    watch = RequestMetrics("chatcmpl-1", "agent/7", {"lookup"}, metrics)
    steps = [
        {"type": "call", "name": "lookup", "arguments": {"symbol": "json.dumps"}},
        {"type": "result", "name": "lookup", "content": "Serialize."},
        {"type": "call", "name": "made_up", "arguments": {}},
        {"type": "result", "name": "made_up", "content": "error"},
    ]
    with caplog.at_level(logging.INFO, "loopwright.answers"):
        for event in (Start(), *map(AgentStep, steps), TextDelta("It"), TextDelta(" does."), finished(steps=steps)):
            watch.observe(event)
    (line,) = [getattr(record, FIELDS) for record in caplog.records]
    assert (line["completion_id"], line["model"], line["tool_calls"]) == ("chatcmpl-1", "agent/7", 2)
    assert 0 <= line["queue_seconds"] <= line["first_text_seconds"] <= line["seconds"]
    text = metrics.text().decode()
    assert 'loopwright_tool_calls_total{tool="lookup"} 1.0' in text
    assert 'loopwright_tool_calls_total{tool="other"} 1.0' in text
    assert "made_up" not in text
    for name in ("queue", "first_text", "inter_token"):
        assert f"loopwright_{name}_seconds_count 1.0" in text
    kinds = [span.kind for span in watch.spans]
    assert kinds == ["QUEUE", "LLM", "TOOL", "LLM", "TOOL", "LLM"]
    assert all(before.end == after.start for before, after in zip(watch.spans, watch.spans[1:], strict=False))


def test_no_secret_reaches_the_log() -> None:
    lines = JsonLines("open-sesame, sk")
    said = "Bearer abc.def-123 with open-sesame and lw-Abcdefghijklmnopqrstuvwxyz0123456789"
    try:
        raise ValueError("open-sesame in a traceback")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "%s asked", (said,), sys.exc_info())
    record.__dict__[FIELDS] = {"completion_id": "chatcmpl-1"}
    line = json.loads(lines.format(record))
    assert line["message"] == "Bearer [hidden] with [hidden] and [hidden] asked"
    assert "open-sesame" not in json.dumps(line)
    assert (line["completion_id"], line["level"], line["logger"]) == ("chatcmpl-1", "ERROR", "x")


def test_steps_of_an_answer_are_found_in_mlflow(tmp_path: Path) -> None:
    before = os.environ.get("MLFLOW_TRACKING_URI")
    traces = Traces(tmp_path, share=1.0)
    parts = [Span("turn", "LLM", 100.0, 100.5, outputs="x"), Span("lookup", "TOOL", 100.5, 102.0, outputs="r")]
    traces.add(Span("answer", "AGENT", 100.0, 102.0, {"q": 1}, "hi"), parts, {"completion_id": "chatcmpl-9"})
    traces.close(seconds=120.0)
    client = connect(tmp_path)
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    (found,) = client.search_traces(locations=[experiment], filter_string="tags.completion_id = 'chatcmpl-9'")
    spans = [(span.name, span.span_type, (span.end_time_ns - span.start_time_ns) / 1e9) for span in found.data.spans]
    assert spans == [("answer", "AGENT", 2.0), ("turn", "LLM", 0.5), ("lookup", "TOOL", 1.5)]
    assert os.environ.get("MLFLOW_TRACKING_URI") == before, "nobody else is told where this state folder's traces go"


def test_none_of_the_answers_is_traced_at_share_zero(tmp_path: Path) -> None:
    traces = Traces(tmp_path, share=0.0)
    traces.add(Span("answer", "AGENT", 0.0, 1.0), [], {})
    traces.close()
    assert not list(tmp_path.iterdir())


def test_an_endpoint_counts_the_rows_of_each_step(local: Any) -> None:
    def steps() -> float:
        read = local.client.get("/metrics").text
        return float(read.partition("loopwright_chat_batch_size_count ")[2].partition("\n")[0])

    before = steps()
    answer = local.ask("Hello", max_tokens=3).json()
    assert steps() - before >= answer["usage"]["completion_tokens"] - 1
