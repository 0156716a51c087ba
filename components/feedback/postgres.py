"""What differs with PostgreSQL: connections that do not wait for ever for a server that hangs, and the clock."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from typing import Any

from sqlalchemy import ColumnElement, Connection, Double, Engine, cast, event, func, literal
from sqlalchemy.engine import URL

_DEAD_PEER = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 20_000}
"""libpq's options: a machine that is gone, or cut off, is noticed in some 20 s. In seconds, the last in ms."""
_CONNECT_SECONDS = 15.0
"""Longest time to connect; a server that hangs accepts connections and says nothing."""


def connection_options(address: URL, busy_seconds: float) -> dict[str, Any]:
    """libpq's options of each connection; limits of time that the address sets take precedence."""
    limits = {**_DEAD_PEER, "connect_timeout": max(2, round(min(busy_seconds, _CONNECT_SECONDS)))}
    waits = f"-c lock_timeout={max(1, round(busy_seconds * 1000))}"
    return {"options": waits, **{name: value for name, value in limits.items() if name not in address.query}}


def clock(connection: Connection) -> ColumnElement[float]:
    """The time of the database's clock, in Unix time; that of this host for SQLite, which has one host."""
    if connection.dialect.name == "postgresql":
        return cast(func.extract("epoch", func.clock_timestamp()), Double)
    return literal(time.time(), Double)


class OpenSockets:
    """The sockets of an engine's connections, through which another thread ends what waits for the server."""

    def __init__(self, engine: Engine) -> None:
        self._sockets: dict[Any, socket.socket] = {}
        event.listen(engine, "connect", self._add)
        event.listen(engine, "close", self._remove)

    def shut_down(self) -> None:
        """Let every operation that waits for an answer fail."""
        for each in list(self._sockets.values()):
            with suppress(OSError):  # closed meanwhile
                each.shutdown(socket.SHUT_RDWR)

    def _add(self, connection: Any, _record: Any) -> None:
        # A descriptor of our own: the connection's may be closed, and another file's, at any moment.
        self._sockets[connection] = socket.socket(fileno=os.dup(connection.fileno()))

    def _remove(self, connection: Any, _record: Any) -> None:
        if held := self._sockets.pop(connection, None):
            held.close()
