"""Slow, half-sent and too many requests: their connections end in time, and honest clients go on meanwhile."""

from __future__ import annotations

import select
import socket
import ssl
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from logging.handlers import QueueHandler
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import httpx
import pytest

from components.config.errors import InputError
from components.config.params import load_params
from serving import server
from serving.http import connections
from serving.observability.logs import FIELDS

ROOT = Path(__file__).parents[2]
HALF_HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Le"
HALF_BODY = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    b'Content-Length: 1000\r\n\r\n{"messages"'
)
LARGE_HEAD = b"GET /livez HTTP/1.1\r\n" + b"a: b\r\n" * 15_000
SECONDS = {"header_seconds": 0.5, "body_seconds": 0.5}
Endpoint = Callable[..., Any]


@pytest.fixture
def endpoint(local: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    """Serve on a real socket with settings of `serve`; returns `(host, port)`."""
    monkeypatch.delenv("LOOPWRIGHT_API_KEYS", raising=False)
    before = local.serving.config
    with ExitStack() as stack:

        def start(tls: server.Tls | None = None, **settings: Any) -> tuple[str, int]:
            config = load_params(ROOT / "params.yaml", {f"serve.{name}": value for name, value in settings.items()})
            local.serving.config = config.serve
            url = httpx.URL(stack.enter_context(server.serve_in_thread(local.serving, tls)))
            return url.host, url.port or 0

        yield start
    local.serving.config = before


@contextmanager
def connected(address: tuple[str, int], count: int, sent: bytes) -> Iterator[list[socket.socket]]:
    with ExitStack() as stack:
        connections = [stack.enter_context(socket.create_connection(address, timeout=20)) for _ in range(count)]
        for connection in connections:
            connection.sendall(sent)
        yield connections


def read_to_end(connection: socket.socket) -> bytes:
    """What a server sends until it closes; raises TimeoutError when it does not."""
    received = b""
    while piece := connection.recv(65536):
        received += piece
    return received


@pytest.mark.parametrize(
    "sent", [b"", b"\r\n", b"GET", HALF_HEAD, HALF_BODY], ids=["none", "line", "GET", "head", "body"]
)
def test_half_sent_requests_are_closed_in_time_and_others_answered(endpoint: Endpoint, sent: bytes) -> None:
    host, port = endpoint(**SECONDS)
    with connected((host, port), 60, sent) as slow:
        assert httpx.get(f"http://{host}:{port}/livez").status_code == 200
        assert {read_to_end(connection).split(b"\r\n")[0] for connection in slow} == {b"HTTP/1.1 408 Request Timeout"}


def test_refused_connections_are_counted_and_logged_together(
    endpoint: Endpoint, local: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = SimpleQueue[Any]()
    caplog.set_level("INFO", "loopwright.access")
    monkeypatch.setattr(connections.logger, "handlers", [QueueHandler(records)])
    monkeypatch.setattr(connections, "CHECK_SECONDS", 0.05)
    before = {key: refused(local, *key) for key in REFUSALS}
    address = endpoint(header_seconds=0.5, max_connections_per_client=40)
    lines, counts = 0, Counter[tuple[int, str]]()
    with ExitStack() as stack:
        for count, sent in ((1, b"no HTTP\r\n\r\n"), (1, LARGE_HEAD), (41, HALF_HEAD)):
            stack.enter_context(connected(address, count, sent))
        while counts.total() < 43:
            line = getattr(records.get(timeout=20), FIELDS)
            lines += 1
            counts[line["status"], line["reason"]] += line["connections"]
    assert {key: refused(local, *key) - before[key] for key in REFUSALS} == counts
    assert counts[431, "headers"] == counts[400, "invalid"] == 1
    assert counts[408, "room"] >= 1
    assert lines < 43


REFUSALS = [(408, "headers"), (431, "headers"), (400, "invalid"), (408, "room")]


def refused(local: Any, status: int, reason: str) -> float:
    labels = {"status": str(status), "reason": reason}
    return local.serving.metrics.registry.get_sample_value("loopwright_refused_connections_total", labels) or 0.0


def test_a_head_that_drips_is_closed_by_its_whole_time(endpoint: Endpoint) -> None:
    host, port = endpoint(**SECONDS)
    with connected((host, port), 1, b"GET /livez HTTP/1.1\r\n") as [slow]:
        slow.settimeout(0.05)
        received = b""
        for _ in range(200):
            try:
                received = slow.recv(65536)
                break
            except TimeoutError:
                slow.sendall(b"a: b\r\n")
        assert received.startswith(b"HTTP/1.1 408")


def test_a_head_without_end_is_refused(endpoint: Endpoint) -> None:
    with connected(endpoint(), 1, LARGE_HEAD) as [large]:
        assert read_to_end(large).startswith(b"HTTP/1.1 431")


@pytest.mark.parametrize("setting", ["max_connections", "max_connections_per_client"])
def test_beyond_the_limit_the_oldest_incomplete_one_makes_room(endpoint: Endpoint, setting: str) -> None:
    host, port = endpoint(**{setting: 4})
    with connected((host, port), 4, HALF_HEAD) as slow:
        assert httpx.get(f"http://{host}:{port}/livez").status_code == 200
        assert b"closed for another connection" in read_to_end(slow[0])
        slow[3].sendall(b"ngth: 0\r\n\r\n")
        assert slow[3].recv(65536).startswith(b"HTTP/1.1 400")


def test_idle_connections_make_room_when_no_other_waits(endpoint: Endpoint) -> None:
    host, port = endpoint(max_connections_per_client=4)
    with connected((host, port), 4, b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n") as idle:
        assert all(connection.recv(65536).startswith(b"HTTP/1.1 200") for connection in idle)
        assert httpx.get(f"http://{host}:{port}/livez").status_code == 200
        assert idle[0].recv(65536) == b""


MANY = b"GET /openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 300
"""Requests whose answers, more than ten megabytes, fill the buffers of both systems."""


def test_clients_that_read_nothing_are_closed_in_time(endpoint: Endpoint) -> None:
    host, port = endpoint(write_seconds=0.5)
    with connected((host, port), 3, MANY) as unread:
        assert httpx.get(f"http://{host}:{port}/livez").status_code == 200
        assert all(is_reset(connection) for connection in unread)


def test_unread_bytes_beyond_the_limit_close_the_oldest(endpoint: Endpoint) -> None:
    address = endpoint(max_held_bytes=200_000)
    with connected(address, 1, MANY) as [oldest], connected(address, 3, MANY):
        assert is_reset(oldest)


def is_reset(connection: socket.socket) -> bool:
    """Whether the server aborts the connection, without a byte being read, within ten seconds."""
    poll = select.poll()
    poll.register(connection, 0)  # POLLHUP and POLLERR alone
    return bool(poll.poll(10_000))


def test_bodies_that_are_too_large_together_are_503(endpoint: Endpoint) -> None:
    host, port = endpoint(max_held_bytes=200_000)
    large = HALF_BODY.replace(b"1000", b"1000000") + b"a" * 150_000
    with connected((host, port), 1, large):
        body = b"b" * 150_000
        for _ in range(50):  # until the server has read the first
            answer = httpx.post(f"http://{host}:{port}/v1/chat/completions", content=body)
            if answer.status_code == 503:
                break
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    for _ in range(50):  # until it has seen that the first is gone
        answer = httpx.post(f"http://{host}:{port}/v1/chat/completions", content=body)
        if answer.status_code == 400:
            break
    assert answer.status_code == 400


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    pair = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "1", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, "-out", pair[0], "-keyout", pair[1]], check=True, capture_output=True)
    return pair


def test_the_endpoint_speaks_https_with_a_certificate(local: Any, certificate: tuple[Path, Path]) -> None:
    context = ssl.create_default_context(cafile=str(certificate[0]))
    with server.serve_in_thread(local.serving, server.Tls.checked(*certificate)) as url:
        assert url.startswith("https://127.0.0.1:")
        assert httpx.get(f"{url}/livez", verify=context).status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(url.replace("https", "http") + "/livez")


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01\x02\x00\x01", b"GET /livez HTTP/1.1\r\n\r\n"])
def test_unfinished_handshakes_count_and_end(endpoint: Endpoint, certificate: tuple[Path, Path], sent: bytes) -> None:
    context = ssl.create_default_context(cafile=str(certificate[0]))
    host, port = endpoint(max_connections=4, header_seconds=2, tls=server.Tls.checked(*certificate))
    with connected((host, port), 4, sent) as slow, httpx.Client(verify=context) as client:
        for _ in range(5):
            assert client.get(f"https://{host}:{port}/livez").status_code == 200
        assert all(is_closed(connection) for connection in slow)


def is_closed(connection: socket.socket) -> bool:
    """Whether the server ends the connection, which may be after an alert of TLS."""
    try:
        read_to_end(connection)
    except TimeoutError:
        return False
    except ConnectionResetError:
        pass
    return True


def test_files_that_are_no_certificate_are_refused_in_one_line(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    cert, key = certificate
    with pytest.raises(InputError, match="--tls-cert, --tls-key: one without the other; give both files"):
        server.Tls.checked(cert, None)
    with pytest.raises(InputError, match=r"--tls-key: .*nothing: not found; give a file in PEM format"):
        server.Tls.checked(cert, tmp_path / "nothing")
    with pytest.raises(InputError, match="give a pair in PEM format"):
        server.Tls.checked(key, cert)
    assert server.Tls.checked(None, None) is None
