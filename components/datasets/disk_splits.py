"""Duplicates and splits of data beyond memory: what `Splits` decides is decided from files, shard by shard.

    STATE/split-NAME-*/          rows of a file of an added dataset, by split
    STATE/waiting/KIND-NUMBER/   rows of a split of a dataset that the project makes, written anew by each run
    STATE/fingerprints-KIND-*/   of each of these files: hashes and band keys as Parquet, signatures as raw uint32
    STATE/outcomes-KIND/         of each row a byte: whether it stays, or why not
    STATE/rows-NAME-SPLIT-*/     the rows that stay: files of the dataset

Rows are numbered in the order in which `Splits` would take them. DuckDB finds equal hashes and the band keys that rows
share, in the memory that `_connect` gives it and on disk beyond. One pass over the rows that share any, in their order,
reads the signatures of candidates from disk. Of every other row memory holds a byte: the outcome.
"""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate, groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from components.datasets import formats
from components.datasets.added_rows import AddedRows, SplitRule
from components.datasets.deduplication import (
    EXACT_KINDS,
    PERMUTATIONS,
    Buckets,
    MinHash,
    Signature,
    are_close,
    content,
    hash_text,
    normalized,
    question,
    refuse_without_training_rows,
)
from components.datasets.formats import DatasetWriter, Kind, Row, Split, batched, read_shard, shards
from components.runtime.files import remove, scratch_folder
from components.runtime.shards import Result, Shard, run_shards
from components.runtime.stage import StageRun

if TYPE_CHECKING:
    import duckdb

DUCKDB_BYTES, DUCKDB_BYTES_OF_ROW, DUCKDB_BYTES_OF_THREAD = 48 * 10**6, 16, 80 * 10**6
"""What DuckDB sorts and groups rows in; with half of it, it ends without memory."""
KEPT, EXACT, NEAR, IN_TEST = range(4)
REASONS = ("", "exact_duplicate", "near_duplicate", "in_test")
OUTCOMES, ROWS = "outcomes.npy", "rows.parquet"
_BATCH = 1024
_FETCHED = 10_000
_SIGNATURE_BYTES = 4 * PERMUTATIONS
_SCHEMA = pa.schema(
    [("number", pa.int64()), ("digest", pa.uint64()), ("question", pa.uint64()), ("keys", pa.list_(pa.uint64()))]
)
Outcomes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class _Waiting:
    """Rows that wait for their outcome."""

    split: Split
    writer: DatasetWriter
    files: list[Path]
    rows: list[int]
    """Number of rows of each file."""


class DiskSplits:
    """`Splits` of one kind without pictures in bounded memory; rows are written at the end."""

    def __init__(self, run: StageRun, kind: Kind, similarity: float, seed: int = 0) -> None:
        self._run, self._kind, self._similarity, self._seed = run, kind, similarity, seed
        self._waiting: list[_Waiting] = []
        self._added: dict[Path, list[Path]] = {}
        """By folder of an added dataset, the folders of its shards."""

    def write_held_out(self, split: Split, rows: Iterable[Row], writer: DatasetWriter) -> None:
        """As `Splits.write_held_out`: the test rows of all datasets first, training rows last."""
        if isinstance(rows, AddedRows):
            folders = self._split_added(rows)
        else:
            folders = [self._run.state / "waiting" / f"{self._kind}-{len(self._waiting):03d}"]
            remove(folders[0])
            with DatasetWriter(folders[0], writer.info.name, self._kind) as waiting:
                for row in rows:
                    waiting.write(split, row)
        files = [file for folder in folders for file in shards(folder, split)]
        self._waiting.append(_Waiting(split, writer, files, [pq.read_metadata(file).num_rows for file in files]))

    def write_train(self, rows: Iterable[Row], writer: DatasetWriter) -> None:
        """As `Splits.write_train`, which `finish` completes."""
        self.write_held_out("train", rows, writer)

    def finish(self) -> None:
        """Write the rows that are new, and count the rest in their writers.

        Raises: InputError when nothing is left to train on.
        """
        file, start = self._outcomes(), 0
        outcomes = np.load(file)
        for waiting in self._waiting:
            end = start + sum(waiting.rows)
            part = outcomes[start:end]
            self._write_rows(waiting, part, file, start)
            firsts = {code: int(np.argmax(part == code)) for code in (EXACT, NEAR, IN_TEST) if (part == code).any()}
            for code in sorted(firsts, key=firsts.__getitem__):  # `dataset.json` lists them as they come
                waiting.writer.drop(REASONS[code], int(np.count_nonzero(part == code)))
            if waiting.split == "train":
                refuse_without_training_rows(waiting.writer)
            start = end
        remove(self._run.state / "waiting")

    def _split_added(self, rows: AddedRows) -> list[Path]:
        """Folders with the rows of each file of an added dataset, by split."""
        if rows.folder not in self._added:
            common = {"kind": self._kind, "rule": asdict(rows.rule)}
            name = f"split-{rows.folder.name}"
            work = [
                Shard(f"{name}-{number:05d}", split_file, [file], {**common, "file": str(file)})
                for number, file in enumerate(shards(rows.folder, "train"))
            ]
            self._added[rows.folder] = [output.folder for output in run_shards(self._run, work)]
        return self._added[rows.folder]

    def _outcomes(self) -> Path:
        """The file with the outcome of each row, in order."""
        files = [file for waiting in self._waiting for file in waiting.files]
        starts = list(accumulate((rows for waiting in self._waiting for rows in waiting.rows), initial=0))
        common = {"kind": self._kind, "similarity": self._similarity}
        of_file = {**common, "seed": self._seed}
        work = [
            Shard(
                f"fingerprints-{self._kind}-{number:05d}",
                fingerprint,
                [file],
                {**of_file, "file": str(file), "start": starts[number]},
            )
            for number, file in enumerate(files)
        ]
        folders = [output.folder for output in run_shards(self._run, work)]
        test_rows, held_out = (
            sum(sum(waiting.rows) for waiting in self._waiting if waiting.split in splits)
            for splits in (("test",), ("test", "validation"))
        )
        counts = {"starts": starts, "test_rows": test_rows, "held_out": held_out}
        arguments = {**common, **counts, "folders": list(map(str, folders)), "home": str(self._run.paths.home)}
        (output,) = run_shards(self._run, [Shard(f"outcomes-{self._kind}", decide, folders, arguments)])
        return output.folder / OUTCOMES

    def _write_rows(self, waiting: _Waiting, outcomes: Outcomes, file: Path, start: int) -> None:
        """Write the rows that stay, in files of as many rows as `DatasetWriter` writes.

        `file` has the outcomes of all rows; these begin at `start`.
        """
        kept_rows = [int(np.count_nonzero(part == KEPT)) for part in np.split(outcomes, np.cumsum(waiting.rows)[:-1])]
        ends = list(accumulate(kept_rows))
        rows_per_group = formats.ROWS_PER_GROUP
        size = -(-formats.ROWS_PER_SHARD // rows_per_group) * rows_per_group
        starts = list(accumulate(waiting.rows, initial=start))
        work: list[Shard] = []
        for first in range(0, ends[-1] if ends else 0, size):
            stop = min(first + size, ends[-1])
            read = slice(bisect_right(ends, first), bisect_left(ends, stop) + 1)
            arguments = {
                "kind": self._kind,
                "files": [[str(name), number] for name, number in zip(waiting.files[read], starts[read], strict=True)],
                "outcomes": str(file),
                "first": first - (ends[read.start - 1] if read.start else 0),
                "rows": stop - first,
                "rows_per_group": rows_per_group,
            }
            key = f"rows-{waiting.writer.info.name}-{waiting.split}-{len(work):05d}"
            work.append(Shard(key, write_rows, [*waiting.files[read], file], arguments))
        for shard, output in zip(work, run_shards(self._run, work), strict=True):
            waiting.writer.add_file(waiting.split, output.folder / ROWS, shard.arguments["rows"])


def split_file(out: Path, kind: Kind, rule: dict[str, Any], file: str) -> Result:
    """Write the rows of a file by split."""
    split_rule = SplitRule(**rule)
    with DatasetWriter(out, out.name, kind) as writer:
        for row in read_shard(Path(file)):
            writer.write(split_rule.split_of(row), row)
    return {}


def write_rows(
    out: Path, kind: Kind, files: list[tuple[str, int]], outcomes: str, first: int, rows: int, rows_per_group: int
) -> Result:
    """Write so many of the files' rows that stay, from the `first` of them on, as `DatasetWriter` does.

    `files`: each with the number of its first row in the file `outcomes`.
    """
    stay = np.load(outcomes, mmap_mode="r")
    schema = formats.SCHEMAS[kind]
    pending = schema.empty_table()
    with pq.ParquetWriter(out / ROWS, schema) as writer:
        for name, number in files:
            with pq.ParquetFile(name) as file:
                for group in range(file.num_row_groups):  # `iter_batches` holds several
                    table = file.read_row_group(group)
                    rest = table.filter(pa.array(stay[number : number + len(table)] == KEPT))
                    number += len(table)
                    part = rest.slice(first, rows)
                    first, rows = max(0, first - len(rest)), rows - len(part)
                    if len(part):  # a slice of no rows would hold its table
                        pending = pa.concat_tables([pending, part])
                    if len(pending) >= rows_per_group:
                        writer.write_table(pending.slice(0, rows_per_group).combine_chunks())
                        pending = pending.slice(rows_per_group)
        if len(pending):
            writer.write_table(pending.combine_chunks())
    return {}


def decide(
    out: Path,
    kind: Kind,
    similarity: float,
    starts: list[int],
    test_rows: int,
    held_out: int,
    folders: list[str],
    home: str,
) -> Result:
    """Write the outcome of each row, of which the folders have the fingerprints.

    `starts`: the number of each folder's first row, and of all rows; `test_rows`, `held_out`: those that come first.
    """
    outcomes = np.zeros(starts[-1], np.uint8)
    if folders:
        with scratch_folder(Path(home), "duplicates") as spill, _connect(spill, starts[-1]) as connection:
            connection.read_parquet([f"{folder}/fingerprints.parquet" for folder in folders]).create_view("rows")
            connection.execute(
                "CREATE TABLE firsts AS SELECT digest, min(number) AS first_number FROM rows GROUP BY digest"
            )
            if kind not in EXACT_KINDS:
                signatures = SignatureFiles([Path(folder) / "signatures.bin" for folder in folders], starts)
                _mark_near_duplicates(connection, signatures, outcomes, test_rows, similarity)
            _mark_copies(connection, outcomes, test_rows)
            if kind == "conversations":
                _mark_held_out_questions(connection, outcomes, held_out)
    np.save(out / OUTCOMES, outcomes)
    return {}


def fingerprint(out: Path, kind: Kind, similarity: float, seed: int, file: str, start: int) -> Result:
    """Write the hashes of a shard's rows, numbered from `start`, and the signatures of their texts."""
    min_hash, exact_only = MinHash(similarity, seed), kind in EXACT_KINDS
    with (
        pq.ParquetWriter(out / "fingerprints.parquet", _SCHEMA) as writer,
        (out / "signatures.bin").open("wb") as signatures,
    ):
        for batch, rows in enumerate(batched(read_shard(Path(file)), _BATCH)):
            prints: list[Row] = []
            for row in rows:
                normal = normalized(content(row), exact_only)
                signature = None if exact_only else min_hash.signature(normal)
                if not exact_only:
                    signatures.write(bytes(_SIGNATURE_BYTES) if signature is None else signature.tobytes())
                prints.append(
                    {
                        "number": start + batch * _BATCH + len(prints),
                        "digest": hash_text(normal),
                        "question": hash_text(question(row)) if "messages" in row else None,
                        "keys": [] if signature is None else min_hash.band_keys(signature),
                    }
                )
            writer.write_table(pa.Table.from_pylist(prints, schema=_SCHEMA))
    return {}


class SignatureFiles:
    """Signatures by the number of their row; each read opens its file, as a process may open fewer than there are."""

    def __init__(self, files: list[Path], starts: list[int]) -> None:
        self._files, self._starts = files, starts

    def __getitem__(self, row: int) -> Signature:
        number = bisect_right(self._starts, row) - 1
        with self._files[number].open("rb", buffering=0) as file:
            file.seek((row - self._starts[number]) * _SIGNATURE_BYTES)
            return np.frombuffer(file.read(_SIGNATURE_BYTES), np.uint32)


def _connect(spill: Path, rows: int) -> duckdb.DuckDBPyConnection:
    """A database for so many rows, with the memory and threads that they need, in the folder `spill` beyond that."""
    import duckdb

    memory = DUCKDB_BYTES + DUCKDB_BYTES_OF_ROW * rows
    threads = min(os.cpu_count() or 1, max(1, memory // DUCKDB_BYTES_OF_THREAD))
    config: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": f"{memory}B",
        "threads": threads,
        "temp_directory": str(spill),
    }
    connection = duckdb.connect(str(spill / "rows.duckdb"), config=config)
    connection.execute("SET enable_progress_bar = false")
    connection.execute("SET preserve_insertion_order = false")
    return connection


def _mark_near_duplicates(
    connection: duckdb.DuckDBPyConnection,
    signatures: SignatureFiles,
    outcomes: Outcomes,
    test_rows: int,
    similarity: float,
) -> None:
    """Mark the first row of each text that is close to a row that is kept: IN_TEST where that is a test row."""
    buckets = Buckets()
    for row, shared in _shared_keys(connection):
        keys = [key for key, _ in shared]
        signature = signatures[row]
        close = [other for other in buckets.candidates(keys) if are_close(signatures[other], signature, similarity)]
        if close:
            outcomes[row] = IN_TEST if min(close) < test_rows else NEAR
        else:
            buckets.add(keys, row)
        for key, last in shared:
            if last == row:
                buckets.remove(key)


def _shared_keys(connection: duckdb.DuckDBPyConnection) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """In order, each row that shares band keys: with each of them the last row that has it."""
    connection.execute(
        "CREATE TABLE entries AS SELECT number, unnest(keys) AS band FROM rows"
        " WHERE number IN (SELECT first_number FROM firsts)"
    )
    connection.execute(
        "CREATE TABLE buckets AS SELECT band, max(number) AS last_number FROM entries GROUP BY band HAVING count(*) > 1"
    )
    entries = connection.execute(
        "SELECT number, band, last_number FROM entries JOIN buckets USING (band) ORDER BY number"
    )
    for row, group in groupby(_fetched(entries), key=itemgetter(0)):
        yield row, [(key, last) for _, key, last in group]


def _mark_copies(connection: duckdb.DuckDBPyConnection, outcomes: Outcomes, test_rows: int) -> None:
    """Mark exact copies by the outcome of the first row with their text.

    While test rows come, nothing is known to be held out: what is close to a test row is a near-duplicate there.
    """
    copies = connection.execute(
        "SELECT number, first_number FROM rows JOIN firsts USING (digest) WHERE number > first_number ORDER BY number"
    )
    for row, first in _fetched(copies):
        if outcomes[first] == KEPT:
            outcomes[row] = IN_TEST if first < test_rows <= row else EXACT
        else:
            outcomes[row] = outcomes[first]
    of_test = outcomes[:test_rows]
    of_test[of_test == IN_TEST] = NEAR


def _mark_held_out_questions(connection: duckdb.DuckDBPyConnection, outcomes: Outcomes, held_out: int) -> None:
    """Mark training rows that ask a question of a held-out one."""
    asking = connection.execute(
        f"SELECT number FROM rows WHERE number >= {held_out}"
        f" AND question IN (SELECT question FROM rows WHERE number < {held_out})"
    )
    for (row,) in _fetched(asking):
        outcomes[row] = IN_TEST


def _fetched(result: duckdb.DuckDBPyConnection) -> Iterator[tuple[int, ...]]:
    while rows := result.fetchmany(_FETCHED):
        yield from rows
