"""`loopwright backup`, `restore`, `verify`, `upgrade` and `prune`: the state folder and what belongs to it."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from components.config.paths import Paths, find_root
from loopwright.output import Json, print_json, print_table, say

if TYPE_CHECKING:
    from flows.backup import Backup

Address = Annotated[str, typer.Argument(help="A folder, or an address such as s3://BUCKET/NAME.")]


def backup(dest: Address, as_json: Json = False) -> None:
    """Write one consistent point of registry, feedback, data versions and Bentos to DEST, while everything runs."""
    from flows.backup import backup as write

    _print(write(Paths(find_root()), dest), "backed up to", as_json)


def restore(
    src: Address,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    as_json: Json = False,
) -> None:
    """Put the backup SRC into this project, checking every file first."""
    from flows.backup import restore as put

    _print(put(Paths(find_root()), src, force), "restored from", as_json)


def verify(src: Address, as_json: Json = False) -> None:
    """Compare every file of the backup SRC with its SHA-256."""
    from flows.backup import verify as check

    _print(check(src), "whole in", as_json)


def upgrade(as_json: Json = False) -> None:
    """Back up the databases and migrate them to this version; where that fails, return to the backup."""
    from flows.backup import upgrade as migrate

    folder = migrate(Paths(find_root()), say)
    if as_json:
        print_json({"backup": folder})
    else:
        print(f'the databases have this version\'s schemas; the way back is "loopwright restore {folder} --force"')


def prune(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be removed.")] = False,
    as_json: Json = False,
) -> None:
    """Remove what the section `keep` of params.yaml does not keep."""
    from flows.retention import prune as remove

    removals = remove(Paths(find_root()), dry_run)
    if as_json:
        print_json({"dry_run": dry_run, "removed": [asdict(removal) for removal in removals]})
    else:
        rows = [(each.kind, each.count, f"{each.size / 1e6:.1f}", ", ".join(each.names[:3])) for each in removals]
        print_table(("would remove" if dry_run else "removed", "count", "MB", "such as"), rows)


def _print(result: Backup, what: str, as_json: bool) -> None:
    if as_json:
        print_json(asdict(result))
        return
    created = datetime.fromtimestamp(result.created).astimezone().isoformat(" ", "seconds")
    print(f"{result.files} files, {result.size / 1e6:.1f} MB of {created}, {what} {result.address}")
    for name in result.left_out:
        say(f"{name}: its server is not in the backup; back it up where it runs")
