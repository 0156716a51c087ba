"""The kinds of dataset and how one lies on disk: a folder of Parquet shards and a `dataset.json`.

    NAME/dataset.json            kind, row counts per split, what was dropped and why, digests of the sources
    NAME/train-00000.parquet     trained on
    NAME/validation-00000.parquet  held out, for choices during training (labelled texts and text pairs)
    NAME/test-00000.parquet      held out: never trained on, used by `evaluate`

Message columns have the shape of OpenAI's chat API: `tool_calls` is a list of
`{id, type, function: {name, arguments}}` with `arguments` a JSON string, `tools` a JSON string.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from components.config.errors import InputError, reason_of
from components.config.project import Kind as Kind
from components.runtime.files import write_text

Split = Literal["train", "validation", "test"]
Row = dict[str, Any]
T = TypeVar("T")

TRAINING_KINDS: Mapping[str, tuple[Kind, ...]] = {
    "pretrain.decoder": ("documents",),
    "pretrain.encoder": ("documents", "labelled_texts"),
    "pretrain.encoder_decoder": ("documents",),
    "tune": ("conversations", "images"),
    "classifier": ("labelled_texts",),
    "summarizer": ("text_pairs",),
}
"""The kinds that each section of params.yaml trains on."""
ROWS_PER_SHARD = 50_000
ROWS_PER_GROUP = 4_000
PICTURE_BYTES_PER_GROUP = 64 << 20
_ROWS_READ, _PICTURE_ROWS_READ = 1024, 16

_TOOL_CALL = pa.struct(
    [
        ("id", pa.string()),
        ("type", pa.string()),
        ("function", pa.struct([("name", pa.string()), ("arguments", pa.string())])),
    ]
)
MESSAGES = pa.list_(
    pa.struct(
        [
            ("role", pa.string()),
            ("content", pa.string()),
            ("tool_calls", pa.list_(_TOOL_CALL)),
            ("tool_call_id", pa.string()),
            ("name", pa.string()),
        ]
    )
)

SCHEMAS: dict[Kind, pa.Schema] = {
    "documents": pa.schema([("id", pa.string()), ("text", pa.string()), ("source", pa.string())]),
    "conversations": pa.schema(
        [
            ("id", pa.string()),
            ("messages", MESSAGES),
            ("tools", pa.string()),
            # Held-out questions carry the name of their suite, such as "refunds/new_wordings"; elsewhere null.
            ("suite", pa.string()),
        ]
    ),
    # Both sides of a pair, or the one side of an unpaired label: chosen is liked, rejected disliked.
    "preferences": pa.schema(
        [
            ("id", pa.string()),
            ("prompt", MESSAGES),
            ("chosen", MESSAGES),
            ("rejected", MESSAGES),
            ("tools", pa.string()),
        ]
    ),
    # The content of messages has <image> where a picture is (components/media/messages.py); `images` are files.
    "images": pa.schema(
        [
            ("id", pa.string()),
            ("images", pa.list_(pa.binary())),
            ("messages", MESSAGES),
            ("tools", pa.string()),
            ("suite", pa.string()),
        ]
    ),
    # `suite` of what a project holds out, as in conversations; elsewhere null.
    "labelled_texts": pa.schema([(name, pa.string()) for name in ("id", "text", "label", "suite")]),
    "text_pairs": pa.schema([(name, pa.string()) for name in ("id", "source", "target", "suite")]),
}
"""Columns of each kind."""


@dataclass
class DatasetInfo:
    """The content of `dataset.json`."""

    name: str
    kind: Kind
    rows: dict[str, int] = field(default_factory=dict)
    """Rows by split."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Rows dropped, by reason: `exact_duplicate`, `near_duplicate`, `in_test`."""
    sources: list[dict[str, str]] = field(default_factory=list)
    """Where the rows came from: `{"name", "sha256"}`."""
    licence: str = ""
    """As an SPDX identifier where there is one; empty: not stated."""


class DatasetWriter:
    """Write the rows of one dataset, split by split, in bounded memory.

    Use as a context manager; `dataset.json` is written last, on a clean exit, so a
    folder without it is no dataset.
    """

    def __init__(self, folder: Path, name: str, kind: Kind) -> None:
        self.folder = folder
        self.info = DatasetInfo(name=name, kind=kind)
        self.schema = SCHEMAS[kind]
        self._pending: dict[str, list[Row]] = {}
        self._pending_bytes: Counter[str] = Counter()  # of pictures
        self._writers: dict[str, pq.ParquetWriter] = {}
        self._in_shard: dict[str, int] = {}
        self._shards: dict[str, int] = {}

    def __enter__(self) -> DatasetWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        if exc_type is None:
            for split in list(self._pending):
                self._flush(split)
        for writer in self._writers.values():
            writer.close()
        if exc_type is None:
            write_json(self.folder / "dataset.json", asdict(self.info))

    def write(self, split: Split, row: Row) -> None:
        """Append one row; columns it lacks become null."""
        pending = self._pending.setdefault(split, [])
        pending.append(row)
        self.info.rows[split] = self.info.rows.get(split, 0) + 1
        self._pending_bytes[split] += sum(map(len, row.get("images") or ()))
        if len(pending) >= ROWS_PER_GROUP or self._pending_bytes[split] >= PICTURE_BYTES_PER_GROUP:
            self._flush(split)

    def add_file(self, split: Split, file: Path, rows: int) -> None:
        """Add a Parquet file of so many rows as the next shard of a split, of which no row is written one by one.

        It is a hard link where the disk has them, and must not be written to.
        """
        number = self._shards.get(split, 0)
        target = self.folder / f"{split}-{number:05d}.parquet"
        try:
            target.hardlink_to(file)
        except OSError:
            shutil.copyfile(file, target)
        self._shards[split] = number + 1
        self.info.rows[split] = self.info.rows.get(split, 0) + rows

    def drop(self, reason: str, count: int = 1) -> None:
        self.info.dropped[reason] = self.info.dropped.get(reason, 0) + count

    def _flush(self, split: str) -> None:
        rows = self._pending.pop(split, [])
        del self._pending_bytes[split]
        if not rows:
            return
        if self._in_shard.get(split, ROWS_PER_SHARD) >= ROWS_PER_SHARD:
            if split in self._writers:
                self._writers[split].close()
            number = self._shards.get(split, 0)
            self._writers[split] = pq.ParquetWriter(self.folder / f"{split}-{number:05d}.parquet", self.schema)
            self._shards[split] = number + 1
            self._in_shard[split] = 0
        self._writers[split].write_table(pa.Table.from_pylist(rows, schema=self.schema))
        self._in_shard[split] += len(rows)


def read_info(folder: Path) -> DatasetInfo:
    """Read `dataset.json`.

    Raises: InputError when the folder holds no dataset, or a damaged one.
    """
    path = folder / "dataset.json"
    try:
        return DatasetInfo(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise InputError(f'{folder.name}: no such dataset; run "loopwright data list" for the names') from None
    except (ValueError, TypeError) as error:
        raise InputError(f'{path}: damaged: {error}; run "dvc checkout --force {folder}"') from None


def refuse_other_kinds(section: str, name: str, kind: Kind) -> None:
    """Raises: InputError when a section of params.yaml names a dataset of a kind that it does not train on."""
    if kind not in (kinds := TRAINING_KINDS[section]):
        raise InputError(
            f"params.yaml: {section}.dataset: {name!r} holds {kind}; {section} trains on {' and '.join(kinds)}"
        )


def shards(folder: Path, split: str) -> list[Path]:
    """The Parquet files of one split, in order."""
    return sorted(folder.glob(f"{split}-*.parquet"))


def read_rows(folder: Path, split: str, columns: list[str] | None = None) -> Iterator[Row]:
    """Rows of one split in order, one row group in memory at a time.

    Raises: InputError for a damaged shard.
    """
    for shard in shards(folder, split):
        yield from read_shard(shard, columns)


def read_shard(shard: Path, columns: list[str] | None = None) -> Iterator[Row]:
    """Rows of one shard in order.

    Raises: InputError for a damaged one.
    """
    try:
        with pq.ParquetFile(shard) as file:
            with_pictures = "images" in (columns or file.schema_arrow.names)
            size = _PICTURE_ROWS_READ if with_pictures else _ROWS_READ
            for batch in file.iter_batches(batch_size=size, columns=columns):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = reason_of(error)
        raise InputError(f'{shard}: damaged: {reason}; run "dvc checkout --force {shard.parent}"') from None


def first_per_suite(
    rows: Iterable[T], count: int, suite_of: Callable[[Any], str | None] = itemgetter("suite")
) -> Iterator[T]:
    """The first `count` rows of each suite, in order."""
    seen: Counter[str | None] = Counter()
    for row in rows:
        suite = suite_of(row)
        seen[suite] += 1
        if seen[suite] <= count:
            yield row


def batched(rows: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` rows, the last one shorter (`itertools.batched` of Python 3.12)."""
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch


def split_digest(folders: Iterable[Path], split: Split, settings: str) -> str:
    """Identity of a split of several datasets together with the settings by which it is read."""
    digest = hashlib.blake2b(settings.encode(), digest_size=16)
    for folder in folders:
        for shard in shards(folder, split):
            digest.update(f"{folder.name}/{shard.name}".encode())
            with shard.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def in_test_split(key: str, share: float, seed: int = 0) -> bool:
    """Whether a row with this key is held out: a fixed pseudo-random choice that no other row can change."""
    digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def row_id(*parts: str) -> str:
    """A stable id of a row from its content."""
    return hashlib.blake2b("\x1f".join(parts).encode(), digest_size=12).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys, so that equal values have equal digests."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
