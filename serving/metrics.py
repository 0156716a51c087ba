"""What Prometheus may scrape; every label has a bounded number of values."""

from __future__ import annotations

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
TOKEN_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The endpoint's counters; `route` is a route's template or "other", never a raw path."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("loopwright_requests", "HTTP requests.", ["route", "status"], registry=self.registry)
        self.seconds = Histogram(
            "loopwright_request_seconds",
            "Wall time of a request, streams to their last byte.",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.first_text_seconds = Histogram(
            "loopwright_first_text_seconds",
            "Wall time from a chat request to the first text of its answer.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.inter_token_seconds = Histogram(
            "loopwright_inter_token_seconds",
            "Wall time between two pieces of text of an answer; a piece is nearly always a token.",
            buckets=TOKEN_SECONDS,
            registry=self.registry,
        )
        self.queue_seconds = Histogram(
            "loopwright_queue_seconds",
            "Wall time from a chat request to the slot in which it is answered.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.tool_calls = Counter(
            "loopwright_tool_calls",
            "Tools that models called: the agent's own by name, other for what is none, client for the client's.",
            ["tool"],
            registry=self.registry,
        )
        self.tokens = Counter("loopwright_tokens", "Tokens read and written.", ["kind"], registry=self.registry)
        self.answers = Counter("loopwright_answers", "Finished answers.", ["finish_reason"], registry=self.registry)
        self.feedback = Counter("loopwright_feedback", "Votes taken in.", ["rating"], registry=self.registry)
        self.texts = Counter("loopwright_texts", "Texts read.", ["route"], registry=self.registry)
        self.truncated = Counter(
            "loopwright_truncated_texts",
            "Texts of which only the beginning was read: they are longer than the model reads.",
            ["route"],
            registry=self.registry,
        )
        self.chat_batch = Histogram(
            "loopwright_chat_batch_size",
            "Chat requests that wrote a token in one step of the model.",
            buckets=BATCHES,
            registry=self.registry,
        )
        self.classify_batch = Histogram(
            "loopwright_classify_batch_size",
            "Texts that were classified in one go.",
            buckets=BATCHES,
            registry=self.registry,
        )
        self.embed_batch = Histogram(
            "loopwright_embed_batch_size",
            "Texts that were embedded in one go.",
            buckets=BATCHES,
            registry=self.registry,
        )
        self.role_answers = Counter(
            "loopwright_role_answers", "Finished answers, by what the model was.", ["role"], registry=self.registry
        )
        self._role_feedback = Counter(
            "loopwright_role_feedback",
            "Votes taken in, by what the model they are about is: champion, challenger or former.",
            ["role", "rating"],
            registry=self.registry,
        )
        self._queue = Gauge(
            "loopwright_queue",
            "Chat requests that wait for a slot or run in one.",
            ["state"],
            multiprocess_mode="livesum",
            registry=self.registry,
        )
        self._model = Gauge(
            "loopwright_model_version",
            "Version of the model that answers.",
            ["name"],
            multiprocess_mode="livemostrecent",
            registry=self.registry,
        )

        self._challenger = Gauge(
            "loopwright_challenger_version",
            "Version of the model that has a share of the requests; 0: none has.",
            ["name"],
            multiprocess_mode="livemostrecent",
            registry=self.registry,
        )

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
