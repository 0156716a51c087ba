"""`loopwright feedback`: user feedback, its status, its ingestion and its revocation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from components.config.params import InputError
from components.config.paths import Paths, find_root
from loopwright.output import Json, print_json, print_table

if TYPE_CHECKING:
    from components.feedback.store import Store

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Feedback: stats, list, ingest and revoke.", rich_markup_mode=None
)
_SHOWN_CHARACTERS = 48
_COUNTED = ("up", "down", "corrections", "fresh", "quarantined", "waiting")


@app.command()
def stats(as_json: Json = False) -> None:
    """Votes on each model version, and how much feedback waits to be ingested and to be trained on."""
    counts: dict[str, Any] = {"models": [], "fresh": 0, "waiting": 0, "improvements": []}
    with _store() as store:
        if store is not None:
            counts = {
                "models": store.feedback_counts(),
                "fresh": store.fresh(),
                "waiting": store.waiting(),
                "improvements": store.improvements(),
            }
    if as_json:
        print_json(counts)
        return
    print_table(("model", *_COUNTED), [tuple(row[name] for name in ("model", *_COUNTED)) for row in counts["models"]])
    print(f"\n{counts['fresh']} votes to ingest, {counts['waiting']} accepted items to train on")
    if counts["improvements"]:
        last = counts["improvements"][-1]
        print(f"last improvement: {last['candidate']} {last['outcome']}: {last['reason']}")


@app.command("list")
def list_(
    quarantined: Annotated[bool, typer.Option("--quarantined", help="Only votes that are never trained on.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="How many, the newest first.")] = 20,
    as_json: Json = False,
) -> None:
    """The newest votes, with the status of each and its reason."""
    with _store() as store:
        votes = [] if store is None else store.votes(limit, quarantined)
    if as_json:
        print_json(votes)
        return
    print_table(
        ("id", "time", "model", "rating", "correction", "status", "reason"),
        [
            (
                vote["id"],
                datetime.fromtimestamp(vote["created"]).isoformat(" ", "minutes"),
                vote["model"],
                vote["rating"],
                _short(vote["correction"]),
                vote["status"],
                vote["reason"],
            )
            for vote in votes
        ],
    )


@app.command()
def ingest(as_json: Json = False) -> None:
    """Ingest the feedback since the last ingestion: check, mask, quarantine, write one partition and version it."""
    from flows.feedback import ingest as run
    from loopwright.run import Terminal, interruptible

    with interruptible('feedback ingest: stopped; "loopwright feedback ingest" goes on'):
        report = run(find_root(), Terminal(as_json))
    if as_json:
        print_json(asdict(report))
        return
    if report.partition is None:
        print(f"nothing new; {report.waiting} accepted items to train on")
        return
    print(f"{report.partition}: {report.accepted} accepted, {sum(report.quarantined.values())} quarantined")
    for reason, count in report.quarantined.items():
        print(f"  {count:>6}  {reason}")
    print(f"{report.waiting} accepted items to train on, {report.fresh} votes to ingest")


@app.command()
def revoke(
    feedback_id: Annotated[str, typer.Argument(help="An id from `loopwright feedback list`.")],
    reason: Annotated[str | None, typer.Option(help="Why, for the record.")] = None,
    as_json: Json = False,
) -> None:
    """Revoke a feedback item, and name every model version that was trained on it."""
    from components.feedback.lineage import trained_versions
    from components.tracking.registry import Registry, is_empty

    home = Paths(find_root()).home
    with _store() as store:
        if store is None:
            raise InputError(f'{feedback_id}: no such feedback; see "loopwright feedback list" for the ids')
        new = store.revoke(feedback_id, reason)
    trained = [] if is_empty(home) else trained_versions(Registry(home), feedback_id)
    if as_json:
        print_json({"id": feedback_id, "revoked": True, "new": new, "models": trained})
        return
    print(f"{feedback_id}: {'revoked' if new else 'was revoked before'}")
    print(f"trained on it: {', '.join(trained)}" if trained else "no model was trained on it")
    if trained:
        print('next: "loopwright feedback ingest" and "loopwright improve" train without it')


@contextmanager
def _store() -> Iterator[Store | None]:
    """The project's store, or None where no request was ever stored."""
    from components.feedback.store import Store, has_store

    home: Path = Paths(find_root()).home
    if not has_store(home):
        yield None
        return
    store = Store.of(home)
    try:
        yield store
    finally:
        store.close()


def _short(text: str | None) -> str | None:
    line = None if text is None else " ".join(text.split())
    return line if line is None or len(line) <= _SHOWN_CHARACTERS else f"{line[: _SHOWN_CHARACTERS - 1]}…"
