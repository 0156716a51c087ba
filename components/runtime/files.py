"""Files and folders that are written as a whole or not at all, also when the process is killed meanwhile."""

from __future__ import annotations

import glob
import json
import os
import shutil
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from components.config.errors import InputError
from components.config.paths import Paths, writing
from components.runtime.process import file_lock

RESTORING = "restoring"
"""In the state folder while a backup is put into it: the backup's address."""
_SECONDS_TO_WRITE = 600.0
"""Age from which on the new file of an interrupted replacement is a leftover."""
_SECONDS_TO_CLEAN = 600.0
"""For another process to remove the scratch folders of killed ones."""
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def replace_file(path: Path, write: Callable[[IO[bytes]], object], mode: int = 0o666) -> None:
    """Replace a file by what `write` puts into a new one: as a whole, and on disk when this returns.

    After a crash at any instant, of the process or of the machine, the file is the old one or the new one. Its
    permissions stay, and a link stays a link; where there is none, the umask narrows `mode`.

    Raises: OSError when the disk refuses; the file is as it was.
    """
    target = path.resolve()
    scratch = target.with_name(f".{target.name}.{threading.get_native_id()}.tmp")
    exists = target.exists()
    mode = stat.S_IMODE(target.stat().st_mode) if exists else mode
    try:
        with open(scratch, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if exists:
            scratch.chmod(mode)
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)
    # Of writers that were killed; a process of another container, whose id says nothing here, may be writing one now.
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        with suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > _SECONDS_TO_WRITE:
                left.unlink()
    sync(target.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a file's content by `replace_file`.

    Raises: InputError when the disk refuses.
    """
    with writing(path):
        replace_file(path, lambda file: file.write(text.encode()))


def keep_private(paths: Paths) -> None:
    """Let what this process and its children write be readable by its user alone, and all of the state folder.

    A state folder of another user, as a mounted volume may be, stays as it is, with a warning.
    """
    os.umask(0o077)
    home = paths.home
    if not home.is_dir() or not home.stat().st_mode & _OTHERS or paths.root.is_relative_to(home):
        return
    try:
        for path in (*home.iterdir(), home):  # the folder last: a narrowing that was killed is done again
            if not path.is_symlink():
                path.chmod(stat.S_IMODE(path.stat().st_mode) & ~_OTHERS)
    except PermissionError:
        print(f'{home}: others may read it; its owner can run "chmod -R go-rwx"', file=sys.stderr, flush=True)


def check_restored(home: Path) -> None:
    """Raises: InputError where a restoration was interrupted: the state is part old, part restored."""
    with suppress(FileNotFoundError):
        address = (home / RESTORING).read_text(encoding="utf-8")
        remedy = f'run "loopwright restore {address} --force"'
        raise InputError(f"{home}: the restoration of {address} is not done, so it is part old, part new; {remedy}")


def sync(*paths: Path) -> None:
    """fsync files and folders."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def copy_folder(source: Path, folder: Path, notes: Mapping[str, Any] | None = None) -> None:
    """Copy a folder, with `notes` as JSON files in it, to where there is none or one to replace.

    Raises: InputError when the disk refuses.
    """
    scratch = folder.with_name(f".{folder.name}.loopwright-new")
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove(scratch)  # of a process that was killed
        try:
            shutil.copytree(source, scratch)
            for name, value in (notes or {}).items():
                (scratch / name).write_text(json.dumps(value) + "\n", encoding="utf-8")
            remove(folder)
            scratch.replace(folder)
        finally:
            remove(scratch)


@contextmanager
def scratch_folder(home: Path, name: str) -> Iterator[Path]:
    """A folder for large files in the state folder `home`, as /tmp may be memory or small; it is gone afterwards.

    What killed processes left of theirs goes when the next one begins.

    Raises: InputError when the disk refuses.
    """
    parent, own = home / "scratch", f"{name}-{uuid4().hex[:12]}"
    with ExitStack() as stack:
        # While this lock is held, nobody else is between a lock and its folder.
        with writing(parent), file_lock(home / "stages", "scratch", patience=_SECONDS_TO_CLEAN):
            for lock in [*parent.glob("*.lock")]:
                with suppress(InputError), file_lock(parent, lock.stem):
                    remove(parent / lock.stem)
                    lock.unlink(missing_ok=True)
            stack.enter_context(file_lock(parent, own))
            (parent / own).mkdir()
        try:
            yield parent / own
        finally:
            remove(parent / own)
            (parent / f"{own}.lock").unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a file, link or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
