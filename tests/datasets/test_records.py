"""Records: every format is read incrementally, and errors name their location."""

from __future__ import annotations

import hashlib
import json
import re
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features, Json, Value

from components.config.params import InputError
from components.datasets import records
from components.datasets.records import inspect, read_csv, read_json, read_parallel, read_parquet


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
def test_unreadable_file_is_reported_with_line_and_byte(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        inspect(written(tmp_path / "a.txt", content))


def test_missing_file_and_folder_are_distinguished(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no\.txt: not found; check the name"):
        inspect(tmp_path / "no.txt")
    with pytest.raises(InputError, match="a folder; name the files in it"):
        inspect(tmp_path)
    with pytest.raises(InputError, match="cannot be read: File name too long"):
        inspect(tmp_path / ("x" * 300))


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
    assert read[0].location == "a.json: row 1 (line 2)"
    assert read[2].location == "a.json: row 3 (line 10)"


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
def test_broken_json_is_reported_with_its_line(tmp_path: Path, name: str, content: str, message: str) -> None:
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
    assert [record.location for record in read] == ["a.csv:3", "a.csv:4"]


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
        ("\ufeff", r"a\.csv:1: expected a header of distinct column names"),
        ("a,a\n1,2\n", r"a\.csv:1: expected a header of distinct column names, found 'a', 'a'"),
        ('a,b\n"open,2\n', r"a\.csv:\d: not valid CSV: unexpected end of data"),
        ('a,b\n"x"y,2\n', r"a\.csv:2: not valid CSV: ',' expected after '\"'"),
    ],
)
def test_csv_that_does_not_fit_its_header_is_reported(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(read_csv(written(tmp_path / "a.csv", content)))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "A.JSON"])
def test_json_numbers_of_any_length_are_read(tmp_path: Path, name: str) -> None:
    digits = "9" * 6000
    content = f'[{{"text": "a",\n "n": {digits}}}]' if name != "a.jsonl" else f'{{"text": "a", "n": {digits}}}'
    (record,) = read_json(written(tmp_path / name, content))
    assert record.values == {"text": "a", "n": Decimal(digits)}


def test_json_object_over_several_lines_is_read_whatever_the_case_of_its_suffix(tmp_path: Path) -> None:
    assert [record.values for record in read_json(written(tmp_path / "A.JSON", '{\n"text": "a"\n}'))] == [{"text": "a"}]


def test_deep_first_line_of_json_is_reported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nested too deep"):
        list(read_json(written(tmp_path / "a.json", '{"a":' * 100_000)))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('text,"label (a; b; c)"\n"x; y",a\nz,b\n', [{"text": "x; y", "label (a; b; c)": "a"}, "z"]),
        ('text,"label (a; b)"\nx,"a; b"\nz,"c; d"\n', [{"text": "x", "label (a; b)": "a; b"}, "z"]),
        ('text;"label, or\tclass"\nx,y;a\nz;b\n', [{"text": "x,y", "label, or\tclass": "a"}, "z"]),
        ("text;label, or class\nx;a\nz;b\n", [{"text": "x", "label, or class": "a"}, "z"]),
        ('"text, raw"\n"x, y"\nz\n', [{"text, raw": "x, y"}, "z"]),
        ("text\nx; y\nz\n", [{"text": "x; y"}, "z"]),
    ],
)
def test_csv_separator_is_chosen_by_rows_not_by_characters(tmp_path: Path, content: str, expected: list[Any]) -> None:
    first, second = (record.values for record in read_csv(written(tmp_path / "a.csv", content)))
    assert (first, next(iter(second.values()))) == tuple(expected)


def test_csv_that_two_separators_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.csv:1: ',' and ';' both separate its rows; put fields"):
        list(read_csv(written(tmp_path / "a.csv", "width,cm;height,cm\n1,5;2,5\n3,5;4,5\n")))


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('text\tn\n"quoted"\t1\n"a\tb ""c"""\t2\n', ["quoted", 'a\tb "c"']),
        ('text\tn\n"line\nbreak"\t1\n', ["line\nbreak"]),
        ('text\tn\n"Hi," he said.\t1\n"Oh\t2\n', ['"Hi," he said.', '"Oh']),
        ('text\tn\n5" pipe\t1\n', ['5" pipe']),
        ("text, raw\nHello, you\n", ["Hello, you"]),
    ],
)
def test_tsv_quotes_enclose_fields_unless_each_line_is_a_row(tmp_path: Path, content: str, texts: list[str]) -> None:
    read = [record.values for record in read_csv(written(tmp_path / "a.TSV", content))]
    assert [next(iter(values.values())) for values in read] == texts


def test_tsv_lines_that_a_quote_would_join_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.tsv:3: a quote joins it to the line below, and each is a row by itself"):
        list(read_csv(written(tmp_path / "a.tsv", 'text\tn\nx\t1\n"A\t2\nB"\t3\n')))


def test_parallel_lines_end_with_line_feeds_alone(tmp_path: Path) -> None:
    source, target = written(tmp_path / "a.en", "one\rtwo\r\nthree\n"), written(tmp_path / "a.de", "eins zwei\ndrei\n")
    assert [tuple(record.values.values()) for record in read_parallel(source, target)] == [
        ("one\rtwo", "eins zwei"),
        ("three", "drei"),
    ]


def parquet(path: Path, rows: list[Any], schema: pa.Schema | None = None) -> list[dict[str, Any]]:
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return [record.values for record in read_parquet(path)]


def test_parquet_fields_that_a_row_does_not_have_are_left_out(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"a": {"x": 1, "of": {"deep": [1, None]}}, "n": None},
        {"a": {"y": "b", "of": {}}, "n": 1},
        {"a": None, "n": 2},
    ]
    assert parquet(tmp_path / "a.parquet", rows) == rows


def test_parquet_maps_are_objects(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"m": [(1, [("a", None)]), (2, [])]}, {"m": []}]
    kind = pa.map_(pa.int64(), pa.map_(pa.string(), pa.string()))
    schema = pa.schema([("m", kind)])
    read = parquet(tmp_path / "a.parquet", rows, schema)
    assert read == [{"m": {"1": {"a": None}, "2": {}}}, {"m": {}}]
    twice = pa.schema([("m", pa.map_(pa.string(), pa.string()))])
    with pytest.raises(InputError, match=r"a\.parquet: row 1: .*a map holds a key twice"):
        parquet(tmp_path / "a.parquet", [{"m": [("a", "1"), ("a", "2")]}], twice)


def test_parquet_values_that_json_lacks_are_text(tmp_path: Path) -> None:
    fields: list[tuple[str, pa.DataType]] = [
        ("at", pa.timestamp("us", "UTC")),
        ("nanos", pa.timestamp("ns")),
        ("day", pa.date32()),
        ("long", pa.duration("s")),
        ("price", pa.decimal128(10, 2)),
        ("whole", pa.decimal128(30, 0)),
        ("exact", pa.decimal128(38, 30)),
        ("text", pa.binary()),
        ("bytes", pa.binary()),
        ("uuid", pa.uuid()),
    ]
    schema = pa.schema(fields)
    row = {
        "at": datetime(2024, 5, 1, 9, 30, tzinfo=UTC),
        "nanos": 1,
        "day": date(2024, 5, 1),
        "long": timedelta(hours=1),
        "price": Decimal("12.50"),
        "whole": Decimal(10**29),
        "exact": Decimal("0." + "1" * 30),
        "text": "ü".encode(),
        "bytes": b"\xff",
        "uuid": bytes(range(16)),
    }
    assert parquet(tmp_path / "a.parquet", [row], schema) == [
        {
            "at": "2024-05-01T09:30:00+00:00",
            "nanos": "1970-01-01T00:00:00.000000001",
            "day": "2024-05-01",
            "long": "PT1H",
            "price": 12.5,
            "whole": 10**29,
            "exact": "0." + "1" * 30,
            "text": "ü",
            "bytes": b"\xff",
            "uuid": "00010203-0405-0607-0809-0a0b0c0d0e0f",
        }
    ]


def test_parquet_date_that_python_cannot_hold_is_reported_with_its_row(tmp_path: Path) -> None:
    schema = pa.schema([("at", pa.timestamp("s"))])
    with pytest.raises(InputError, match=r"^a\.parquet: row 2: not a readable Parquet file: [^\n]*$"):
        parquet(tmp_path / "a.parquet", [{"at": 0}, {"at": 2**50}], schema)


def test_parquet_of_datasets_is_read_as_datasets_reads_it(tmp_path: Path) -> None:
    features = Features(
        {
            "label": ClassLabel(names=["no", "yes"]),
            "data": {"label": ClassLabel(names=["a", "b"]), "n": Value("int64")},
            "arguments": Json(),
        }
    )
    rows = [
        {"label": 1, "data": {"label": 0, "n": 1}, "arguments": {"a": None}},
        {"label": -1, "data": {"label": 1, "n": 0}, "arguments": [1]},
    ]
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "a.parquet")
    assert [record.values for record in read_parquet(tmp_path / "a.parquet")] == [
        {"label": "yes", "data": {"label": "a", "n": 1}, "arguments": {"a": None}},
        {"label": None, "data": {"label": "b", "n": 0}, "arguments": [1]},
    ]


@pytest.mark.parametrize("metadata", [b"{oh", b"[]", b'{"info": {"features": {"n": {"_type": "ClassLabel"}}}}'])
def test_parquet_metadata_that_says_nothing_is_passed_over(tmp_path: Path, metadata: bytes) -> None:
    schema = pa.schema([("n", pa.int64())], {b"huggingface": metadata})
    assert parquet(tmp_path / "a.parquet", [{"n": 1}], schema) == [{"n": 1}]


def test_parquet_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table([pa.array([1]), pa.array([2])], names=["a", "a"]), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet: expected a header of distinct column names, found 'a', 'a'"):
        list(read_parquet(tmp_path / "a.parquet"))


def test_parquet_is_read_with_nested_columns(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": "a", "meta": {"tags": ["x", "y"]}}, {"text": None, "meta": None}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    read = list(read_parquet(tmp_path / "a.parquet"))
    assert [record.values for record in read] == rows
    assert read[1].location == "a.parquet: row 2"


@pytest.mark.parametrize("content", [b"PAR1 and then nothing", b"text\nno parquet at all\n"])
def test_file_that_is_no_parquet_is_reported(tmp_path: Path, content: bytes) -> None:
    path = written(tmp_path / "a.parquet", content)
    with pytest.raises(InputError, match=re.escape("a.parquet: not a readable Parquet file: ")):
        list(read_parquet(path))
