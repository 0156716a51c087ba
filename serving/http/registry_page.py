"""The page /registry, and the JSON that it shows: read-only, and with API keys for the scope admin alone."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse

from components.config.params import InputError
from serving.http.errors import ERRORS, ApiError
from serving.http.page_files import page
from serving.http.routes import Running, StrictRoute
from serving.observability.overview import overview, version_card

router = APIRouter(route_class=StrictRoute, responses=ERRORS)


@router.get("/registry", response_class=HTMLResponse)
def registry(request: Request) -> Response:
    """The registry's page: champions, runs, schedules, feedback and drift."""
    return page("registry.html", request)


@router.get("/v1/registry")
async def registry_overview(serving: Running) -> dict[str, Any]:
    """What the page shows; with API keys, requires the scope `admin`."""
    return await run_in_threadpool(overview, serving.home, serving.store, serving.challenger_share, serving.served)


@router.get("/v1/registry/{model}/{version}")
async def registered_version(model: str, version: str, serving: Running) -> dict[str, Any]:
    """A version with its model card; with API keys, requires the scope `admin`."""
    try:
        return await run_in_threadpool(version_card, serving.home, f"{model}/{version}")
    except InputError as error:
        raise ApiError(404, f"model: {error}", "model_not_found", "model") from None
