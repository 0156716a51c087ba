"""Files at addresses are read as local ones, and their copies are gone afterwards."""

import re
from pathlib import Path

import fsspec
import pytest

from components.config.params import InputError
from components.runtime.object_store import local_files
from tests.servers import s3_server


def test_addresses_become_local_files_of_their_names(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    store.pipe_file("/bucket/a/notes.jsonl", b"first")
    store.pipe_file("/bucket/b/notes.jsonl", b"second")
    names = ["memory://bucket/a/notes.jsonl", str(tmp_path / "own.md"), "memory://bucket/b/notes.jsonl"]
    with local_files(names, tmp_path) as files:
        assert [file.name for file in files] == ["notes.jsonl", "own.md", "notes.jsonl"]
        assert files[1] == tmp_path / "own.md"
        assert [files[0].read_bytes(), files[2].read_bytes()] == [b"first", b"second"]
        assert files[0].is_relative_to(tmp_path), "not in /tmp, which may be memory"
    assert not files[0].exists()


@pytest.mark.parametrize("ending", ["", "/", "/*/*.jsonl", "/**/[0-9].jsonl"])
def test_folders_and_patterns_become_their_files(ending: str, tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    for name in ("a/1.jsonl", "b/2.jsonl", "_SUCCESS", "a/.1.jsonl.crc", "_temporary/3"):
        store.pipe_file(f"/corpus/{name}", name.encode())
    with local_files([f"memory://corpus{ending}"], tmp_path) as files:
        assert [file.read_bytes() for file in files] == [b"a/1.jsonl", b"b/2.jsonl"]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("memory://bucket/none.jsonl", r"^memory://bucket/none\.jsonl: no such file, and no folder with files; check"),
        ("memory://bucket/*.parquet", r"^memory://bucket/\*\.parquet: no such file, and no folder with files; check"),
        ("nowhere://bucket/a.jsonl", r"^nowhere://bucket/a\.jsonl: .*; name a folder, or an address such as s3://"),
    ],
)
def test_addresses_without_a_file_are_refused(address: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message), local_files([address], tmp_path):
        pass


def test_a_prefix_of_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server() as variables:
        for variable, value in variables.items():
            monkeypatch.setenv(variable, value)
        store = fsspec.filesystem("s3", skip_instance_cache=True)
        for name in ("corpus/", "corpus/a/1.jsonl", "corpus/b/2.jsonl", "corpus-of-others/3.jsonl"):
            store.call_s3("put_object", Bucket="dvc", Key=name, Body=name.encode() * (not name.endswith("/")))
        for ending in ("", "/", "/*/*.jsonl"):
            with local_files([f"s3://dvc/corpus{ending}"], tmp_path) as files:
                assert [file.read_bytes() for file in files] == [b"corpus/a/1.jsonl", b"corpus/b/2.jsonl"]
        for address in ("s3://dvc/nothing/", "s3://dvc/nothing/*.jsonl"):
            missing = rf"^{re.escape(address)}: no such file, and no folder with files; check"
            with pytest.raises(InputError, match=missing), local_files([address], tmp_path):
                pass
        with pytest.raises(InputError, match=r"^s3://nowhere/corpus: "), local_files(["s3://nowhere/corpus"], tmp_path):
            pass
