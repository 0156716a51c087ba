"""Model files of a registry on a server: downloaded once for all processes of a state folder, and verified."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from components.config.errors import InputError, Unavailable
from components.config.secrets import hidden
from components.runtime.files import remove
from components.runtime.process import file_lock
from components.tracking.mlflow_requests import errors, transfer

ATTEMPTS = 4
PAUSE_SECONDS = 1.0
"""Before the second attempt; doubled before each later one."""
_LOCK_SECONDS = 3600.0
"""Longest wait for another process that downloads the same files."""


def model_folder(folder: Path) -> Path:
    """The model folder within an MLflow model (pyfunc)."""
    return next((folder / "data").iterdir())


def local_copy(target: Path, name: str, download: Callable[[str], str], verify: Callable[[Path], None]) -> Path:
    """`target`, with the MLflow model that `download` puts into a folder, and whose model folder `verify` accepts.

    A copy from before that `verify` refuses, because it is another server's or was damaged, is replaced.

    Raises: Unavailable when every attempt fails, InputError when `verify` refuses what the last one downloaded.
    """
    try:
        with file_lock(target.parent, target.name, _LOCK_SECONDS):
            if not _is_verified(target, verify):
                _download(target, name, download, verify)
    except Unavailable:
        raise
    except OSError as error:
        raise Unavailable(f"{name}: {target}: cannot be written: {error}; free some space") from error
    return target


def _is_verified(folder: Path, verify: Callable[[Path], None]) -> bool:
    try:
        verify(model_folder(folder))
    except (InputError, OSError):
        return False
    return True


def _download(target: Path, name: str, download: Callable[[str], str], verify: Callable[[Path], None]) -> None:
    scratch = target.with_name(f"{target.name}.part")
    failure: Exception | None = None
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
        remove(scratch)
        scratch.mkdir(parents=True)
        try:
            with transfer():
                folder = Path(download(str(scratch)))
            verify(model_folder(folder))
        except errors() as error:
            failure = error
            continue
        remove(target)
        os.replace(folder, target)
        remove(scratch)
        return
    remove(scratch)
    if isinstance(failure, InputError) and not isinstance(failure, Unavailable):
        raise failure
    reason = " ".join(hidden(str(failure)).split())[:300]
    raise Unavailable(f"{name}: cannot be downloaded: {reason}; it is tried again at the next use") from failure
