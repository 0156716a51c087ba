"""The pages: the static files of `page/`, with a content security policy that allows nothing else."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse

from serving.http.errors import ApiError

FOLDER = Path(__file__).parents[1] / "page"
INDEX = "index.html"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "media-src data:; base-uri 'none'; frame-ancestors 'none'; form-action 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Cached, and revalidated at each load: after an upgrade no old module is used with a new one.
    "Cache-Control": "no-cache",
}

router = APIRouter()


@dataclass(frozen=True)
class Asset:
    body: bytes
    media_type: str
    etag: str


@cache
def assets() -> dict[str, Asset]:
    """Every file of the page by its name; read once."""
    bodies = {path: path.read_bytes() for path in FOLDER.iterdir() if path.suffix in TYPES}
    return {
        path.name: Asset(body, TYPES[path.suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"')
        for path, body in bodies.items()
    }


@router.get("/", response_class=HTMLResponse)
def home(request: Request) -> Response:
    """The chat page."""
    return page(INDEX, request)


@router.get("/page/{name}", include_in_schema=False)
def asset(name: str, request: Request) -> Response:
    """A script, style sheet or image of the page."""
    found = assets().get(name)
    if found is None or name.endswith(".html"):
        raise ApiError(404, f"GET /page/{name}: no such file; the pages are at / and /registry")
    return _answer(request, found)


def page(name: str, request: Request) -> Response:
    """One of the pages, with its policy."""
    return _answer(request, assets()[name])


def _answer(request: Request, asset: Asset) -> Response:
    headers = {**HEADERS, "ETag": asset.etag}
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if asset.etag in known:
        return Response(status_code=304, headers=headers)
    return Response(asset.body, media_type=asset.media_type, headers=headers)
