"""ASGI middleware in front of the gateway: a request id, a line in the log for every request, and error metrics.

`X-Request-ID` of the request, or a new id, goes into the response's header, the body of an error, and every log line
that is written for the request.
"""

from __future__ import annotations

import json
import logging
import re
import time
import uuid

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.observability.logs import FIELDS, REQUEST_ID

HEADER = b"x-request-id"
_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_SHOWN_CHARACTERS = 200
"""Of a path, in the log."""

logger = logging.getLogger("loopwright.access")


class AccessLogMiddleware:
    """Wraps `app`; `api.state.serving` has the metrics."""

    def __init__(self, app: ASGIApp, api: FastAPI) -> None:
        self._app, self._api = app, api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        named = next((value for key, value in scope["headers"] if key == HEADER), b"").decode("latin-1")
        request_id = named if _ID.fullmatch(named) else uuid.uuid4().hex
        token, started = REQUEST_ID.set(request_id), time.perf_counter()
        response = _Response(send, request_id)
        try:
            await self._app(scope, receive, response)
        finally:
            REQUEST_ID.reset(token)
            if response.code:
                self._api.state.serving.metrics.errors.labels(response.code).inc()
            fields = {
                "request_id": request_id,
                "method": scope["method"],
                "path": scope["path"][:_SHOWN_CHARACTERS],
                "status": response.status,
                "bytes": response.size,
                "seconds": round(time.perf_counter() - started, 4),
                "client": (scope.get("client") or ("",))[0],
                "user": scope.get("api_key_user"),
            }
            logger.info("%s %s", scope["method"], response.status, extra={FIELDS: fields})


class _Response:
    """Sends a response on with the request's id in its header, and in the body of an error."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self._request_id = send, request_id
        self._start: Message | None = None
        self._body = b""
        self.status, self.size, self.code = 500, 0, ""
        """`code` is OpenAI's code of an error; only codes of this server get here, which bounds their number."""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [(name, value) for name, value in message["headers"] if name.lower() != HEADER]
            message = {**message, "headers": [*headers, (HEADER, self._request_id.encode())]}
            if self.status >= 400 and (b"content-type", b"application/json") in message["headers"]:
                self._start = message  # its length is known with its body
                return
        elif message["type"] == "http.response.body":
            if self._start is not None:
                self._body += message.get("body", b"")
                if message.get("more_body"):
                    return
                message = {**message, "body": self._with_id(self._body)}
                length = (b"content-length", str(len(message["body"])).encode())
                headers = [(name, value) for name, value in self._start["headers"] if name != b"content-length"]
                await self._send({**self._start, "headers": [*headers, length]})
                self._start = None
            self.size += len(message.get("body", b""))
        await self._send(message)

    def _with_id(self, body: bytes) -> bytes:
        try:
            document = json.loads(body)
            self.code = str(document["error"]["code"])
            document["error"]["request_id"] = self._request_id
        except (ValueError, KeyError, TypeError):
            return body
        return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
