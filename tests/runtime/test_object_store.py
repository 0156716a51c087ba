"""Files at addresses are read as local ones, and their copies are gone afterwards."""

from pathlib import Path

import fsspec
import pytest

from components.config.params import InputError
from components.runtime.object_store import local_files


def test_addresses_become_local_files_of_their_names(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    store.pipe_file("/bucket/a/notes.jsonl", b"first")
    store.pipe_file("/bucket/b/notes.jsonl", b"second")
    names = ["memory://bucket/a/notes.jsonl", str(tmp_path / "own.md"), "memory://bucket/b/notes.jsonl"]
    with local_files(names) as files:
        assert [file.name for file in files] == ["notes.jsonl", "own.md", "notes.jsonl"]
        assert files[1] == tmp_path / "own.md"
        assert [files[0].read_bytes(), files[2].read_bytes()] == [b"first", b"second"]
    assert not files[0].exists()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("memory://bucket/none.jsonl", r"^memory://bucket/none\.jsonl: no such file; name one file, such as s3://"),
        ("nowhere://bucket/a.jsonl", r"^nowhere://bucket/a\.jsonl: .*; name a folder, or an address such as s3://"),
    ],
)
def test_addresses_without_a_file_are_refused(address: str, message: str) -> None:
    with pytest.raises(InputError, match=message), local_files([address]):
        pass
