"""`loopwright audit`: who promoted, rolled back, revoked, made keys, exported and erased."""

from __future__ import annotations

import json
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from components.config.errors import InputError
from components.config.paths import Paths, find_root
from loopwright.output import Json, print_json, print_table, say

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="The audit log: list and export.", rich_markup_mode=None
)


@app.command("list")
def list_(as_json: Json = False) -> None:
    """Every recorded action, oldest first."""
    rows = _rows()
    if as_json:
        print_json(rows)
        return
    columns = ("time", "actor", "action", "object", "detail")
    print_table(columns, [[row[column] for column in columns] for row in rows])


@app.command()
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE.jsonl", help="Written anew; must not exist.")],
    as_json: Json = False,
) -> None:
    """Write the log as JSON lines, an action each."""
    rows = _rows()
    try:
        with file.open("x", encoding="utf-8") as out:
            out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except FileExistsError:
        raise InputError(f"{file}: exists; name another file") from None
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; name another file") from None
    print_json({"file": str(file), "rows": len(rows)}) if as_json else say(f"{file}: {len(rows)} rows")


def _rows() -> list[dict[str, Any]]:
    from components.feedback.store import Store, has_store, shared_registry
    from components.tracking.event_log import warn_on_failure
    from components.tracking.registry import is_empty

    home = Paths(find_root()).home
    if not has_store(home):
        return []
    if not is_empty(home):
        with warn_on_failure("champions that are not on record"):
            registry = shared_registry(home)
            for name in registry.names():
                registry.audit_last_move(name)
    with closing(Store.of(home)) as store:
        return [{**row, "time": datetime.fromtimestamp(row["created"], UTC).isoformat()} for row in store.audit_rows()]
