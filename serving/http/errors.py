"""Every error leaves in OpenAI's shape, and bad input is a 400 that names the field and its value."""

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
from components.feedback.store import StoreUnavailable, UnknownCompletion

SHOWN_CHARACTERS = 80
"""Of a wrong value, this much is quoted back."""

logger = logging.getLogger("loopwright.errors")

RETRY_SECONDS = "5"
"""For whoever holds the database to let go of it."""
UNRECORDED = "requests and feedback cannot be put on record now: the database is locked or gone; try again soon"
BUG = "the server failed on this request; its log has the traceback"
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
CODES = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large", 500: "internal_error"}


class ErrorFacts(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """Every error, in OpenAI's shape."""

    error: ErrorFacts


ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": Error}, "5XX": {"model": Error}}
"""As `/openapi.json` shows them with each route."""


class ApiError(HTTPException):
    """An answer other than 2xx: what to say, and OpenAI's `param` and `code`."""

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
    """OpenAI's error object; what has nothing to say of itself is told by its status, as `Bad Request`."""
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


def shape_errors(api: FastAPI) -> None:
    """Make the app answer in OpenAI's shape whatever goes wrong inside it."""
    api.add_exception_handler(HTTPException, _http_error)
    api.add_exception_handler(RequestValidationError, _validation_error)
    api.add_exception_handler(UnknownCompletion, _unknown_completion)
    api.add_exception_handler(InputError, _input_error)
    api.add_exception_handler(StoreUnavailable, _store_unavailable)
    api.add_exception_handler(Exception, _bug)


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error, ApiError):
        return error_response(error.status_code, error.message, error.code, error.param, error.headers)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return error_response(error.status_code, message, headers=error.headers)


def _validation_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    message, code, param = describe(error.errors())
    return error_response(400, message, code, param)


def _unknown_completion(_request: Request, error: Exception) -> Response:
    return error_response(404, str(error), "not_found", "completion_id")


def _input_error(_request: Request, error: Exception) -> Response:
    return error_response(400, str(error))


def _store_unavailable(_request: Request, error: Exception) -> Response:
    return store_unavailable(error)


def store_unavailable(error: Exception) -> JSONResponse:
    """What cannot be recorded is not acknowledged."""
    logger.error("%s", error)
    return error_response(503, UNRECORDED, "store_unavailable", headers={"Retry-After": RETRY_SECONDS})


def _bug(_request: Request, _error: Exception) -> Response:
    """Starlette sends this and raises the error again, so that its traceback reaches the log."""
    return error_response(500, BUG)


def broken_body(error: BaseException | None) -> dict[str, Any]:
    """The last event of a stream that broke."""
    if isinstance(error, StoreUnavailable):
        return error_body(503, UNRECORDED, "store_unavailable")
    return error_body(500, BUG)


def describe(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str, str | None]:
    """`(message, code, param)` of the first of pydantic's errors: *where: value: what is allowed*."""
    first = errors[0]
    # Branches of a union carry names that begin with "~"; they are no part of what the client sent.
    place = [part for part in first["loc"][1:] if not str(part).startswith("~")]
    where = _path(place) or str(first["loc"][0])
    said = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        if not place:
            return "body: missing; send a JSON object", "missing_required_parameter", None
        return f"{where}: missing; it is required", "missing_required_parameter", where
    code = first["type"] if first["type"] in ("unsupported_parameter", "extra_forbidden") else "invalid_value"
    if not place and isinstance(first["input"], bytes):
        return "body: not JSON; send it with Content-Type: application/json", "invalid_json", None
    return f"{where}: {_shown(first['input'])}: {said}", code, where if place else None


def _path(parts: Sequence[str | int]) -> str:
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."
