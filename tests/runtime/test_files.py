"""Files and folders are there as a whole or as they were, whatever interrupts the write."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from components.config.paths import Paths
from components.runtime.files import copy_folder, keep_private, remove, scratch_folder, write_text

SOURCE = Path(__file__).parents[2]


def test_a_text_replaces_the_content_and_nothing_else(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("before")
    file.chmod(0o640)
    link.symlink_to(file)
    write_text(link, "after ä")
    assert link.is_symlink()
    assert file.read_text(encoding="utf-8") == "after ä"
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_leftovers_of_killed_writers_go_with_the_next_write(tmp_path: Path) -> None:
    file = tmp_path / "[a].yaml"
    left, recent, other = (tmp_path / name for name in (".[a].yaml.7.tmp", ".[a].yaml.8.tmp", ".a.yaml.7.tmp"))
    for path in (left, recent, other):
        path.write_text("half")
    os.utime(left, (0, 0))
    os.utime(other, (0, 0))
    write_text(file, "whole")
    assert sorted(tmp_path.iterdir()) == sorted([file, recent, other])


def test_a_write_that_fails_leaves_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("before")

    def fail(self: Path, target: Path) -> None:
        raise InterruptedError

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(InterruptedError):
        write_text(file, "after")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_a_copied_folder_replaces_another_or_a_link_and_leftovers(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "models" / "folder"
    (source / "part").mkdir(parents=True)
    (source / "part" / "file").write_text("content")
    copy_folder(source, folder)
    (folder / "old").touch()
    leftover = folder.with_name(".folder.loopwright-new")
    leftover.mkdir()
    copy_folder(source, folder, {"note.json": {"a": 1}})
    assert sorted(path.name for path in folder.iterdir()) == ["note.json", "part"]
    assert json.loads((folder / "note.json").read_text()) == {"a": 1}
    assert not leftover.exists()
    remove(folder)
    folder.symlink_to(source)
    copy_folder(source, folder)
    assert not folder.is_symlink()
    assert (source / "part" / "file").exists()


def test_a_copy_that_fails_leaves_the_folder(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "folder"
    source.mkdir()
    folder.mkdir()
    (folder / "old").touch()
    with pytest.raises(TypeError):
        copy_folder(source, folder, {"note.json": object()})
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "old", "source"]


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_a_state_folder_that_others_may_read_is_narrowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOOPWRIGHT_HOME", raising=False)
    home, outside = tmp_path / "var", tmp_path / "outside"
    (home / "dvc").mkdir(parents=True)
    (home / "dvc").chmod(0o777)
    outside.touch(0o644)
    (home / "link").symlink_to(outside)
    (home / "feedback.db").touch()
    keep_private(Paths(tmp_path))
    (home / "later").touch()
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (home, *home.iterdir())}
    assert modes == {"var": 0o700, "dvc": 0o700, "feedback.db": 0o600, "later": 0o600, "link": 0o644}


@pytest.mark.usefixtures("umask")
def test_a_state_folder_around_the_project_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOPWRIGHT_HOME", "..")
    tmp_path.chmod(0o755)
    (tmp_path / "project").mkdir()
    keep_private(Paths(tmp_path / "project"))
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


def test_a_file_is_the_old_or_the_new_whenever_the_writer_is_killed(tmp_path: Path) -> None:
    """A process replaces a file as fast as it can, and is killed."""
    file, texts = tmp_path / "file", ["a" * 300_000, "b" * 300_000]
    program = f"""
from pathlib import Path
from components.runtime.files import write_text
print("on", flush=True)
while True:
    for letter in "ab":
        write_text(Path({str(file)!r}), letter * 300_000)
"""
    for number in range(4):
        command = [sys.executable, "-c", program]
        with subprocess.Popen(command, cwd=SOURCE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            while not file.exists():
                assert process.poll() is None
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.01 * number)
            process.kill()
        assert file.read_text() in texts


HOLDER = """
import sys, time
from pathlib import Path
from components.runtime.files import scratch_folder
with scratch_folder(Path(sys.argv[1]), "download") as folder:
    (folder / "large").write_bytes(bytes(1000))
    print(folder, flush=True)
    time.sleep(600)
"""


def test_scratch_folders_are_gone_afterwards_and_those_of_killed_processes_with_the_next(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        left = Path(holder.stdout.readline().strip())
        with scratch_folder(tmp_path, "validate") as folder:
            assert folder.parent == left.parent == tmp_path / "scratch"
            assert not [*folder.iterdir()]
            assert (left / "large").exists(), "its process lives"
        holder.kill()
    with scratch_folder(tmp_path, "validate"):
        assert not left.exists()
    assert not [*left.parent.iterdir()]
