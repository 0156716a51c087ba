"""Checks across shards: unique ids, no held-out rows in the training split, row counts as declared.

DuckDB reads only the columns it needs and spills to disk, so a set need not fit in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from components.config.errors import InputError
from components.datasets.deduplication import PictureQuestions
from components.datasets.formats import DatasetInfo, Row, read_shard
from components.runtime.files import scratch_folder
from components.validation.report import EXAMPLES, Check, Example, shown

if TYPE_CHECKING:
    import duckdb

T = TypeVar("T")
_ALL = "all shards"
_CONTENT = {
    "documents": "trim(regexp_replace(lower(text), '\\s+', ' ', 'g'))",
    "conversations": "[m.content for m in messages if m.role in ('system', 'user')]::VARCHAR",
    "images": "struct_pack(pictures := hash(images), question := "
    "[m.content for m in messages if m.role in ('system', 'user')])::VARCHAR",
    "preferences": "[m.content for m in prompt if m.role in ('system', 'user')]::VARCHAR",
    "labelled_texts": "trim(regexp_replace(lower(text), '\\s+', ' ', 'g'))",
    "text_pairs": "trim(regexp_replace(lower(source), '\\s+', ' ', 'g'))",
}
"""What may not be in both splits: a document's text, a source, the question of a prompt or of a conversation, with its
pictures where there are any."""
MIN_LABELS, MAX_LABELS, MIN_ROWS = 2, 1_000, 2
"""Limits of the number of labels; and rows of each, one to train on and one to test it by."""


def cross_shard_checks(files: list[Path], info: DatasetInfo, home: Path | None = None) -> list[Check]:
    """Check all shards of a dataset together; what does not fit in memory goes to the state folder `home`."""
    if not files:
        return [_counts(info, {})]
    import duckdb

    with scratch_folder(home, "validate") if home else nullcontext("") as spill:
        connection = duckdb.connect(config={"memory_limit": "1GB", "threads": 2, "temp_directory": str(spill)})
        with connection:
            connection.execute("SET enable_progress_bar = false")
            rows = connection.read_parquet([str(file) for file in files], filename=True, file_row_number=True)
            rows.create_view("rows")
            checks = [_counts(info, _row_counts(connection)), _unique_ids(connection)]
            if info.kind in _CONTENT and info.rows.get("test"):
                checks.append(_held_out(connection, _CONTENT[info.kind]))
            if info.kind == "images":
                checks.append(_unique_content(connection))
                if info.rows.get("test"):
                    checks.append(_held_out_pictures(files))
            if info.kind == "labelled_texts":
                # Of a dataset that is split already, each label must be trained on.
                rows_of_labels = _trained_labels if info.rows.get("test") else _rows_per_label
                checks += [_label_count(connection), rows_of_labels(connection)]
    return checks


def _row_counts(connection: duckdb.DuckDBPyConnection) -> dict[str, int]:
    counts = connection.execute(
        "SELECT split_part(parse_filename(filename), '-', 1), count(*) FROM rows GROUP BY 1 ORDER BY 1"
    )
    return {str(split): int(count) for split, count in counts.fetchall()}


def _counts(info: DatasetInfo, counts: dict[str, int]) -> Check:
    check = Check("row_counts_are_as_declared", None, "There are rows to train on, as many as dataset.json says", _ALL)
    check.rows = sum(counts.values())
    if counts != {split: count for split, count in info.rows.items() if count}:
        check.broken = f"found {counts or 'no rows'}; dataset.json says {info.rows}"
    elif not counts.get("train"):
        check.broken = "no rows to train on"
    return check


def _unique_ids(connection: duckdb.DuckDBPyConnection) -> Check:
    check = Check("ids_are_unique", "id", "No two rows of the dataset share an id", _ALL)
    # Numbers first: they take less memory than ids.
    connection.execute("CREATE TEMP TABLE hashes AS SELECT hash(id) AS h FROM rows GROUP BY h HAVING count(*) > 1")
    connection.execute(
        "CREATE TEMP TABLE repeated AS SELECT id, count(*) AS n FROM rows WHERE hash(id) IN (FROM hashes)"
        " GROUP BY id HAVING n > 1 AND id IS NOT NULL"
    )
    check.rows, check.failed = _pair(connection, "SELECT (SELECT count(*) FROM rows), (SELECT sum(n) FROM repeated)")
    _add_examples(connection, check, "id", "id IN (SELECT id FROM repeated)")
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
    _add_examples(connection, check, content, where)
    return check


def _unique_content(connection: duckdb.DuckDBPyConnection) -> Check:
    about = "No two rows of the dataset have the same pictures and messages"
    check = Check("rows_are_unique", None, about, _ALL)
    content = "hash(images, messages::VARCHAR, tools)"
    repeated = f"SELECT {content} FROM rows GROUP BY 1 HAVING count(*) > 1"
    connection.execute(f"CREATE TEMP TABLE repeated_content AS {repeated}")
    where = f"{content} IN (FROM repeated_content)"
    check.rows, check.failed = _pair(connection, f"SELECT count(*), count(*) FILTER ({where}) FROM rows")
    question = "[m.content for m in messages if m.role = 'user']::VARCHAR"
    _add_examples(connection, check, question, where)
    return check


def _held_out_pictures(files: list[Path]) -> Check:
    """Near-duplicates: the decoded pictures of rows that ask a question of the test split."""
    about = "No training row asks a question of the test split about near-duplicates of its pictures"
    check = Check("held_out_pictures_are_not_trained_on", "images", about, _ALL)
    held_out = PictureQuestions()
    for file in files:
        if file.name.startswith("test-"):
            for row in read_shard(file):
                _unless_unreadable(held_out.add, row)
    for file in files:
        if file.name.startswith("train-"):
            for number, row in enumerate(read_shard(file), 1):
                check.rows += 1
                if _unless_unreadable(held_out.__contains__, row):
                    check.failed += 1
                    questions = [message["content"] for message in row["messages"] if message["role"] == "user"]
                    check.note(Example(file.name, number, row["id"], shown(" ".join(filter(None, questions)))))
    return check


def _unless_unreadable(call: Callable[[Row], T], row: Row) -> T | None:
    """The call's result; None for a row with a picture that cannot be read, which the suite refuses."""
    try:
        return call(row)
    except InputError:
        return None


def _label_count(connection: duckdb.DuckDBPyConnection) -> Check:
    about = f"There are {MIN_LABELS} to {MAX_LABELS:,} labels to tell apart"
    check = Check("labels_can_be_told_apart", "label", about, _ALL)
    check.rows, count = _pair(connection, "SELECT count(*), count(DISTINCT label) FROM rows")
    if count < MIN_LABELS:
        only = connection.execute("SELECT any_value(label) FROM rows").fetchone()
        check.broken = f"found one label, {shown(only[0] if only else None)}; add rows of another"
    elif count > MAX_LABELS:
        check.broken = f"found {count:,} labels; join labels, or name the column that holds them with --label-column"
    return check


def _rows_per_label(connection: duckdb.DuckDBPyConnection) -> Check:
    about = f"Every label has {MIN_ROWS} rows or more, one to learn from and one to test it by"
    check = Check("labels_have_rows", "label", about, _ALL)
    few = f"SELECT label FROM rows GROUP BY label HAVING count(*) < {MIN_ROWS}"
    check.rows, check.failed = _pair(connection, f"SELECT count(*), count(*) FILTER (label IN ({few})) FROM rows")
    _add_examples(connection, check, "label", f"label IN ({few})")
    return check


def _trained_labels(connection: duckdb.DuckDBPyConnection) -> Check:
    check = Check("held_out_labels_are_trained_on", "label", "Every held-out label is also in the training split", _ALL)
    trained = "SELECT label FROM rows WHERE parse_filename(filename) LIKE 'train-%'"
    where = f"label NOT IN ({trained})"
    check.rows, check.failed = _pair(connection, f"SELECT count(*), count(*) FILTER ({where}) FROM rows")
    _add_examples(connection, check, "label", where)
    return check


def _pair(connection: duckdb.DuckDBPyConnection, query: str) -> tuple[int, int]:
    row = connection.execute(query).fetchone()
    assert row is not None
    return int(row[0]), int(row[1] or 0)


def _add_examples(connection: duckdb.DuckDBPyConnection, check: Check, value: str, where: str) -> None:
    if not check.failed:
        return
    columns = f"parse_filename(filename), file_row_number, id, {value}"
    examples = connection.execute(f"SELECT {columns} FROM rows WHERE {where} ORDER BY 1, 2 LIMIT {EXAMPLES}")
    for shard, row, identity, content in examples.fetchall():
        check.note(Example(shard, int(row) + 1, identity, shown(content)))
