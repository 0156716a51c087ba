"""Files and folders that are written as a whole or not at all, also when the process is killed meanwhile."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.config.paths import writing


def write_text(path: Path, text: str) -> None:
    """Replace a file's content in one step; its permissions stay, and a link stays a link.

    Raises: InputError when the disk refuses.
    """
    target = path.resolve()
    scratch = target.with_name(f".{target.name}.new")
    try:
        with writing(path):
            scratch.write_text(text, encoding="utf-8")
            if target.exists():
                shutil.copymode(target, scratch)
            scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)


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


def remove(path: Path) -> None:
    """Remove a file, link or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
