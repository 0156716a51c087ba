"""Limits of connections, below every route: how long a request's head may take, and how many connections there are.

uvicorn waits for ever for the rest of a head, of any size. Where the limit of connections is reached, the one whose
request has been incomplete for longest makes room, so that clients that send nothing keep nobody out.
"""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from components.config.loop_settings import ServeConfig
from serving.http.errors import error_body

MAX_HEAD_BYTES = 65_536
"""Request line and headers."""


class Connections:
    """The open connections of a server, and their limits."""

    def __init__(self, config: ServeConfig) -> None:
        self.header_seconds = config.header_seconds
        self._limit, self._limit_per_client = config.max_connections, config.max_connections_per_client
        self._open: dict[str, int] = {}
        """By client address."""
        self._incomplete: dict[BoundedProtocol, None] = {}
        """Those whose request has not arrived whole, oldest first."""

    def protocol(self, **arguments: Any) -> BoundedProtocol:
        """The protocol of a new connection, for uvicorn."""
        return BoundedProtocol(self, **arguments)

    def add(self, connection: BoundedProtocol, client: str) -> bool:
        """Count a connection and make room for it; false where there is none."""
        count = self._open[client] = self._open.get(client, 0) + 1
        oldest = None
        if count > self._limit_per_client:
            oldest = next((each for each in self._incomplete if each.client_address == client), None)
        elif sum(self._open.values()) > self._limit:
            oldest = next(iter(self._incomplete), None)
        else:
            return True
        if oldest is not None:
            oldest.refuse(408, "closed for another connection: its request was incomplete; send it again")
        return oldest is not None

    def remove(self, connection: BoundedProtocol, client: str) -> None:
        self._incomplete.pop(connection, None)
        self._open[client] -= 1
        if not self._open[client]:
            del self._open[client]

    def set_incomplete(self, connection: BoundedProtocol, incomplete: bool) -> None:
        if incomplete:
            self._incomplete.setdefault(connection)
        else:
            self._incomplete.pop(connection, None)


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol with a time and a size limit of heads."""

    def __init__(self, group: Connections, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._group = group
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self.client_address = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        self.client_address = self.client[0] if self.client else ""
        if self._group.add(self, self.client_address):
            self._await_head()
        else:
            self.refuse(503, "too many connections; try again in 1 s", "Retry-After: 1\r\n")

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_timer()
        self._group.remove(self, self.client_address)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.transport.is_closing() or not self._is_idle:
            return
        self._await_head()
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES:
            self.refuse(431, f"headers: larger than {MAX_HEAD_BYTES} bytes; send less")

    def on_headers_complete(self) -> None:
        self._cancel_timer()
        self._head_bytes = 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._group.set_incomplete(self, False)
        super().on_message_complete()

    def refuse(self, status: int, message: str, headers: str = "") -> None:
        """Close the connection, before an answer has begun with a response."""
        if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
            content = json.dumps(error_body(status, message)).encode()
            head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n{headers}Content-Type: application/json\r\n"
            head += f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
            self.transport.write(head.encode() + content)
        self._group.set_incomplete(self, False)
        self.transport.close()

    @property
    def _is_idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _await_head(self) -> None:
        self._group.set_incomplete(self, True)
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self._group.header_seconds, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._is_idle and not self.transport.is_closing():
            self.refuse(408, f"headers: not here within {self._group.header_seconds:g} s; send them at once")

    def _cancel_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
