"""Each request has an id and a line in the log; what the endpoint depends on is measured at each scrape."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from components.feedback.store import Store
from serving.http.app import new_api
from serving.http.gateway import GatewayMiddleware
from serving.observability.access_log import AccessLogMiddleware
from serving.observability.logs import FIELDS, REQUEST_ID, JsonLines
from tests.serving.conftest import Local, open_local


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("access")


@pytest.fixture(scope="module")
def app(agent_folder: Path, home: Path) -> Iterator[Local]:
    """The app behind the access log, as `serve` runs it."""
    with open_local(agent_folder, home) as inner:
        api = new_api()
        api.state.serving = inner.serving
        served = AccessLogMiddleware(GatewayMiddleware(api, api), api)
        yield Local(TestClient(served, raise_server_exceptions=False), inner.serving)


def lines(caplog: pytest.LogCaptureFixture, logger: str) -> list[dict[str, object]]:
    return [getattr(record, FIELDS) for record in caplog.records if record.name == logger]


def test_an_id_goes_through_response_error_and_log(app: Local, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        answered = app.client.post(
            "/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "hi"}]},
            headers={"X-Request-ID": "trace-me.1"},
        )
        wrong = app.client.post("/v1/chat/completions", json={"messages": 1}, headers={"X-Request-ID": "no good id\t"})
        missing = app.client.get("/nope?token=abc")
    assert answered.headers["x-request-id"] == "trace-me.1"
    for response in (wrong, missing):
        assert re.fullmatch(r"[0-9a-f]{32}", response.headers["x-request-id"])
        assert response.json()["error"]["request_id"] == response.headers["x-request-id"]
        assert int(response.headers["content-length"]) == len(response.content)
    assert "request_id" not in answered.json()
    first, second, third = lines(caplog, "loopwright.access")
    assert (first["request_id"], first["method"], first["status"]) == ("trace-me.1", "POST", 200)
    assert first["bytes"] == len(answered.content)
    assert second["request_id"] == wrong.headers["x-request-id"]
    assert (third["path"], third["status"]) == ("/nope", 404)
    assert [line["request_id"] for line in lines(caplog, "loopwright.answers")] == ["trace-me.1"]


def test_a_stream_is_one_line_with_all_its_bytes(app: Local, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        body = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
        response = app.client.post("/v1/chat/completions", json=body)
    (line,) = lines(caplog, "loopwright.access")
    assert line["bytes"] == len(response.content) > 0
    assert response.headers["x-request-id"] == line["request_id"]


def test_log_lines_of_a_request_carry_its_id() -> None:
    record = logging.LogRecord("x", logging.INFO, "f", 1, "said", (), None)
    token = REQUEST_ID.set("r-1")
    try:
        assert json.loads(JsonLines().format(record))["request_id"] == "r-1"
    finally:
        REQUEST_ID.reset(token)
    assert "request_id" not in json.loads(JsonLines().format(record))


def value(app: Local, sample: str) -> float:
    (line,) = (line for line in app.client.get("/metrics").text.splitlines() if line.startswith(f"{sample} "))
    return float(line.rpartition(" ")[2])


def test_the_state_of_the_platform_is_measured(app: Local, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.observability.platform.REFRESH_SECONDS", -1.0)
    assert 0 < value(app, "loopwright_disk_free_bytes") < value(app, "loopwright_disk_bytes")
    assert 0 < value(app, "loopwright_memory_bytes") < value(app, "loopwright_memory_limit_bytes")
    assert value(app, "loopwright_ready") == value(app, "loopwright_store_available") == 1
    assert value(app, 'loopwright_refused_versions{task="chat"}') == 0
    assert value(app, "loopwright_ingest_lag_seconds") == 0
    completion_id = app.ask("hi").json()["id"]
    app.client.post("/v1/feedback", json={"completion_id": completion_id, "rating": "up"})
    assert value(app, "loopwright_feedback_waiting") == 1
    assert 0 < value(app, "loopwright_ingest_lag_seconds") < 60
    with closing(Store.of(home)) as of_another_host:
        of_another_host.record_success("ingest")
        of_another_host.record_schedules(["monitor"])
    assert time.time() - value(app, 'loopwright_last_success_timestamp_seconds{flow="ingest"}') < 60
    assert time.time() - value(app, 'loopwright_scheduled_timestamp_seconds{flow="monitor"}') < 60
    app.client.get("/nope")
    assert value(app, 'loopwright_errors_total{code="not_found"}') >= 1
    (home / "feedback.db").rename(home / "away.db")
    try:
        assert value(app, "loopwright_store_available") == 0
        assert app.client.get("/v1/feedback").status_code == 503
        assert value(app, 'loopwright_errors_total{code="store_unavailable"}') == 1
    finally:
        (home / "away.db").rename(home / "feedback.db")
    deadline = time.monotonic() + 20
    while value(app, "loopwright_store_available") != 1:  # until the next sign of life has been written
        assert time.monotonic() < deadline
        time.sleep(0.02)
