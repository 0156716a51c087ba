"""What is on this machine is reached directly, whatever proxies are named; what is elsewhere goes by them."""

from __future__ import annotations

import os
import socketserver
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import httpx
import pytest
import requests

from components.runtime.service_registry import answers, bypass_proxies_for_loopback

ELSEWHERE = "http://models.example/v1"
NAMES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


class Recorder(socketserver.ThreadingTCPServer):
    """An HTTP server that is asked for something here or, as a proxy, for something elsewhere."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Recorder

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", "8")
        self.end_headers()
        self.wfile.write(b"answered")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def servers() -> Iterator[tuple[Recorder, Recorder]]:
    """One here, and one to be a proxy."""
    with Recorder() as local, Recorder() as proxy:
        for server in (local, proxy):
            threading.Thread(target=server.serve_forever, daemon=True).start()
        yield local, proxy
        for server in (local, proxy):
            server.shutdown()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Without proxies, and put back afterwards."""
    for name in NAMES:
        for spelled in (name, name.upper()):
            monkeypatch.setenv(spelled, "")
            del os.environ[spelled]
    return monkeypatch


def reach(local: Recorder) -> None:
    """As every client that we and our tools use does, in this process."""
    bypass_proxies_for_loopback()
    assert answers(local.url)
    assert httpx.get(local.url).status_code == 200
    assert requests.get(local.url).status_code == 200
    with urllib.request.urlopen(local.url) as answer:
        assert answer.status == 200
    assert len(local.asked) == 4


@pytest.mark.parametrize("form", ["{0}", "{0}/", " {0}", "127.0.0.1:{1}", "http://user:pass@127.0.0.1:{1}"])
@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "ALL_PROXY"])
@pytest.mark.parametrize("exceptions", [None, "corp.example,[::1],fe80::/10,::1/128,ü.example,host:x"])
def test_loopback_goes_by_no_proxy_and_the_rest_does(
    environment: pytest.MonkeyPatch, servers: tuple[Recorder, Recorder], form: str, name: str, exceptions: str | None
) -> None:
    local, proxy = servers
    environment.setenv(name, form.format(proxy.url, proxy.server_address[1]))
    if exceptions:
        environment.setenv("NO_PROXY", exceptions)
    reach(local)
    assert httpx.get(ELSEWHERE).text == requests.get(ELSEWHERE).text == "answered"
    assert proxy.asked == [ELSEWHERE] * 2
    if exceptions:
        with pytest.raises(httpx.ConnectError):
            httpx.get("http://corp.example:1/")


@pytest.mark.parametrize("url", ["socks5://127.0.0.1:9", "socks5h://127.0.0.1:9", "socks://127.0.0.1:9"])
@pytest.mark.parametrize("name", ["ALL_PROXY", "http_proxy", "HTTPS_PROXY"])
def test_a_dead_socks_proxy_matters_elsewhere_alone(
    environment: pytest.MonkeyPatch, servers: tuple[Recorder, Recorder], name: str, url: str
) -> None:
    environment.setenv(name, url)
    reach(servers[0])
    with pytest.raises(httpx.ConnectError, match="refused"):
        httpx.get(ELSEWHERE if name != "HTTPS_PROXY" else ELSEWHERE.replace("http:", "https:"))


@pytest.mark.parametrize("url", ["socks4://127.0.0.1:9", "http://127.0.0.1:port", "ftp://127.0.0.1"])
def test_a_proxy_that_is_not_understood_is_named_and_left_out(
    environment: pytest.MonkeyPatch,
    servers: tuple[Recorder, Recorder],
    capsys: pytest.CaptureFixture[str],
    url: str,
) -> None:
    environment.setenv("ALL_PROXY", url)
    reach(servers[0])
    said = capsys.readouterr().err
    assert said.startswith(f"ALL_PROXY: {url}: ")
    assert said.endswith("ignored; http, https, socks5 and socks5h are supported\n")
    assert said.count("\n") == 1


def test_everything_excepted_stays_so(environment: pytest.MonkeyPatch, servers: tuple[Recorder, Recorder]) -> None:
    local, proxy = servers
    environment.setenv("HTTP_PROXY", proxy.url)
    environment.setenv("NO_PROXY", "*")
    reach(local)
    with pytest.raises(httpx.ConnectError):
        httpx.get("http://corp.example:1/")
    assert not proxy.asked
