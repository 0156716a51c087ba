"""Route classes: strict JSON bodies, and the state of the server as an argument of the route's function."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Annotated, Any, get_type_hints

import pydantic_core
from fastapi import Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.types import Receive, Scope, Send

from components.agent.tool_policy import ToolPolicy
from components.agent.tools import Tool
from components.feedback.keys import ApiKey
from serving.http.errors import ApiError
from serving.models.state import Serving

UNKNOWN_SERVER = "?"
"""Stands for the origin of a result whose tool is none of ours."""


async def _serving(request: Request) -> Serving:
    serving: Serving = request.app.state.serving
    return serving


Running = Annotated[Serving, Depends(_serving)]


def record_owner(request: Request) -> str:
    """The owner of the records that a request makes; empty without an API key."""
    key: ApiKey | None = request.scope.get("api_key")
    return key.owner if key else ""


def record_viewer(request: Request) -> str | None:
    """The owner whose records a request may read and rate; None: all, without a key and with the scope admin."""
    key: ApiKey | None = request.scope.get("api_key")
    return None if key is None or key.opens("admin") else key.owner


def tool_policy(request: Request, allowed_writes: Sequence[str]) -> ToolPolicy:
    """Which tools are called for a request: all without a key, else those of the key's scopes and list."""
    key: ApiKey | None = request.scope.get("api_key")
    writes = frozenset(allowed_writes)
    if key is None:
        return ToolPolicy(allowed_writes=writes)
    return ToolPolicy(key.opens("tools"), key.tools, writes)


def servers_in(messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]) -> frozenset[str]:
    """Servers whose results a client sends within a conversation; of a tool that is none of ours, an unknown one."""
    calls = [each for message in messages for each in message.get("tool_calls") or ()]
    called = {each["id"]: each["function"]["name"] for each in calls}
    servers = {tool.name: tool.server for tool in tools}
    results = [message for message in messages if message["role"] == "tool"]
    names = [message.get("name") or called.get(message["tool_call_id"], "") for message in results]
    return frozenset(servers.get(name, UNKNOWN_SERVER) for name in names) - {""}


def requesting_user(request: Request, user: str | None) -> str:
    """Key of a request's user for challenger shares: its `user`, else its API key, else the client's address."""
    return user or str(request.scope.get("api_key_user") or (request.client.host if request.client else ""))


class StrictRequest(Request):
    """Parses bodies as strict JSON: UTF-8, bounded depth, no NaN, no lone surrogates."""

    async def json(self) -> Any:
        try:
            return pydantic_core.from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise ApiError(400, f"body: not valid JSON: {error}", "invalid_json") from None


class StrictRoute(APIRoute):
    """A route whose handler gets a `StrictRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            return await handle(StrictRequest(request.scope, request.receive))

        return strict


class DirectRoute(APIRoute):
    """A route of one JSON body that is passed to its function without FastAPI's dependency resolution.

    That takes longer than the rest of the request's overhead. The function takes `body`, `serving` and `request`;
    FastAPI still reads its signature for `/openapi.json`.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        self._model: type[BaseModel] = get_type_hints(endpoint)["body"]
        self.app = self._respond

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = StrictRequest(scope, receive, send)
        body = await self._parse(request)
        response: Response = await self.endpoint(body=body, serving=scope["app"].state.serving, request=request)
        await response(scope, receive, send)

    async def _parse(self, request: StrictRequest) -> BaseModel:
        """Raises: ApiError, RequestValidationError."""
        content: Any = await request.body()
        if not content:
            raise RequestValidationError([{"type": "missing", "loc": ("body",), "msg": "Field required"}])
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type.startswith("application/") and media_type.endswith(("/json", "+json")):
            content = await request.json()
        try:
            return self._model.model_validate(content, from_attributes=True)
        except ValidationError as error:
            errors = error.errors(include_url=False, include_context=False)
            raise RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in errors]) from None
