"""Ingestion: the votes since the watermark become one immutable partition, each vote exactly once.

The files are written and synced first; the transaction that records it with the outcome of every vote completes the
ingestion. Files without their record were left by a killed run: its votes are still new, and the next run writes them
again.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.config.loop_settings import FeedbackConfig
from components.config.params import InputError
from components.config.paths import REVOKED
from components.datasets.formats import Row, batched
from components.feedback.items import (
    PICTURES_GLOB,
    PICTURES_PER_GROUP,
    PICTURES_SCHEMA,
    SCHEMA,
    partitions,
    picture_digests,
    read_items,
)
from components.feedback.ledger import DAY_SECONDS, Outcome
from components.feedback.privacy import is_nothing_but_masks
from components.feedback.store import Store
from components.feedback.votes import content_digest, item_features, item_of
from components.runtime.files import replace_file
from components.runtime.model_tasks import is_chat
from components.runtime.stage import digest

Gate = Callable[[Sequence[Row]], Mapping[int, str]]
"""Validates flat rows by the suite `feedback`; returns the failure of each row that fails, by its number."""


@dataclass(frozen=True)
class IngestResult:
    partition: str | None = None
    """None when there were no new votes."""
    accepted: int = 0
    quarantined: dict[str, int] = field(default_factory=dict)
    """By reason."""


def ingest(store: Store, folder: Path, config: FeedbackConfig, gate: Gate) -> IngestResult:
    """Ingest the next votes after the watermark, at most `max_items`.

    Raises: InputError when the folder belongs to another store; Refused when the whole table fails the suite.
    """
    votes = store.behind_watermark(config.max_items)
    if not votes:
        return IngestResult()
    if not folder.is_dir() and any(row["digest"] for row in store.partitions()):
        raise InputError(f'{folder}: not found, but partitions were written there; run "dvc checkout {folder}"')
    folder.mkdir(parents=True, exist_ok=True)
    first, last = votes[0]["sequence"], votes[-1]["sequence"]
    name = f"items-{first:09d}-{last:09d}"
    remove_orphans(store, folder)
    items, reasons = check_votes(store, votes, config, gate)
    accepted = [item for item in items if item["feedback_id"] not in reasons]
    pictures = {image for item in accepted for image in item["images"]} - picture_digests(folder)
    if pictures:
        write_pictures(folder / f"pictures-{first:09d}-{last:09d}.parquet", store, sorted(pictures))
    digest = write_partition(folder / f"{name}.parquet", accepted) if accepted else ""
    digests = {item["feedback_id"]: content_digest(item) for item in items}
    outcomes = [
        Outcome(
            vote["id"],
            vote["sequence"],
            "quarantined" if vote["id"] in reasons else "accepted",
            reasons.get(vote["id"]),
            vote["voice"],
            vote["created"],
            digests.get(vote["id"], ""),
        )
        for vote in votes
    ]
    store.commit_partition(name, digest, outcomes)
    return IngestResult(name, len(accepted), dict(Counter(reasons.values()).most_common()))


def check_votes(
    store: Store, votes: Sequence[Mapping[str, Any]], config: FeedbackConfig, gate: Gate
) -> tuple[list[Row], dict[str, str]]:
    """The votes as rows, and the reason to quarantine each that is not accepted, by id."""
    reasons = {vote["id"]: reason for vote in votes if (reason := _invalid(vote))}
    items = [item_of(vote) for vote in votes if vote["id"] not in reasons]
    for item in items:
        if item["correction"] is not None and is_nothing_but_masks(item["correction"]):
            reasons[item["feedback_id"]] = "The correction is nothing but a secret"
    images = {image for item in items for image in item["images"]}
    for image in images - store.known_pictures(images):
        lacking = [item["feedback_id"] for item in items if image in item["images"]]
        reasons |= dict.fromkeys(lacking, "A picture of the request is not stored")
    failed = gate([item_features(item) for item in items]) if items else {}
    for number, reason in failed.items():
        reasons.setdefault(items[number]["feedback_id"], f"Fails: {reason}")
    _check_users(store, [item for item in items if item["feedback_id"] not in reasons], config, reasons)
    return items, reasons


def _invalid(vote: Mapping[str, Any]) -> str | None:
    if vote["revoked"] is not None:
        return "Revoked before ingestion"
    if vote["replaced_by"] is not None:
        return "Replaced by a later vote before ingestion"
    if not is_chat(vote["model"]):
        return f"An answer of {vote['model']}: the agent is not trained on it"
    return "The request was never answered" if vote["content"] is None else None


def _check_users(store: Store, items: Sequence[Row], config: FeedbackConfig, reasons: dict[str, str]) -> None:
    """Quarantine duplicate votes of a user, and those above the daily limit."""
    known = set(store.accepted_digests({content_digest(item) for item in items}))
    accepted: dict[str, list[float]] = {}
    for item in items:
        user, created, digest = item["voice"], item["created"], content_digest(item)
        if user not in accepted:
            accepted[user] = store.accepted_times(user, created - DAY_SECONDS, config.max_items_per_user)
        times = accepted[user]
        today = len(times) - bisect_right(times, created - DAY_SECONDS)
        if digest in known:
            reasons[item["feedback_id"]] = "Duplicate of an earlier vote of the same user"
        elif today >= config.max_items_per_user:
            reasons[item["feedback_id"]] = (
                f"The user has reached the limit of {config.max_items_per_user} votes in 24 hours"
            )
        else:
            known.add(digest)
            times.insert(bisect_right(times, created), created)


def remove_orphans(store: Store, folder: Path) -> None:
    """Remove what a killed run left: incomplete files, and complete ones that no record names, on which no model may
    be trained; another host may have ingested their votes since.

    Raises: InputError when the folder belongs to another store.
    """
    for temporary in folder.glob(".*.tmp"):
        temporary.unlink()
    recorded = {row["name"] for row in store.partitions() if row["digest"]}
    for orphan in [path for path in partitions(folder) if path.stem not in recorded]:
        ids = pq.read_table(orphan, columns=["feedback_id"])["feedback_id"].to_pylist()
        if ids and not store.has_feedback(str(ids[0])):
            raise InputError(
                f"{orphan}: holds votes of another store than {store.address}; "
                "set LOOPWRIGHT_DATABASE_URL to theirs, or move the folder away"
            )
        orphan.unlink()
    for pictures in folder.glob(PICTURES_GLOB):
        if pictures.stem.replace("pictures", "items") not in recorded:
            pictures.unlink()


def stale_partitions(store: Store, folder: Path) -> list[dict[str, Any]]:
    """The records of partitions whose file is missing or differs from the recorded SHA-256, oldest first."""
    return [
        row
        for row in store.partitions()
        if row["digest"] and digest(folder / f"{row['name']}.parquet") != row["digest"]
    ]


def rebuild_partition(store: Store, folder: Path, name: str) -> None:
    """Write a partition and its pictures anew from the database, without erased items; it has to be versioned then.

    The file has its former bytes, unless masking or a library has changed since.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, pictures = folder / f"{name}.parquet", folder / f"{name.replace('items', 'pictures')}.parquet"
    items = [item_of(vote) for vote in store.accepted_votes(name)]
    # The partition comes last: without it, what a killed run left is stale.
    path.unlink(missing_ok=True)
    pictures.unlink(missing_ok=True)
    used = {image for item in items for image in item["images"]} | _pictures_of_items(folder)
    if missing := store.known_pictures(used - picture_digests(folder)):
        write_pictures(pictures, store, sorted(missing))
    _erase_pictures(folder, used)
    store.replace_partition(name, write_partition(path, items), store.erased_items().get(name, set()))


def write_partition(path: Path, items: Sequence[Row]) -> str:
    """Write a partition atomically and durably; returns its SHA-256."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(items), schema=SCHEMA), sink)
    content = sink.getvalue().to_pybytes()
    replace_file(path, lambda file: file.write(content))
    return hashlib.sha256(content).hexdigest()


def write_pictures(path: Path, store: Store, digests: Sequence[str]) -> None:
    """Write the files of pictures atomically and durably, a few in memory at a time."""

    def write(file: IO[bytes]) -> None:
        with pq.ParquetWriter(file, PICTURES_SCHEMA, compression="none") as writer:
            for group in batched(digests, PICTURES_PER_GROUP):
                rows = [{"digest": digest, "content": store.picture(digest)} for digest in group]
                writer.write_table(pa.Table.from_pylist(rows, schema=PICTURES_SCHEMA))

    replace_file(path, write)


def erase_items(store: Store, folder: Path) -> None:
    """Write the partitions of erased items anew without them, and the files of pictures without theirs."""
    for name, erased in store.erased_items().items():
        path = folder / f"{name}.parquet"
        rows = [row for row in pq.read_table(path).to_pylist() if row["feedback_id"] not in erased]
        digest = write_partition(path, rows)
        _erase_pictures(folder, _pictures_of_items(folder))
        store.replace_partition(name, digest, erased)


def _pictures_of_items(folder: Path) -> set[str]:
    """The digests of the pictures that items refer to."""
    return {image for item in read_items(folder) for image in item.images}


def _erase_pictures(folder: Path, referred: Collection[str]) -> None:
    """Write each file of pictures anew where it has one that no item refers to."""
    used = pa.array(sorted(referred), pa.string())
    for path in folder.glob(PICTURES_GLOB):
        table = pq.read_table(path, columns=["digest"])
        if pc.all(pc.is_in(table["digest"], value_set=used)).as_py() is not False:
            continue

        def write(file: IO[bytes], source: Path = path) -> None:
            with (
                pq.ParquetFile(source) as pictures,
                pq.ParquetWriter(file, PICTURES_SCHEMA, compression="none") as writer,
            ):
                for batch in pictures.iter_batches(batch_size=PICTURES_PER_GROUP):
                    writer.write_batch(batch.filter(pc.is_in(batch["digest"], value_set=used)))

        replace_file(path, write)


def revocations_text(store: Store) -> bytes:
    """The current content of `withdrawn.json`."""
    return (json.dumps(store.withdrawn(), indent=1, sort_keys=True) + "\n").encode()


def revocations_are_written(store: Store, folder: Path) -> bool:
    """Whether `withdrawn.json` is up to date; before the first ingestion there is none."""
    path = folder / REVOKED
    return path.read_bytes() == revocations_text(store) if path.is_file() else not store.watermark()


def write_revocations(store: Store, folder: Path) -> None:
    """List in `withdrawn.json` the items of the partitions that are no longer valid."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / REVOKED, lambda file: file.write(revocations_text(store)))
