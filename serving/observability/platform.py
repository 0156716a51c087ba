"""Metrics of what the endpoint depends on, read at each scrape: disk, memory, feedback, schedules, served versions."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import torch
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from components.feedback.store import Store, StoreUnavailable
from components.models.devices import device_memory
from serving.models.replica import Replica

REFRESH_SECONDS = 10.0
"""Age up to which what the database said is reported again."""


class PlatformCollector(Collector):
    """Gauges that describe one state folder and one server."""

    def __init__(
        self,
        home: Path,
        store: Store,
        replica: Replica,
        max_waiting: int,
        is_ready: Callable[[], bool],
        rejected: Callable[[], Mapping[str, int]],
    ) -> None:
        """`rejected`: number of versions by task that failed to load or to answer."""
        self._home, self._store, self._replica, self._max_waiting = home, store, replica, max_waiting
        self._is_ready, self._rejected = is_ready, rejected
        self._process = psutil.Process()
        self._feedback, self._refreshed = (0, 0.0), float("-inf")
        self._successes: dict[str, float] = {}
        self._schedules: dict[str, float] = {}

    def collect(self) -> Iterator[GaugeMetricFamily]:
        gauge = GaugeMetricFamily
        disk = shutil.disk_usage(self._home)
        yield gauge("loopwright_disk_bytes", "Size of the state folder's disk.", disk.total)
        yield gauge("loopwright_disk_free_bytes", "Free bytes of the state folder's disk.", disk.free)
        memory, limit = self._process.memory_info().rss, device_memory(torch.device("cpu"))
        yield gauge("loopwright_memory_bytes", "Resident memory of the endpoint.", memory)
        yield gauge("loopwright_memory_limit_bytes", "Memory of the machine, or of the container.", limit)
        yield gauge("loopwright_ready", "1 while requests are answered.", float(self._is_ready()))
        yield gauge("loopwright_queue_limit", "serve.max_waiting.", self._max_waiting)
        refused = gauge("loopwright_refused_versions", "Versions that failed to load or to answer.", labels=["task"])
        for task, count in self._rejected().items():
            refused.add_metric([task], count)
        yield refused
        yield from self._of_the_store()

    def _of_the_store(self) -> Iterator[GaugeMetricFamily]:
        is_available = int(self._replica.can_record)
        # A database that hangs, and so is not written, would hold each scrape for longer than Prometheus waits.
        if is_available and time.monotonic() - self._refreshed > REFRESH_SECONDS:
            try:
                self._feedback = (self._store.fresh(), self._store.oldest_fresh() or 0.0)
                self._successes, self._schedules = self._store.successes(), self._store.schedules()
                self._refreshed = time.monotonic()
            except StoreUnavailable:
                is_available = 0
        fresh, oldest = self._feedback
        yield GaugeMetricFamily("loopwright_store_available", "1 while the database can be written.", is_available)
        yield GaugeMetricFamily("loopwright_feedback_waiting", "Votes that are not ingested.", fresh)
        lag = max(0.0, time.time() - oldest) if fresh and oldest else 0.0
        yield GaugeMetricFamily("loopwright_ingest_lag_seconds", "Age of the oldest vote that is not ingested.", lag)
        last = GaugeMetricFamily(
            "loopwright_last_success_timestamp_seconds", "End of the last success.", labels=["flow"]
        )
        since = GaugeMetricFamily(
            "loopwright_scheduled_timestamp_seconds", "First registration of the schedule.", labels=["flow"]
        )
        for metric, times in ((last, self._successes), (since, self._schedules)):
            for flow, seconds in times.items():
                metric.add_metric([flow], seconds)
            yield metric
