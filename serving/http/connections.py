"""Limits of connections, below every route: how long a client may take, and how many connections there are.

uvicorn waits for ever for a TLS handshake, for the rest of a head of any size, and for a client to read its response.
Where the limit of connections is reached, one that waits for its client makes room, so that clients that neither send
nor read keep nobody out.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import ssl
import struct
from collections import Counter
from http import HTTPStatus
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from components.config.loop_settings import ServeConfig
from serving.http.errors import error_body
from serving.observability.logs import FIELDS
from serving.observability.metrics import Metrics

MAX_HEAD_BYTES = 65_536
"""Request line and headers."""
CHECK_SECONDS = 1.0
"""Time between two looks at what clients have not read, and between two lines of the log about refused connections."""
_NO_LINGER = struct.pack("ii", 1, 0)

logger = logging.getLogger("loopwright.access")


class Connections:
    """The open connections of a server, and their limits; with `tls`, of one that speaks HTTPS."""

    def __init__(self, config: ServeConfig, metrics: Metrics, tls: ssl.SSLContext | None = None) -> None:
        self.header_seconds, self.tls = config.header_seconds, tls
        self._metrics = metrics
        self._write_seconds, self._max_unread = config.write_seconds, config.max_held_bytes
        self._limit, self._limit_per_client = config.max_connections, config.max_connections_per_client
        self._open: dict[BoundedProtocol, None] = {}
        self._count: Counter[str] = Counter()
        """Open connections by client address."""
        self._incomplete: dict[BoundedProtocol, None] = {}
        """Those whose request has not arrived whole, oldest first."""
        self._unread: dict[BoundedProtocol, float] = {}
        """Those whose client has not read all that was written, oldest first, with the time at which that was seen."""
        self._check_timer: asyncio.TimerHandle | None = None
        self._refused: Counter[tuple[int, str]] = Counter()
        """Connections that were refused since the last line about them, by status and reason."""

    def protocol(self, **arguments: Any) -> BoundedProtocol:
        """The protocol of a new connection, for uvicorn."""
        return BoundedProtocol(self, **arguments)

    def add(self, connection: BoundedProtocol) -> bool:
        """Count a connection and make room for it; false where there is none."""
        client = connection.client_address
        self._open[connection] = None
        self._count[client] += 1
        if self._check_timer is None:
            self._check_timer = connection.loop.call_later(CHECK_SECONDS, self._check_reading, connection.loop)
        if self._count[client] > self._limit_per_client:
            return self._make_room(connection, client)
        return len(self._open) <= self._limit or self._make_room(connection)

    def remove(self, connection: BoundedProtocol) -> None:
        for connections in (self._open, self._incomplete, self._unread):
            connections.pop(connection, None)
        self._count[connection.client_address] -= 1
        if not self._count[connection.client_address]:
            del self._count[connection.client_address]

    def set_incomplete(self, connection: BoundedProtocol, incomplete: bool) -> None:
        if incomplete:
            self._incomplete.setdefault(connection)
        else:
            self._incomplete.pop(connection, None)

    def count_refused(self, connection: BoundedProtocol, status: int, reason: str) -> None:
        """Count a connection that is closed without the app; `status` 0: without a response.

        The app writes a line for every request. Of these there can be thousands a second, so a line counts them.
        """
        self._metrics.refused.labels(str(status), reason).inc()
        if not self._refused:
            connection.loop.call_later(CHECK_SECONDS, self._log_refused)
        self._refused[status, reason] += 1

    def _log_refused(self) -> None:
        for (status, reason), count in self._refused.items():
            fields = {"status": status, "reason": reason, "connections": count}
            logger.info("refused %s: %s", status, reason, extra={FIELDS: fields})
        self._refused.clear()

    def _make_room(self, new: BoundedProtocol, client: str | None = None) -> bool:
        """Close the one, of a client if there is one, that waits longest: for a request, for its reading, or idle."""

        def may_close(other: BoundedProtocol) -> bool:
            return other is not new and client in (None, other.client_address)

        if oldest := next(filter(may_close, self._incomplete), None):
            oldest.refuse(408, "room", "closed for another connection: its request was incomplete; send it again")
        elif oldest := next(filter(may_close, self._unread), None):
            self._abort(oldest)
        elif oldest := next((each for each in filter(may_close, self._open) if each.is_unused), None):
            oldest.transport.close()
        return oldest is not None

    def _check_reading(self, loop: asyncio.AbstractEventLoop) -> None:
        """Abort connections whose client has not read for too long, and the oldest of those with too many bytes."""
        self._check_timer = loop.call_later(CHECK_SECONDS, self._check_reading, loop) if self._open else None
        sizes = {each: size for each in self._open if (size := each.unread_bytes)}
        now, total = loop.time(), sum(sizes.values())
        self._unread = {each: since for each, since in self._unread.items() if each in sizes}
        for connection in sizes:
            self._unread.setdefault(connection, now)
        for connection, since in list(self._unread.items()):
            if now - since >= self._write_seconds or total > self._max_unread:
                total -= sizes[connection]
                self._abort(connection)

    def _abort(self, connection: BoundedProtocol) -> None:
        del self._unread[connection]
        self.count_refused(connection, 0, "unread")
        # By a reset: else the system keeps what was written until it gives the client up.
        connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        connection.transport.abort()


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol, counted from the first packet on, with a time and a size limit of heads."""

    def __init__(self, group: Connections, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._group = group
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._handshake: asyncio.Task[None] | None = None
        self._early = b""
        """What arrived with the end of the handshake, before its task goes on."""
        self._socket_transport: asyncio.Transport | None = None
        """That below TLS."""
        self._cycles: list[RequestResponseCycle] = []
        """Requests that are being answered, or wait for that: several where the client sends them at once."""
        self._is_lost = self._is_refused = False
        self.client_address = ""

    @property
    def is_idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def is_unused(self) -> bool:
        """Whether it is open, and idle."""
        return self.is_idle and not self.transport.is_closing()

    @property
    def unread_bytes(self) -> int:
        """Bytes that were written and that the client's system has not taken."""
        below = self._socket_transport.get_write_buffer_size() if self._socket_transport else 0
        return self.transport.get_write_buffer_size() + below

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        self.client_address = self.client[0] if self.client else ""
        if self._group.tls:
            self.transport.pause_reading()
            self._handshake = self.loop.create_task(self._shake_hands(self._group.tls))
        if self._group.add(self):
            self._await_head()
        else:
            self.refuse(503, "limit", "too many connections; try again in 1 s", "Retry-After: 1\r\n")

    async def _shake_hands(self, context: ssl.SSLContext) -> None:
        """Put TLS between the socket and this protocol, within the time of a head.

        Not by uvicorn, which shows its protocol a connection only after the handshake. Python's own event loop is
        needed: uvloop reads at once after `connection_made`, whatever was paused there.
        """
        error, secured, seconds = None, None, self._group.header_seconds
        try:
            secured = await self.loop.start_tls(
                self.transport, self, context, server_side=True, ssl_handshake_timeout=seconds
            )
        except OSError as failure:  # no TLS, or too late
            error = failure
        self._handshake = None
        if error is not None and not self._is_refused and not isinstance(error, ConnectionResetError):
            self._group.count_refused(self, 0, "handshake")
        if secured is None or self.transport.is_closing():
            self.transport.abort()
            self.connection_lost(error)
            return
        self._socket_transport = self.transport
        super().connection_made(secured)
        if self._early:
            self.data_received(self._early)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._is_lost:
            return
        self._is_lost = True
        self._cancel_timer()
        for cycle in self._cycles:  # uvicorn tells the newest alone
            cycle.disconnected = True
            cycle.message_event.set()
        self._group.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._handshake:
            self._early += data
            return
        super().data_received(data)
        if self.transport.is_closing() or not self.is_idle:
            return
        self._await_head()
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES:
            self.refuse(431, "headers", f"headers: larger than {MAX_HEAD_BYTES} bytes; send less")

    def on_headers_complete(self) -> None:
        self._cancel_timer()
        self._head_bytes = 0
        super().on_headers_complete()
        self._cycles = [cycle for cycle in (*self._cycles, self.cycle) if not cycle.response_complete]

    def on_message_complete(self) -> None:
        self._group.set_incomplete(self, False)
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._group.count_refused(self, 400, "invalid")
        super().send_400_response(msg)

    def refuse(self, status: int, reason: str, message: str, headers: str = "") -> None:
        """Close the connection, before an answer has begun with a response; `reason` is a label of the metrics."""
        self._is_refused = True
        self._group.count_refused(self, 0 if self._handshake else status, reason)
        self._group.set_incomplete(self, False)
        if self._handshake:
            self.transport.abort()
            return
        if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
            content = json.dumps(error_body(status, message)).encode()
            head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n{headers}Content-Type: application/json\r\n"
            head += f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
            self.transport.write(head.encode() + content)
        self.transport.close()

    def _await_head(self) -> None:
        self._group.set_incomplete(self, True)
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self._group.header_seconds, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.is_idle and not self.transport.is_closing():
            self.refuse(408, "headers", f"headers: not here within {self._group.header_seconds:g} s; send them at once")

    def _cancel_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
