"""How a request's body reaches a route's function: as strict JSON, and where it can without FastAPI's dependencies."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, get_type_hints

import pydantic_core
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.types import Receive, Scope, Send

from serving.http.errors import ApiError


class StrictRequest(Request):
    """Reads bodies as strict JSON: UTF-8, bounded depth, no NaN, no halves of surrogate pairs."""

    async def json(self) -> Any:
        try:
            return pydantic_core.from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(400, f"body: not valid JSON: {error}", "invalid_json") from None


class StrictRoute(APIRoute):
    """A route whose handler is given a `StrictRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return strict


class DirectRoute(APIRoute):
    """A route of one JSON body that is handed to its function without FastAPI's machinery for dependencies.

    That takes longer than all the rest of a request's way. The function takes `body`, `serving` and `request`; FastAPI
    goes on reading its signature for `/openapi.json`.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        self._model: type[BaseModel] = get_type_hints(endpoint)["body"]
        self.app = self._answer

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = StrictRequest(scope, receive, send)
        body = await self._read(request)
        response: Response = await self.endpoint(body=body, serving=scope["app"].state.serving, request=request)
        await response(scope, receive, send)

    async def _read(self, request: StrictRequest) -> BaseModel:
        """Raises: ApiError, RequestValidationError."""
        given: Any = await request.body()
        if not given:
            raise RequestValidationError([{"type": "missing", "loc": ("body",), "msg": "Field required"}])
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind.startswith("application/") and kind.endswith(("/json", "+json")):
            given = await request.json()
        try:
            return self._model.model_validate(given, from_attributes=True)
        except ValidationError as error:
            wrong = error.errors(include_url=False, include_context=False)
            raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in wrong]) from None
