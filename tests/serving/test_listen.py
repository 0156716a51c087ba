"""Where the endpoint listens, and what it says when it may or can not."""

from __future__ import annotations

import socket

import pytest

from components.config import InputError
from serving.server import check_host, listen


def test_taken_port_is_named() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--port: {port} is in use; stop what listens there or choose another"):
            listen("127.0.0.1", port)


def test_connections_do_not_wait_to_fill_packets() -> None:
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


@pytest.mark.parametrize("host", ["no.such.host.invalid", "300.1.1.1"])
def test_unknown_host_is_named(host: str) -> None:
    with pytest.raises(InputError, match=f"--host: '{host}'"):
        listen(host, 0)


def test_address_of_another_machine_is_refused() -> None:
    with pytest.raises(InputError, match=r"--host 192.0.2.1 --port 0: "):
        listen("192.0.2.1", 0)


@pytest.mark.parametrize("keys", ["", " , "])
def test_other_hosts_need_keys(keys: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOPWRIGHT_API_KEYS", keys)
    check_host("127.0.0.1")
    check_host("localhost")
    with pytest.raises(InputError, match=r"--host: 0.0.0.0 is open to others; set LOOPWRIGHT_API_KEYS"):
        check_host("0.0.0.0")
    monkeypatch.setenv("LOOPWRIGHT_API_KEYS", "key")
    check_host("0.0.0.0")
