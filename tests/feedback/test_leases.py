"""Leases on a real PostgreSQL: one owner at a time, whatever happens to the previous owner."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from components.config.params import InputError
from components.feedback import leases
from components.feedback.leases import Lease, leased
from components.feedback.store import Store, shared_registry
from components.tracking.registry import ModelVersion
from tests.servers import new_database

HOLDER = """
import sys, time
from components.feedback.leases import leased
from components.feedback.store import Store

with leased(Store(sys.argv[1]), "improve"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def url(postgres: str) -> str:
    return new_database(postgres, f"leases_{uuid.uuid4().hex[:12]}")


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with closing(Store(url)) as store:
        yield store


def test_of_many_who_want_a_lease_one_has_it(store: Store) -> None:
    holding: list[int] = []
    most = 0

    def work(number: int) -> None:
        nonlocal most
        with leased(store, "release", patience=60):
            holding.append(number)
            most = max(most, len(holding))
            time.sleep(0.01)
            holding.remove(number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(24)))
    assert most == 1
    again = leased(store, "release")
    with leased(store, "release"), pytest.raises(InputError, match=r"release: already running as process \d+ on"):
        again.__enter__()


def test_the_lease_of_a_killed_process_is_taken_when_it_has_expired(store: Store, url: str) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, url], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.kill()
    with (
        pytest.raises(InputError, match=f"improve: already running as process {process.pid} on"),
        leased(store, "improve"),
    ):
        pass
    (holder,) = store.lease_holders("improve")
    assert (holder.pid, holder.is_held) == (str(process.pid), True)
    with store._write() as connection:
        connection.exec_driver_sql("UPDATE leases SET expires = expires - 60 WHERE name = 'improve'")
    with leased(store, "improve") as lease:
        assert lease.token == 2


def test_who_was_suspended_for_too_long_is_refused(store: Store) -> None:
    token = store.take_lease("ingest", "one:1:a", 0.0)
    suspended = Lease(store, "ingest", token)
    time.sleep(0.01)
    with leased(store, "ingest") as lease:
        with pytest.raises(InputError, match="ingest: another host has gone on with it meanwhile"):
            suspended.check()
        lease.check()
    assert store.take_lease("ingest", "three:3:c", 60.0) is not None, "given back, it is free at once"


def test_a_clock_that_was_set_back_holds_no_dead_owners_lease(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.take_lease("monitor", "dead:4:d", 60.0)
    with store._write() as connection:
        connection.exec_driver_sql("UPDATE leases SET expires = expires + 3600 WHERE name = 'monitor'")
    monkeypatch.setattr(leases, "LEASE_SECONDS", 0.2)
    with leased(store, "monitor", patience=10) as lease:
        assert lease.token == 2


def test_a_host_that_was_suspended_moves_no_alias(
    store: Store, url: str, home: Path, registered: Callable[..., ModelVersion], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has compared the champion and sets it when another host has the lease."""
    version = registered(0.5)
    monkeypatch.setenv("LOOPWRIGHT_DATABASE_URL", url)
    registry = shared_registry(home)
    set_tag = registry.client.set_model_version_tag

    def suspended(*values: str) -> None:
        set_tag(*values)
        with store._write() as connection:
            connection.exec_driver_sql("UPDATE leases SET owner = 'two:2:b', token = 9 WHERE name = 'aliases'")

    monkeypatch.setattr(registry.client, "set_model_version_tag", suspended)
    with pytest.raises(InputError, match="aliases: another host has gone on with it meanwhile"):
        registry.promote(version)
    assert registry.aliases("agent") == {}


def test_a_lease_is_renewed_while_it_is_held(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LEASE_SECONDS", 0.6)
    with leased(store, "run"):
        renewed = threading.Event()
        deadline = time.monotonic() + 3 * leases.LEASE_SECONDS
        while time.monotonic() < deadline:
            assert store.take_lease("run", "other:2:b", 60.0) is None
            renewed.wait(0.05)


def test_a_database_of_one_host_needs_no_lease(tmp_path: Path) -> None:
    with closing(Store.of(tmp_path)) as alone, leased(alone, "improve") as lease, leased(alone, "improve"):
        lease.check()
    assert lease.token is None
