"""Error responses in OpenAI's format; bad input is a 400 that names the field and its value."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from components.config.params import InputError
from components.feedback.pictures import UnknownPicture
from components.feedback.store import StoreUnavailable, UnknownCompletion

SHOWN_CHARACTERS = 80
"""Length to which a wrong value is quoted."""

logger = logging.getLogger("loopwright.errors")

RETRY_SECONDS = "5"
"""Retry-After of a locked database."""
UNRECORDED = "requests and feedback cannot be put on record now: the database is locked or gone; try again soon"
BUG = "the server failed on this request; its log has the traceback"
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large", 500: "internal_error"}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """An error in OpenAI's format."""

    error: ErrorDetail


ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": Error}, "5XX": {"model": Error}}
"""The error responses of every route in `/openapi.json`."""


class ApiError(HTTPException):
    """An error response: message, and OpenAI's `code` and `param`."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers) if headers else None)
        self.message, self.code, self.param = message, code, param


def error_body(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error object; an empty message becomes the status phrase, such as `Bad Request`."""
    message = message.strip() or HTTPStatus(status).phrase
    kind = TYPES.get(status) or ("server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code or CODES.get(status)}}


def error_response(
    status: int,
    message: str,
    code: str | None = None,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    return JSONResponse(error_body(status, message, code, param), status, dict(headers) if headers else None)


def handle_errors(api: FastAPI) -> None:
    """Make the app respond to every exception in OpenAI's format."""
    api.add_exception_handler(HTTPException, _http_error)
    for kind in (RequestValidationError, UnknownCompletion, UnknownPicture, InputError, StoreUnavailable, Exception):
        api.add_exception_handler(kind, _error)


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error, ApiError):
        return error_response(error.status_code, error.message, error.code, error.param, error.headers)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return error_response(error.status_code, message, headers=error.headers)


def _error(_request: Request, error: Exception) -> Response:
    if isinstance(error, RequestValidationError):
        message, code, param = describe(error.errors())
        return error_response(400, message, code, param)
    if isinstance(error, UnknownCompletion):
        return error_response(404, str(error), "not_found", "completion_id")
    if isinstance(error, UnknownPicture):
        return error_response(404, str(error), "not_found", "digest")
    if isinstance(error, StoreUnavailable):
        return store_unavailable(error)
    if isinstance(error, InputError):
        return error_response(400, str(error))
    return error_response(500, BUG)  # Starlette raises it again behind this response, for the log


def store_unavailable(error: Exception) -> JSONResponse:
    """503: what cannot be recorded is not acknowledged."""
    logger.error("%s", error)
    return error_response(503, UNRECORDED, "store_unavailable", headers={"Retry-After": RETRY_SECONDS})


def failed_stream_body(error: BaseException | None) -> dict[str, Any]:
    """The last event of a stream that failed."""
    if isinstance(error, StoreUnavailable):
        return error_body(503, UNRECORDED, "store_unavailable")
    return error_body(500, BUG)


def describe(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str, str | None]:
    """`(message, code, param)` of the first of pydantic's errors: *field: value: what is allowed*."""
    first = errors[0]
    # The tags of a union's branches begin with "~"; they are not in the client's body.
    path = [part for part in first["loc"][1:] if not str(part).startswith("~")]
    where = _path(path) or str(first["loc"][0])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        if not path:
            return "body: missing; send a JSON object", "missing_required_parameter", None
        return f"{where}: missing; it is required", "missing_required_parameter", where
    code = first["type"] if first["type"] in ("unsupported_parameter", "extra_forbidden") else "invalid_value"
    if not path and isinstance(first["input"], bytes):
        return "body: not JSON; send it with Content-Type: application/json", "invalid_json", None
    value = json.dumps(first["input"], ensure_ascii=False, default=str)
    value = value if len(value) <= SHOWN_CHARACTERS else value[: SHOWN_CHARACTERS - 3] + "..."
    return f"{where}: {value}: {message}", code, where if path else None


def _path(parts: Sequence[str | int]) -> str:
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
