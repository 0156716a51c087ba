"""Where a project may lie, and what the disk's refusals and git's are told as."""

from __future__ import annotations

import errno
import shutil
import sqlite3
import subprocess
from pathlib import Path

import pytest

from components.config.params import InputError
from components.config.paths import Paths, disk_trouble
from components.runtime.process import git


@pytest.mark.parametrize("sign", ["?", "\n"])
def test_a_state_folder_that_no_address_can_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sign: str
) -> None:
    monkeypatch.setenv("LOOPWRIGHT_HOME", f"{tmp_path}/what{sign}")
    with pytest.raises(InputError, match=r"LOOPWRIGHT_HOME: .*; choose a path without it"):
        _ = Paths(tmp_path).home


def chained(cause: Exception) -> Exception:
    error = RuntimeError("wrapped")
    error.__cause__ = cause
    return error


FULL = "cannot be written: No space left on device; free space there"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), f"/a/b: {FULL}"),
        (OSError(errno.ENOSPC, "Error writing bytes to file"), f"/place: {FULL}"),
        (
            OSError(errno.EROFS, "Read-only file system", "/a", None, "/b"),
            "/b: cannot be written: Read-only file system; make it writable",
        ),
        (PermissionError(errno.EACCES, "no", "/a"), "/a: Permission denied; give this user access"),
        (shutil.Error([("/a", "/b", "[Errno 28] No space left on device: '/b'")]), f"/b: {FULL}"),
        (chained(sqlite3.OperationalError("database or disk is full")), f"/place: {FULL}"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/a"), ""),
        (PermissionError(errno.EPERM, "no connection"), ""),
        (ValueError("no space"), ""),
    ],
)
def test_what_the_disk_refuses_is_one_line(error: Exception, told: str) -> None:
    assert disk_trouble(error, Path("/place")) == told


def test_git_is_told_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match='git: this folder is no git clone; run "git init"'):
        git(tmp_path, "rev-parse", "HEAD")
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    with pytest.raises(InputError, match="git: nothing is committed yet; commit"):
        git(tmp_path, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    with pytest.raises(InputError, match=r"git: detected dubious ownership in repository at .*safe\.directory"):
        git(tmp_path, "rev-parse", "HEAD")
