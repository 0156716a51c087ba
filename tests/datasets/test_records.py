"""Records: every format is read piece by piece, and what cannot be read is said with its place."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.config.params import InputError
from components.datasets import records
from components.datasets.records import inspect, read_csv, read_json, read_parquet


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_digest_is_that_of_the_whole_file(tmp_path: Path) -> None:
    content = "grüße\n".encode() * 30_000
    assert inspect(written(tmp_path / "a.txt", content)) == hashlib.sha256(content).hexdigest()


def test_character_across_two_blocks_is_no_fault(tmp_path: Path) -> None:
    content = b"x" * (records._BLOCK - 1) + "é".encode() + b"\n"
    assert inspect(written(tmp_path / "a.txt", content)) == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"fine\nsecond \xff line", r"a\.txt:2: invalid UTF-8, byte 0xff at offset 12; save the file as UTF-8"),
        ("hällo".encode("latin-1"), r"a\.txt:1: invalid UTF-8, byte 0xe4 at offset 1"),
        ("hello".encode("utf-16"), r"a\.txt:1: invalid UTF-8, byte 0xff at offset 0; it looks like UTF-16"),
        (b"cut \xe2\x82", r"a\.txt:1: invalid UTF-8, byte 0xe2 at offset 4"),
        (b"x" * 65535 + b"\xe2\x82" + b"y" * 10, r"a\.txt:1: invalid UTF-8, byte 0xe2 at offset 65535"),
        (b"\n" * 70_000 + b"\xc0", r"a\.txt:70001: invalid UTF-8, byte 0xc0 at offset 70000"),
        (b"", r"a\.txt: empty file; nothing to add"),
    ],
)
def test_unreadable_file_is_said_with_line_and_byte(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        inspect(written(tmp_path / "a.txt", content))


def test_missing_file_and_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no\.txt: not found; check the name"):
        inspect(tmp_path / "no.txt")
    with pytest.raises(InputError, match="a folder; name the files in it"):
        inspect(tmp_path)


ROWS = [{"text": "a\u2028b", "n": 1}, {"text": "ü 😀", "nested": {"x": [1, "]", "}"]}}, {"text": ""}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("lines.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)),
        ("crlf.jsonl", "\ufeff" + "\r\n".join(json.dumps(row) for row in ROWS) + "\r\n\r\n"),
        ("array.jsonl", json.dumps(ROWS)),
        ("array.json", "\ufeff \n" + json.dumps(ROWS, indent=2)),
        ("tight.json", json.dumps(ROWS, separators=(",", ":"))),
        ("lines.json", "\n".join(json.dumps(row) for row in ROWS)),
        ("one_after_another.json", "\n".join(json.dumps(row, indent=1) for row in ROWS)),
    ],
)
def test_json_is_read_as_array_and_as_lines(tmp_path: Path, name: str, content: str) -> None:
    assert [record.values for record in read_json(written(tmp_path / name, content))] == ROWS


def test_json_array_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "word " * number, "number": number} for number in range(200)]
    path = written(tmp_path / "a.json", json.dumps(rows, indent=1))
    monkeypatch.setattr(records, "_BLOCK", 7)
    read = list(read_json(path))
    assert [record.values for record in read] == rows
    assert read[0].place == "a.json: row 1 (line 2)"
    assert read[2].place == "a.json: row 3 (line 10)"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"text": "x"}\n{"text": "y"\n',
            r"a\.jsonl:2: not valid JSON: Expecting ',' delimiter at column 13",
        ),
        ("a.jsonl", '{"text": "x"}\n"y"\n', r"a\.jsonl:2: expected an object with named fields, found str 'y'"),
        ("a.jsonl", "[" * 100_000 + "\n", r"not readable JSON: nested too deep"),
        ("a.json", '[{"text": "x"},\n {"text": y}]', r"a\.json:2: not valid JSON: Expecting value"),
        ("a.json", '[{"text": "x"},\n {"text": "y"}', r"a\.json:2: not valid JSON: the array is not closed"),
        ("a.json", '[{"text": "x"}\n {"text": "y"}]', r"a\.json:2: not valid JSON: expected ',', found '\{'"),
        ("a.json", '[{"text": "x"}]\n{}', r"a\.json:2: not valid JSON: something follows the closing bracket"),
        ("a.json", '[{"text": "x"}, 7]', r"a\.json: row 2 \(line 1\): expected an object with named fields, found int"),
        ("a.json", '{"text": "x"\n', r"a\.json:2: not valid JSON: Expecting ',' delimiter"),
    ],
)
def test_broken_json_is_said_with_its_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(read_json(written(tmp_path / name, content)))


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_csv_is_read_whatever_separates_it(tmp_path: Path, separator: str) -> None:
    lines = ["text|label", '"a|b ""c""\nsecond"|x', "ü|", ""]
    content = "\ufeff" + "\r\n".join(lines).replace("|", separator)
    read = list(read_csv(written(tmp_path / "a.csv", content)))
    assert [record.values for record in read] == [
        {"text": f'a{separator}b "c"\nsecond', "label": "x"},
        {"text": "ü", "label": ""},
    ]
    assert [record.place for record in read] == ["a.csv:3", "a.csv:4"]


def test_csv_of_one_column_and_very_long_fields_is_read(tmp_path: Path) -> None:
    read = list(read_csv(written(tmp_path / "a.csv", "text\n" + "x" * 300_000 + "\n")))
    assert [len(record.values["text"]) for record in read] == [300_000]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "text\nHello, you\n",
            r"a\.csv:2: 2 fields where the header names 1 \(text\); put fields that hold the separator",
        ),
        ("a,b\nonly\n", r"a\.csv:2: 1 fields where the header names 2 \(a, b\)"),
        ("a,a\n1,2\n", r"a\.csv:1: expected a header of distinct column names, found 'a', 'a'"),
        ('a,b\n"open,2\n', r"a\.csv:\d: not valid CSV: unexpected end of data"),
        ('a,b\n"x"y,2\n', r"a\.csv:2: not valid CSV: ',' expected after '\"'"),
    ],
)
def test_csv_that_does_not_fit_its_header_is_said(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(read_csv(written(tmp_path / "a.csv", content)))


def test_parquet_is_read_with_nested_columns(tmp_path: Path) -> None:
    rows = [{"text": "a", "meta": {"tags": ["x", "y"]}}, {"text": None, "meta": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    read = list(read_parquet(tmp_path / "a.parquet"))
    assert [record.values for record in read] == rows
    assert read[1].place == "a.parquet: row 2"


@pytest.mark.parametrize("content", [b"PAR1 and then nothing", b"text\nno parquet at all\n"])
def test_file_that_is_no_parquet_is_said(tmp_path: Path, content: bytes) -> None:
    path = written(tmp_path / "a.parquet", content)
    with pytest.raises(InputError, match=re.escape("a.parquet: not a readable Parquet file: ")):
        list(read_parquet(path))
