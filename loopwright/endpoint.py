"""The endpoint that commands ask: the one that runs, or one in this process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from components.config.params import InputError
from components.config.paths import Paths, find_root
from loopwright.output import say

ADDRESS = "http://127.0.0.1:3000"


class ContextTooLong(InputError):
    """The conversation outgrew the model."""


@contextmanager
def endpoint(url: str, model: str) -> Iterator[str]:
    """The running endpoint's address, or that of one started in this process, which serves `model`."""
    if _answers(url):
        yield url
        return
    if url != ADDRESS:
        raise InputError(f'--url: nothing answers on {url}; start it with "loopwright serve", or leave --url out')
    paths = Paths(find_root())
    say(f"no endpoint on {url}: loading {model} into this process")
    from serving.server import local_endpoint

    with local_endpoint(paths, model) as address:
        yield address


def _answers(url: str) -> bool:
    import httpx

    try:
        models = httpx.get(f"{url}/v1/models", headers=headers(), timeout=5)
        return models.status_code == 401 or models.json()["data"][0]["owned_by"] == "loopwright"
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError):
        return False


def headers() -> dict[str, str]:
    """Of every request: the key, where the environment has one."""
    key = os.environ.get("LOOPWRIGHT_API_KEYS", "").partition(",")[0].strip()
    return {"Authorization": f"Bearer {key}"} if key else {}


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The whole answer, as the endpoint gives it.

    Raises: InputError with the endpoint's own message.
    """
    import httpx

    response = httpx.post(url, json=body, headers=headers(), timeout=None)
    check(response)
    answer: dict[str, Any] = response.json()
    return answer


def check(response: Any) -> None:
    """Raises: InputError when the endpoint refused, ContextTooLong when it did for the length of what was asked."""
    if response.status_code == 200:
        return
    response.read()
    try:
        error = response.json()["error"]
    except (ValueError, LookupError, TypeError):
        raise InputError(f"{response.url}: answered {response.status_code}; is it a Loopwright endpoint?") from None
    raise (ContextTooLong if error.get("code") == "context_length_exceeded" else InputError)(error["message"])
