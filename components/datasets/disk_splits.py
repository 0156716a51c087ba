"""Duplicates and splits of data beyond memory: rows wait on disk, and what `Splits` decides is decided from files.

    STATE/waiting/KIND-NUMBER/   rows of one dataset and split, in the order in which `Splits` would take them
    STATE/fingerprints-*/        of each of their shards: hashes and band keys as Parquet, signatures as raw uint32

DuckDB finds equal hashes and the band keys that rows share, in the memory that `_connect` gives it and on disk beyond.
One pass over the rows that share any, in their order, reads the signatures of candidates from disk. Of every other row
memory holds a byte: the outcome.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

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
from components.datasets.formats import DatasetWriter, Kind, Row, Split, batched, read_rows, read_shard, shards
from components.runtime.files import remove, scratch_folder
from components.runtime.shards import Result, Shard, run_shards
from components.runtime.stage import StageRun

if TYPE_CHECKING:
    import duckdb

DUCKDB_BYTES, DUCKDB_BYTES_OF_ROW, DUCKDB_BYTES_OF_THREAD = 48 * 10**6, 16, 80 * 10**6
"""What DuckDB sorts and groups rows in; with half of it, it ends without memory."""
KEPT, EXACT, NEAR, IN_TEST = range(4)
REASONS = ("", "exact_duplicate", "near_duplicate", "in_test")
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
    folder: Path
    rows: int


class DiskSplits:
    """`Splits` of one kind without pictures in bounded memory; rows are written at the end."""

    def __init__(self, run: StageRun, kind: Kind, similarity: float, seed: int = 0) -> None:
        self._run, self._kind, self._similarity, self._seed = run, kind, similarity, seed
        self._waiting: list[_Waiting] = []

    def write_held_out(self, split: Split, rows: Iterable[Row], writer: DatasetWriter) -> None:
        """As `Splits.write_held_out`: the test rows of all datasets first, training rows last."""
        folder = self._run.state / "waiting" / f"{self._kind}-{len(self._waiting):03d}"
        remove(folder)
        with DatasetWriter(folder, writer.info.name, self._kind) as waiting:
            for row in rows:
                waiting.write(split, row)
        self._waiting.append(_Waiting(split, writer, folder, waiting.info.rows.get(split, 0)))

    def write_train(self, rows: Iterable[Row], writer: DatasetWriter) -> None:
        """As `Splits.write_train`, which `finish` completes."""
        self.write_held_out("train", rows, writer)

    def finish(self) -> None:
        """Write the rows that are new, and count the rest in their writers.

        Raises: InputError when nothing is left to train on.
        """
        outcomes, row = self._outcomes(), 0
        for waiting in self._waiting:
            for values in read_rows(waiting.folder, waiting.split):
                if outcomes[row] == KEPT:
                    waiting.writer.write(waiting.split, values)
                else:
                    waiting.writer.drop(REASONS[outcomes[row]])
                row += 1
            remove(waiting.folder)
            if waiting.split == "train":
                refuse_without_training_rows(waiting.writer)

    def _outcomes(self) -> Outcomes:
        """Of each row, in order."""
        files = [file for waiting in self._waiting for file in shards(waiting.folder, waiting.split)]
        starts = [0]
        for file in files:
            starts.append(starts[-1] + pq.read_metadata(file).num_rows)
        common = {"kind": self._kind, "similarity": self._similarity, "seed": self._seed}
        work = [
            Shard(
                f"fingerprints-{self._kind}-{number:05d}",
                fingerprint,
                [file],
                {**common, "file": str(file), "start": starts[number]},
            )
            for number, file in enumerate(files)
        ]
        folders = [output.folder for output in run_shards(self._run, work)]
        test_rows, held_out = (
            sum(waiting.rows for waiting in self._waiting if waiting.split in splits)
            for splits in (("test",), ("test", "validation"))
        )
        scratch = scratch_folder(self._run.paths.home, "duplicates")
        with scratch as spill, _connect(spill, starts[-1]) as connection:
            names = [str(folder / "fingerprints.parquet") for folder in folders]
            if not names:
                return np.zeros(0, np.uint8)
            connection.read_parquet(names).create_view("rows")
            connection.execute(
                "CREATE TABLE firsts AS SELECT digest, min(number) AS first_number FROM rows GROUP BY digest"
            )
            outcomes = np.zeros(starts[-1], np.uint8)
            if self._kind not in EXACT_KINDS:
                signatures = SignatureFiles([folder / "signatures.bin" for folder in folders], starts)
                _mark_near_duplicates(connection, signatures, outcomes, test_rows, self._similarity)
            _mark_copies(connection, outcomes, test_rows)
            if self._kind == "conversations":
                _mark_held_out_questions(connection, outcomes, held_out)
        return outcomes


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
