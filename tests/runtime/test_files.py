"""Files and folders are there as a whole or as they were, whatever interrupts the write."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from components.runtime.files import copy_folder, remove, write_text


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
