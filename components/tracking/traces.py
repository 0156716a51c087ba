"""Traces of answers in MLflow, step by step; best effort: an answer never waits for its trace.

MLflow writes some twenty traces a second (measured), so a share of the answers is sampled and a full queue drops the
newest, counted. With OTEL_EXPORTER_OTLP_TRACES_ENDPOINT set and an OTLP exporter installed, MLflow sends the same
spans there instead.
"""

from __future__ import annotations

import logging
import os
import queue
import random
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.tracking.mlflow_client import EXPERIMENT, connect

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from components.tracking.registry import ModelVersion

QUEUE_SIZE = 256
"""Traces that may wait to be written."""
CLOSE_SECONDS = 5.0

logger = logging.getLogger("loopwright.traces")


@dataclass(frozen=True)
class Span:
    """A timed step."""

    name: str
    kind: str
    """MLflow's span type: AGENT, LLM, TOOL; or QUEUE."""
    start: float
    """Seconds since the epoch."""
    end: float
    inputs: Any = None
    outputs: Any = None


Trace = tuple[Span, Sequence[Span], Mapping[str, Any]]


class Traces:
    """Accepts traces from any thread and writes a sampled share of them from its own thread."""

    def __init__(self, home: Path, share: float) -> None:
        self._home, self._share = home, share
        self._queue: queue.Queue[Trace | None] = queue.Queue(QUEUE_SIZE)
        self.dropped = 0
        self._thread = threading.Thread(target=self._write, name="traces", daemon=True)
        self._thread.start()

    def add(self, whole: Span, parts: Sequence[Span], tags: Mapping[str, Any]) -> None:
        """Enqueue an answer's trace, if it is sampled and the queue has room."""
        if random.random() >= self._share:
            return
        try:
            self._queue.put_nowait((whole, parts, tags))
        except queue.Full:
            self.dropped += 1

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Write the queued traces, for no longer than `seconds`."""
        with suppress(queue.Full):
            self._queue.put(None, timeout=seconds)
        self._thread.join(seconds)

    def _write(self) -> None:
        client = None
        while (trace := self._queue.get()) is not None:
            try:
                client = client or connect(self._home)
                _write(client, trace)
            except Exception:
                logger.exception("a trace could not be written")
        if self.dropped:
            logger.warning("%d traces dropped: the queue was full", self.dropped)


def _write(client: MlflowClient, trace: Trace) -> None:
    """Write the trace of one answer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of types in MLflow's own code, while it is imported
        import mlflow.pyfunc  # which starting a trace imports

    whole, parts, fields = trace
    tags = {name: str(value) for name, value in fields.items()}
    # Traces go where the process's own address says, whatever the client's.
    if mlflow.get_tracking_uri() != client.tracking_uri:
        variable = os.environ.get("MLFLOW_TRACKING_URI")
        mlflow.set_tracking_uri(client.tracking_uri)
        if variable is None:  # MLflow sets it too, for every process we start and for other state folders
            os.environ.pop("MLFLOW_TRACKING_URI", None)
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    root = client.start_trace(
        whole.name, whole.kind, whole.inputs, tags=tags, experiment_id=experiment, start_time_ns=_ns(whole.start)
    )
    for part in parts:
        span = client.start_span(
            part.name, root.trace_id, root.span_id, part.kind, part.inputs, start_time_ns=_ns(part.start)
        )
        client.end_span(root.trace_id, span.span_id, part.outputs, end_time_ns=_ns(part.end))
    client.end_trace(root.trace_id, whole.outputs, end_time_ns=_ns(whole.end))


def store_held_out_traces(version: ModelVersion, outputs: Sequence[Mapping[str, Any]]) -> None:
    """Write a trace for each output of a version for a held-out row, unless it has such traces.

    An output has `suite`, `question`, `expected`, `answer` and `score`. MLflow's page finds its traces by the tags
    `model` and `held_out`; their times are those of writing.
    """
    client, model = version.registry.client, str(version)
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    written = f"tags.model = '{model}' AND tags.held_out = 'true'"
    if client.search_traces(locations=[experiment], filter_string=written, max_results=1):
        return
    for output in outputs:
        now = time.time()
        tags = {"model": model, "held_out": "true", "suite": output["suite"], "score": output["score"]}
        answer = {"answer": output["answer"], "expected": output["expected"]}
        _write(
            client, (Span("held-out question", "AGENT", now, now, {"question": output["question"]}, answer), (), tags)
        )


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
