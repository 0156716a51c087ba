"""The page /registry, and the JSON that it shows: read-only, and with API keys for the scope admin alone."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse

from components.config.errors import InputError, Unavailable
from components.config.secrets import hidden
from components.tracking.mlflow_client import errors
from serving.http.errors import ERRORS, ApiError
from serving.http.page_files import page
from serving.http.routes import Running, StrictRoute
from serving.observability.overview import overview, version_card

_RETRY = {"Retry-After": "5"}

router = APIRouter(route_class=StrictRoute, responses=ERRORS)


@router.get("/registry", response_class=HTMLResponse)
def registry(request: Request) -> Response:
    """The registry's page: champions, runs, schedules, feedback and drift."""
    return page("registry.html", request)


@router.get("/v1/registry")
async def registry_overview(serving: Running) -> dict[str, Any]:
    """What the page shows; with API keys, requires the scope `admin`."""
    try:
        return await run_in_threadpool(overview, serving.home, serving.store, serving.challenger_share, serving.served)
    except Unavailable as error:
        raise _unavailable(error) from error
    except errors() as error:
        raise _unavailable(error) from error


@router.get("/v1/registry/{model}/{version}")
async def registered_version(model: str, version: str, serving: Running) -> dict[str, Any]:
    """A version with its model card; with API keys, requires the scope `admin`."""
    try:
        return await run_in_threadpool(version_card, serving.home, f"{model}/{version}")
    except Unavailable as error:
        raise _unavailable(error) from error
    except InputError as error:
        raise ApiError(404, f"model: {error}", "model_not_found", "model") from None
    except errors() as error:
        raise _unavailable(error) from error


def _unavailable(error: Exception) -> ApiError:
    reason = " ".join(hidden(str(error)).split())[:200]
    return ApiError(503, f"the registry does not answer: {reason}; try again in 5 s", "unavailable", headers=_RETRY)
