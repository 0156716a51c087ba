"""Rows of files in parts: each row once and in order, whatever the format, the blank lines and the size of a part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.config.errors import InputError
from components.datasets.records import read_csv
from components.prediction import sources
from components.prediction.sources import parts, read_rows, source_files

TEXTS = ["one", 'two "quoted", and more', "three\nlines\n", "", "fünf 日本", "six", "seven"]


def values(file: Path, max_rows: int, wanted: str = "text") -> list[Any]:
    return [
        row for part in parts(str(file), wanted, max_rows) for rows in read_rows(part, [wanted]) for row in rows.values
    ]


@pytest.fixture(params=["jsonl", "csv", "tsv", "parquet"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file of TEXTS, with what such files have between their rows."""
    path: Path = tmp_path / f"rows.{request.param}"
    if request.param == "jsonl":
        lines = [json.dumps({"id": number, "text": text}, ensure_ascii=False) for number, text in enumerate(TEXTS)]
        path.write_text("\n\n".join(lines), encoding="utf-8-sig")
    elif request.param == "parquet":
        table = pa.table({"id": list(range(len(TEXTS))), "text": TEXTS})
        pq.write_table(table, path, row_group_size=2)
    else:
        separator = "\t" if request.param == "tsv" else ";"
        quoted = ['"{}"'.format(text.replace('"', '""')) for text in TEXTS]
        lines = [f"{number}{separator}{text}\r\n" for number, text in enumerate(quoted)]
        path.write_text(f"id{separator}text\r\n" + "\r\n".join(lines), encoding="utf-8-sig", newline="")
    return path


@pytest.mark.parametrize("max_rows", [1, 2, 3, 50])
def test_parts_have_each_row_once_and_in_order(file: Path, max_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "ROWS_READ", 2)
    assert values(file, max_rows) == [{"text": text} for text in TEXTS]
    sizes = [part.rows for part in parts(str(file), "text", max_rows)]
    assert max(sizes) <= max_rows
    assert sum(sizes) == len(TEXTS)
    firsts = [part.row for part in parts(str(file), "text", max_rows)]
    assert firsts == [1 + sum(sizes[:number]) for number in range(len(sizes))]
    tables = [rows.table for part in parts(str(file), "text", max_rows) for rows in read_rows(part, [])]
    assert [str(value) for table in tables for value in table["id"].to_pylist()] == [str(n) for n in range(7)]


def test_a_part_ends_behind_its_bytes_too(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_PART_BYTES", 20)
    assert values(file, 50) == [{"text": text} for text in TEXTS]
    if file.suffix != ".parquet":
        assert len(list(parts(str(file), "text", 50))) > 3


def test_csv_is_read_as_data_add_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text('text;label\n"a;b";1\n\n"c\nd";2\n')
    assert values(file, 1) == [{"text": record.values["text"]} for record in read_csv(file)]


def test_columns_of_json_lines_have_one_type(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [
        {"text": "a", "count": 1, "share": 1, "good": True, "mixed": 1, "list": [1], "large": 2**70, "none": None},
        {"text": "b", "share": 0.5, "mixed": "x", "list": {"a": "ü"}},
    ]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (part,) = parts(str(file), "text", 10)
    (found,) = read_rows(part, [])
    assert {field.name: str(field.type) for field in found.table.schema} == {
        "text": "string",
        "count": "int64",
        "share": "double",
        "good": "bool",
        "mixed": "string",
        "list": "string",
        "large": "string",
        "none": "string",
    }
    assert found.table.to_pylist()[0]["large"] == str(2**70)
    assert found.table.to_pylist()[1] == {
        "text": "b",
        "count": None,
        "share": 0.5,
        "good": None,
        "mixed": '"x"',
        "list": '{"a": "ü"}',
        "large": None,
        "none": None,
    }


def test_a_bad_row_is_an_error_of_its_own(tmp_path: Path) -> None:
    lines = tmp_path / "rows.jsonl"
    lines.write_bytes(b'{"text": "a"}\n[1]\n{"text": "\\ud800"}\n{"text": "\xff"}\n{"text": NaN}\n{"text": "b"}\n')
    found = values(lines, 2)
    assert [found[0], found[-1]] == [{"text": "a"}, {"text": "b"}]
    assert [str(error).rpartition(": ")[0] for error in found[1:-1]] == [
        "row 2",
        *(f"row {number}: not valid JSON" for number in (3, 4, 5)),
    ]
    table = tmp_path / "rows.csv"
    table.write_text("id,text\n1,a\n2,b,c\n3,d\n")
    first, error, last = values(table, 2)
    assert (first, last) == ({"text": "a"}, {"text": "d"})
    assert str(error) == "row 2: 3 fields where the header names 2"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"text\nb\n", r"a\.jsonl: first row: not valid JSON: "),
        ("a.jsonl", b"[1]\n", r"a\.jsonl: first row: expected an object with named fields, found list$"),
        ("a.jsonl", b'{"t": 1}\n', r"a\.jsonl: no column 'text'; found columns: t; name one with --column$"),
        ("a.csv", b"text,text\n", r"a\.csv: first row: expected a header of distinct column names"),
        ("a.csv", b'id,text\n1,a\n2,"b\n', r"a\.csv: not valid CSV before byte 17: unexpected end of data"),
        ("a.csv", b"id,text\n1,a\n2,\xff\n", r"a\.csv: not valid UTF-8"),
        ("a.parquet", b"PAR1", r"a\.parquet: not a readable Parquet file: "),
    ],
)
def test_a_file_that_is_not_readable_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(parts(str(tmp_path / name), "text", 2))


def test_a_folder_gives_the_files_of_known_formats(tmp_path: Path) -> None:
    for name in ("b.csv", "a.parquet", "sub/c.jsonl", ".hidden.csv", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert source_files(str(tmp_path)) == [str(tmp_path / name) for name in ("a.parquet", "b.csv", "sub/c.jsonl")]
    with pytest.raises(InputError, match=r"README\.md: \.md: not a format of batch inference; allowed: \.jsonl"):
        source_files(str(tmp_path / "README.md"))
    with pytest.raises(InputError, match=r"^nowhere: no such file, and no folder with files; check the name$"):
        source_files("nowhere")
