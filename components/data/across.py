"""Checks that no single shard can make: ids across shards, held-out rows in the training split, counts as declared.

DuckDB reads only the columns it needs and spills to disk, so a set need not fit in memory.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from components.data.datasets import DatasetInfo
from components.data.findings import EXAMPLES, Check, Example, shown

if TYPE_CHECKING:
    import duckdb

_ALL = "all shards"
_CONTENT = {
    "documents": "trim(regexp_replace(lower(text), '\\s+', ' ', 'g'))",
    "conversations": "[m.content for m in messages if m.role in ('system', 'user')]::VARCHAR",
    "preferences": "[m.content for m in prompt if m.role in ('system', 'user')]::VARCHAR",
}
"""What may not stand in both splits: a document's text, what a conversation or a rated prompt asks."""


def across_shards(files: list[Path], info: DatasetInfo) -> list[Check]:
    """Hold all shards of a dataset together against what must be true of the whole."""
    if not files:
        return [_counts(info, {})]
    import duckdb

    with tempfile.TemporaryDirectory() as spill:
        connection = duckdb.connect(config={"memory_limit": "1GB", "threads": 2, "temp_directory": spill})
        with connection:
            connection.execute("SET enable_progress_bar = false")
            rows = connection.read_parquet([str(file) for file in files], filename=True, file_row_number=True)
            rows.create_view("rows")
            checks = [_counts(info, _rows_found(connection)), _unique_ids(connection)]
            if info.kind in _CONTENT and info.rows.get("test"):
                checks.append(_held_out(connection, _CONTENT[info.kind]))
    return checks


def _rows_found(connection: duckdb.DuckDBPyConnection) -> dict[str, int]:
    found = connection.execute(
        "SELECT split_part(parse_filename(filename), '-', 1), count(*) FROM rows GROUP BY 1 ORDER BY 1"
    )
    return {str(split): int(count) for split, count in found.fetchall()}


def _counts(info: DatasetInfo, found: dict[str, int]) -> Check:
    check = Check("row_counts_are_as_declared", None, "There are rows to train on, as many as dataset.json says", _ALL)
    check.rows = sum(found.values())
    if found != {split: count for split, count in info.rows.items() if count}:
        check.broken = f"found {found or 'no rows'}; dataset.json says {info.rows}"
    elif not found.get("train"):
        check.broken = "no rows to train on"
    return check


def _unique_ids(connection: duckdb.DuckDBPyConnection) -> Check:
    check = Check("ids_are_unique", "id", "No two rows of the dataset share an id", _ALL)
    connection.execute(
        "CREATE TEMP TABLE repeated AS SELECT id, count(*) AS n FROM rows GROUP BY id HAVING n > 1 AND id IS NOT NULL"
    )
    check.rows, check.failed = _pair(connection, "SELECT (SELECT count(*) FROM rows), (SELECT sum(n) FROM repeated)")
    _note(connection, check, "id", "id IN (SELECT id FROM repeated)")
    return check


def _held_out(connection: duckdb.DuckDBPyConnection, content: str) -> Check:
    check = Check("held_out_rows_are_not_trained_on", None, "Nothing in the test split is in the training split", _ALL)
    test, train = (f"parse_filename(filename) LIKE '{split}-%'" for split in ("test", "train"))
    connection.execute(
        f"CREATE TEMP TABLE held_out AS SELECT DISTINCT hash({content}) AS content FROM rows WHERE {test}"
    )
    where = f"{train} AND hash({content}) IN (SELECT content FROM held_out)"
    check.rows, check.failed = _pair(
        connection, f"SELECT count(*) FILTER ({train}), count(*) FILTER ({where}) FROM rows"
    )
    _note(connection, check, content, where)
    return check


def _pair(connection: duckdb.DuckDBPyConnection, query: str) -> tuple[int, int]:
    row = connection.execute(query).fetchone()
    assert row is not None
    return int(row[0]), int(row[1] or 0)


def _note(connection: duckdb.DuckDBPyConnection, check: Check, value: str, where: str) -> None:
    if not check.failed:
        return
    columns = f"parse_filename(filename), file_row_number, id, {value}"
    found = connection.execute(f"SELECT {columns} FROM rows WHERE {where} ORDER BY 1, 2 LIMIT {EXAMPLES}")
    for shard, row, identity, found_value in found.fetchall():
        check.note(Example(shard, int(row) + 1, identity, shown(found_value)))
