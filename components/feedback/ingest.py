"""Votes taken in: what is new since the watermark becomes one immutable partition, each vote exactly once.

The file is written and synced first; the transaction that records it with the outcome of every vote is the moment
at which the ingestion has happened. A file without its record was left by a killed run: its votes are still new,
and the next run writes them again.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from components.config.loop_settings import FeedbackConfig
from components.config.params import InputError
from components.datasets.formats import Row
from components.feedback.items import SCHEMA
from components.feedback.ledger import DAY_SECONDS, Outcome, Status
from components.feedback.privacy import is_nothing_but_masks
from components.feedback.store import Store
from components.feedback.votes import content_digest, item_of, traits

Gate = Callable[[Sequence[Row]], Mapping[int, str]]
"""Holds flat rows against the suite `feedback`; returns what is wrong with the rows that fail, by their number."""

WITHDRAWN = "withdrawn.json"


@dataclass(frozen=True)
class IngestResult:
    """What one ingestion took in."""

    partition: str | None = None
    """Null when nothing was new."""
    accepted: int = 0
    quarantined: dict[str, int] = field(default_factory=dict)
    """By reason."""


def ingest(store: Store, folder: Path, config: FeedbackConfig, gate: Gate) -> IngestResult:
    """Take in the next votes behind the watermark, at most `max_items` of them.

    Raises: InputError when the folder belongs to another store; Refused by a suite that the whole table breaks.
    """
    votes = store.behind_watermark(config.max_items)
    if not votes:
        return IngestResult()
    if store.watermark() and not folder.is_dir():
        raise InputError(f'{folder}: not found, but partitions were written there; run "dvc checkout {folder.name}"')
    folder.mkdir(parents=True, exist_ok=True)
    first, last = votes[0]["sequence"], votes[-1]["sequence"]
    name = f"items-{first:09d}-{last:09d}"
    _clear(store, folder, first)
    items, reasons = judge(store, votes, config, gate)
    accepted = [item for item in items if item["feedback_id"] not in reasons]
    digest = write_partition(folder / f"{name}.parquet", accepted) if accepted else ""
    digests = {item["feedback_id"]: content_digest(item) for item in items}
    outcomes = [_outcome(vote, reasons.get(vote["id"]), digests.get(vote["id"], "")) for vote in votes]
    store.commit_partition(name, digest, outcomes)
    return IngestResult(name, len(accepted), dict(Counter(reasons.values()).most_common()))


def judge(
    store: Store, votes: Sequence[Mapping[str, Any]], config: FeedbackConfig, gate: Gate
) -> tuple[list[Row], dict[str, str]]:
    """The votes as rows, and why those that are not to be learned from are not, by id."""
    reasons = {vote["id"]: reason for vote in votes if (reason := _void(vote))}
    items = [item_of(vote) for vote in votes if vote["id"] not in reasons]
    for item in items:
        if item["correction"] is not None and is_nothing_but_masks(item["correction"]):
            reasons[item["feedback_id"]] = "The correction is nothing but a secret"
    failed = gate([traits(item) for item in items]) if items else {}
    for number, reason in failed.items():
        reasons.setdefault(items[number]["feedback_id"], f"Fails: {reason}")
    _judge_voices(store, [item for item in items if item["feedback_id"] not in reasons], config, reasons)
    return items, reasons


def _void(vote: Mapping[str, Any]) -> str | None:
    if vote["revoked"] is not None:
        return "Revoked before it was taken in"
    if vote["replaced_by"] is not None:
        return "Replaced by a later vote before it was taken in"
    return "The request was never answered" if vote["content"] is None else None


def _judge_voices(store: Store, items: Sequence[Row], config: FeedbackConfig, reasons: dict[str, str]) -> None:
    """What a voice has said already, and what is more than its share of a day."""
    known = set(store.said_before({content_digest(item) for item in items}))
    said: dict[str, list[float]] = {}
    for item in items:
        voice, created, digest = item["voice"], item["created"], content_digest(item)
        if voice not in said:
            said[voice] = store.accepted_of(voice, created - DAY_SECONDS, config.max_items_per_user)
        times = said[voice]
        today = len(times) - bisect_right(times, created - DAY_SECONDS)
        if digest in known:
            reasons[item["feedback_id"]] = "The same voice has said the same before"
        elif today >= config.max_items_per_user:
            reasons[item["feedback_id"]] = f"The voice has had its {config.max_items_per_user} votes of 24 hours"
        else:
            known.add(digest)
            times.insert(bisect_right(times, created), created)


def _outcome(vote: Mapping[str, Any], reason: str | None, digest: str) -> Outcome:
    status: Status = "accepted" if reason is None else "quarantined"
    return Outcome(vote["id"], vote["sequence"], status, reason, vote["voice"], vote["created"], digest)


def clear_orphans(store: Store, folder: Path) -> None:
    """Remove a partition that a killed run left without its record: before it has one, nothing may learn from it."""
    following = store.behind_watermark(1)
    if following:
        _clear(store, folder, following[0]["sequence"])


def _clear(store: Store, folder: Path, first: int) -> None:
    """Remove what a killed run left: half a file, or a whole one whose votes were never recorded as taken in."""
    for half in folder.glob(".*.tmp"):
        half.unlink()
    for orphan in folder.glob(f"items-{first:09d}-*.parquet"):
        ids = pq.read_table(orphan, columns=["feedback_id"])["feedback_id"].to_pylist()
        if ids and not store.knows(str(ids[0])):
            raise InputError(
                f"{orphan}: holds votes of another store than {store.address}; "
                "set LOOPWRIGHT_DATABASE_URL to theirs, or move the folder away"
            )
        orphan.unlink()


def write_partition(path: Path, items: Sequence[Row]) -> str:
    """Write a partition, all of it or nothing, and return its sha256; it is on disk when this returns."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(items), schema=SCHEMA), sink)
    content = sink.getvalue().to_pybytes()
    write_durably(path, content)
    return hashlib.sha256(content).hexdigest()


def write_durably(path: Path, content: bytes) -> None:
    """Put a file in its place, whole, and on disk when this returns."""
    half = path.with_name(f".{path.name}.tmp")
    with half.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(half, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def revocations_text(store: Store) -> bytes:
    """What `withdrawn.json` should say."""
    return (json.dumps(store.withdrawn(), indent=1, sort_keys=True) + "\n").encode()


def revocations_are_written(store: Store, folder: Path) -> bool:
    """Whether `withdrawn.json` says what the store says; where nothing was taken in, there is none to write."""
    path = folder / WITHDRAWN
    return path.read_bytes() == revocations_text(store) if path.is_file() else not store.watermark()


def write_revocations(store: Store, folder: Path) -> None:
    """Say in `withdrawn.json` which items of the partitions no longer count."""
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / WITHDRAWN, revocations_text(store))
