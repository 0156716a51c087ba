"""`loopwright keys`: who may use the endpoint, for what and how often."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from components.config.paths import Paths, find_root
from loopwright.output import Json, print_json, print_table, say

if TYPE_CHECKING:
    from components.feedback.store import Store

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="API keys: create, list and revoke.", rich_markup_mode=None
)


@app.command()
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is; shown by `keys list`.")],
    scope: Annotated[
        list[str] | None,
        typer.Option(metavar="SCOPE", help="predict, feedback or admin (both, and all feedback); repeat."),
    ] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(min=1, help="Instead of the endpoint's serve.requests_per_minute.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Create a key and print it, once: only its digest is stored."""
    scopes = scope or ["predict", "feedback"]
    with _store() as store:
        key_id, key = store.create_key(name, scopes, requests_per_minute)
    if as_json:
        print_json({"id": key_id, "key": key, "name": name, "scopes": scopes})
        return
    say(f"{key_id} for {name}: {', '.join(scopes)}; store the key, it is shown only now")
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
        ("id", "name", "scopes", "per minute", "created", "revoked"),
        [
            (
                key["id"],
                key["name"],
                " ".join(key["scopes"]),
                key["requests_per_minute"],
                _when(key["created"]),
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


def _when(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds).isoformat(" ", "minutes")
