"""`loopwright keys`: who may use the endpoint, for what and how often."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from components.config.errors import InputError
from components.config.paths import Paths, find_root
from loopwright.output import Json, print_json, print_table, say

if TYPE_CHECKING:
    from components.feedback.store import Store

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="API keys: create, list, rotate and revoke.", rich_markup_mode=None
)


@app.command()
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is; shown by `keys list`.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(metavar="SCOPE", help="predict, feedback, tools or admin (all, and all records); repeat."),
    ] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Instead of the endpoint's serve.requests_per_minute.")
    ] = None,
    owner: Annotated[
        str | None, typer.Option(help="Whose records its requests are; keys of one owner share them. Default: NAME.")
    ] = None,
    expires: Annotated[str | None, typer.Option(metavar="90d", help="After this time; default: never.")] = None,
    tools: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="The only tools that are called for it; default: all.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Create a key and print it, once: only its digest is stored."""
    scopes = scope or ["predict", "feedback"]
    names = None if tools is None else [tool.strip() for tool in tools.split(",") if tool.strip()]
    with _store() as store:
        key_id, key = store.create_key(name, scopes, requests_per_minute, owner, _seconds("--expires", expires), names)
    if as_json:
        print_json({"id": key_id, "key": key, "name": name, "scopes": scopes})
        return
    say(f"{key_id} for {name}: {', '.join(scopes)}; store the key, it is shown only now")
    print(key)


@app.command()
def rotate(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name or id of a key.")],
    grace: Annotated[str, typer.Option(metavar="1d", help="How long the old key stays valid.")] = "1d",
    expires: Annotated[
        str | None, typer.Option(metavar="90d", help="Of the new key; default: as long as the old one had.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Create a new key with the rights of an old one, which expires after a grace period, and print it, once."""
    with _store() as store:
        key_id, key = store.rotate_key(name, _seconds("--grace", grace) or 0.0, _seconds("--expires", expires))
    if as_json:
        print_json({"id": key_id, "key": key, "name": name, "grace": grace})
        return
    say(f"{key_id} replaces the keys of {name}, which expire in {grace}; store the key, it is shown only now")
    print(key)


@app.command("list")
def list_(as_json: Json = False) -> None:
    """Every key that was created, without the keys themselves."""
    with _store() as store:
        keys = store.keys()
    if as_json:
        print_json(keys)
        return
    print_table(
        ("id", "name", "owner", "scopes", "tools", "per minute", "created", "expires", "revoked"),
        [
            (
                key["id"],
                key["name"],
                key["owner"],
                " ".join(key["scopes"]),
                key["tools"],
                key["requests_per_minute"],
                _when(key["created"]),
                _when(key["expires"]),
                _when(key["revoked"]),
            )
            for key in keys
        ],
    )


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `keys list` shows it.")], as_json: Json = False
) -> None:
    """Revoke a key; running endpoints refuse it within seconds."""
    with _store() as store:
        store.revoke_key(key_id)
    print_json({"revoked": key_id}) if as_json else print(f"{key_id} revoked")


@contextmanager
def _store() -> Iterator[Store]:
    from components.feedback.store import Store

    store = Store.of(Paths(find_root()).home)
    try:
        yield store
    finally:
        store.close()


def _seconds(option: str, text: str | None) -> float | None:
    """The seconds of a duration such as 90d, 12h, 30m or 45s.

    Raises: InputError.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,6})([dhms])", text)
    if match is None:
        raise InputError(f"{option}: {text!r} is not a duration; write it as 90d, 12h, 30m or 45s")
    return int(match[1]) * {"d": 86_400.0, "h": 3600.0, "m": 60.0, "s": 1.0}[match[2]]


def _when(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds).isoformat(" ", "minutes")
