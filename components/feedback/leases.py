"""Leases: what one host at a time does, where several share a PostgreSQL database.

A lock of the file system holds on one host and ends with its process. A lease is a row that its owner renews; when that
stops, the row expires, and the next owner gets a higher token, with which what the first one still writes is refused.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from sqlalchemy import select

from components.config.params import InputError
from components.feedback.database import Database, StoreUnavailable, insertion, through_restarts
from components.feedback.postgres import clock
from components.feedback.tables import LEASES

LEASE_SECONDS = 60.0
"""Time without a renewal after which a lease is free."""
RENEWALS = 6
"""Renewals within `LEASE_SECONDS`."""
FORGOTTEN_SECONDS = 7 * 86_400.0
"""Time since it expired after which a lease is removed."""

logger = logging.getLogger("loopwright.leases")


@dataclass(frozen=True)
class LeaseHolder:
    """The last owner of a lease."""

    name: str
    host: str
    pid: str
    is_held: bool
    """Whether it has not expired."""


class Leases(Database):
    """The part of the store that holds leases; times are those of the database's clock."""

    @through_restarts
    def take_lease(self, name: str, owner: str, seconds: float) -> int | None:
        """Take a lease that is free; returns its token, None where another owner holds it."""
        with self._write() as connection:
            now = clock(connection)
            # After the clock was set back a dead owner's would be held for as long; a living owner renews its own.
            latest = now + LEASE_SECONDS
            connection.execute(LEASES.update().where(LEASES.c.expires > latest).values(expires=latest))
            row = {"owner": owner, "expires": now + seconds}
            held = insertion(connection, LEASES).values(name=name, token=1, **row)
            # A repetition whose first commit was not acknowledged finds itself as the owner.
            is_free = (LEASES.c.expires < now) | (LEASES.c.owner == owner)
            upsert = held.on_conflict_do_update(
                index_elements=["name"], set_={**row, "token": LEASES.c.token + 1}, where=is_free
            )
            token: int | None = connection.scalar(upsert.returning(LEASES.c.token))
            connection.execute(LEASES.delete().where(LEASES.c.expires < now - FORGOTTEN_SECONDS))
            return token

    @through_restarts
    def renew_lease(self, name: str, token: int, seconds: float) -> bool:
        """Extend a lease from now; false where another owner has taken it. With 0 seconds, give it back."""
        with self._write() as connection:
            mine = LEASES.update().where(LEASES.c.name == name, LEASES.c.token == token)
            return bool(connection.execute(mine.values(expires=clock(connection) + seconds)).rowcount)

    @through_restarts
    def lease_holders(self, name: str) -> list[LeaseHolder]:
        """The last owners of the leases whose names begin so; given back or not, they are known for a week."""
        with self._read() as connection:
            is_held = LEASES.c.expires >= clock(connection)
            holders = select(LEASES.c.name, LEASES.c.owner, is_held).where(LEASES.c.name.startswith(name))
            rows = [(row[0], row[1].split(":"), row[2]) for row in connection.execute(holders)]
            return [LeaseHolder(name, owner[0], owner[1], held) for name, owner, held in rows]


@dataclass
class Lease:
    """A lease that this process holds, or, with no token, what needs none: the database of one host."""

    store: Leases
    name: str
    token: int | None = None

    def check(self) -> None:
        """Raises: InputError where another owner has taken it, as while this process was suspended."""
        if self.token is not None and not self.store.renew_lease(self.name, self.token, LEASE_SECONDS):
            raise InputError(f"{self.name}: another host has gone on with it meanwhile; run it again")


@contextmanager
def leased(
    store: Leases, name: str, patience: float = 0.0, ends_process: bool = True, host: str = ""
) -> Iterator[Lease]:
    """Hold a lease during the block, renewed by a thread; where another takes it, the process ends if `ends_process`.

    `host` is what the owner calls its host; by default, the machine's name.

    Raises: InputError naming the owner when it is still held after `patience` seconds.
    """
    if not store.is_shared:
        yield Lease(store, name)
        return
    owner = f"{host or socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
    deadline = time.monotonic() + patience
    while (token := store.take_lease(name, owner, LEASE_SECONDS)) is None:
        if time.monotonic() >= deadline:
            holder = next(iter(store.lease_holders(name)), LeaseHolder(name, "another host", "unknown", True))
            where = f"process {holder.pid} on {holder.host}"
            raise InputError(f"{name}: already running as {where}; wait for it, or stop it there")
        time.sleep(random.uniform(0.1, 0.5))
    stop = threading.Event()
    arguments = (store, name, token, stop, ends_process)
    thread = threading.Thread(target=_keep, args=arguments, name=f"lease-{name}", daemon=True)
    thread.start()
    try:
        yield Lease(store, name, token)
    finally:
        stop.set()
        thread.join()
        with suppress(StoreUnavailable):  # it expires
            store.renew_lease(name, token, 0.0)


def _keep(store: Leases, name: str, token: int, stop: threading.Event, ends_process: bool) -> None:
    while not stop.wait(LEASE_SECONDS / RENEWALS):
        try:
            is_held = store.renew_lease(name, token, LEASE_SECONDS)
        except StoreUnavailable:
            continue  # nobody else can take it meanwhile
        if not is_held:
            logger.error("%s: another host goes on with it; this process was suspended or cut off for too long", name)
            if ends_process:
                os.kill(os.getpid(), signal.SIGTERM)
            return
