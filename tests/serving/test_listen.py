"""Where the endpoint listens, and what it says when it may or can not."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from components.config.params import InputError
from components.feedback.store import Store
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
def test_other_hosts_need_keys(keys: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LOOPWRIGHT_API_KEYS", keys)
    check_host("127.0.0.1", tmp_path)
    check_host("localhost", tmp_path)
    with pytest.raises(InputError, match=r"--host: 0.0.0.0 is open to others; run \"loopwright keys create NAME\""):
        check_host("0.0.0.0", tmp_path)
    assert not list(tmp_path.iterdir())  # to ask made no database
    monkeypatch.setenv("LOOPWRIGHT_API_KEYS", "key")
    check_host("0.0.0.0", tmp_path)


def test_a_key_on_record_opens_other_hosts_until_it_is_revoked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LOOPWRIGHT_API_KEYS", raising=False)
    store = Store.of(tmp_path)
    key_id, _ = store.create_key("laptop", ["predict"])
    check_host("0.0.0.0", tmp_path)
    store.revoke_key(key_id)
    with pytest.raises(InputError, match="is open to others"):
        check_host("0.0.0.0", tmp_path)
    store.close()
