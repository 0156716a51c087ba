"""Files made to fill the memory are refused in one line, before they do."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.config.errors import InputError
from components.datasets import file_limits, records
from components.datasets.chunks import read_text
from components.datasets.importers import Columns, add
from components.datasets.records import read_csv, read_json, read_parquet
from components.runtime.process import limited_to


def test_a_parquet_whose_pages_decompress_to_far_more_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.parquet"
    writer = pq.ParquetWriter(path, pa.schema([("text", pa.string())]), compression="zstd", use_dictionary=False)
    writer.write_table(pa.table({"text": ["a" * 1_000_000] * 300}))
    writer.close()
    assert path.stat().st_size < 1_000_000
    with pytest.raises(InputError, match=r"bomb.parquet: column text: [0-9,]+ bytes decompress to 300,\d+,\d+; write"):
        list(read_parquet(path))


def test_one_long_text_in_many_rows_is_in_memory_once(tmp_path: Path) -> None:
    path = tmp_path / "repeated.parquet"
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), pa.array(["a" * 4_000_000]))
    pq.write_table(pa.table({"text": text, "number": list(range(100_000))}), path, store_schema=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = read_parquet(path)
    values = next(rows).values
    rows.close()
    assert (len(values["text"]), values["number"]) == (4_000_000, 0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 256 * 4_000_000 / 4  # a batch of copies would be 1 GB


def test_a_line_without_end_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_limits, "MAX_LINE_CHARACTERS", 1000)
    path = tmp_path / "long.jsonl"
    path.write_text('{"text": "short"}\n{"text": "' + "a" * 1000 + '"}\n')
    with pytest.raises(InputError, match=r"long.jsonl:2: a line of more than 1,000 characters; split the file"):
        list(read_json(path))


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_nesting_is_refused_in_one_line(tmp_path: Path, opening: str) -> None:
    path = tmp_path / "deep.jsonl"
    path.write_text('{"text": ' + opening * 200_000 + "\n")
    with pytest.raises(InputError, match=r"nested too deep|not valid JSON"):
        list(read_json(path))


def test_a_parquet_with_far_more_rows_than_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": pa.nulls(1_000_000, pa.string())}), path)
    with pytest.raises(InputError, match=r"rows.parquet: 1,000,000 rows in [0-9,]+ bytes; give a file with a text per"):
        next(read_parquet(path))


def test_a_text_of_one_line_is_read_in_time_that_grows_with_its_length(tmp_path: Path) -> None:
    path = tmp_path / "line.txt"
    path.write_text("word " * 12_000_000)
    began = time.process_time()
    rows = sum(1 for _ in read_text(path, 8192))
    assert rows == pytest.approx(12_000_000 * 5 / 8192, rel=0.1)
    assert time.process_time() - began < 20  # slicing the rest for each piece would copy 200 GB


def test_a_field_of_csv_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_LINE_CHARACTERS", 1000)
    path = tmp_path / "open.csv"
    path.write_text('text,label\nshort,a\n"' + "long\n" * 1000)
    with pytest.raises(InputError, match=r"open.csv:\d+: not valid CSV: field larger than field limit \(1000\)"):
        list(read_csv(path))


def test_what_takes_too_long_is_interrupted_in_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 1_000_000, pa.int32()), pa.array(["a" * 4_000_000]))
    table = pa.table({"text": text, "id": [str(number) for number in range(1_000_000)]})
    pq.write_table(table, tmp_path / "repeated.parquet", store_schema=False)  # would be written as 4 TB
    columns, message = Columns(source="text", target="id"), "repeated.parquet: takes more than 1 s; check it, or raise"
    with pytest.raises(InputError, match=message), limited_to(1, "repeated.parquet"):
        add("text_pairs", [tmp_path / "repeated.parquet"], "pairs", tmp_path / "added", columns)
    assert not list((tmp_path / "added").iterdir())
