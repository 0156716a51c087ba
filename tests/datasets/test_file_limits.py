"""Files made to fill the memory are refused in one line, before they do."""

from __future__ import annotations

import resource
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.config.errors import InputError
from components.datasets import file_limits
from components.datasets.records import read_json, read_parquet


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
