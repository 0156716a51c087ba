"""`loopwright export`: a registered model out, as a Hugging Face folder."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from components.config.params import InputError
from components.config.paths import Paths, find_root, writing
from loopwright.output import Json, print_json


def export(
    model: Annotated[str, typer.Argument(metavar="NAME@ALIAS", help="Which model; NAME/VERSION works too.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to; must be empty or not there yet.")],
    as_json: Json = False,
) -> None:
    """Copy a registered model to a folder that transformers, vLLM and others load."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: is not an empty folder; choose another, or empty it first")
    from components.tracking.registry import resolve

    version = resolve(model, Paths(find_root()).home)
    copy_whole(version.folder, folder)
    files = sorted(file.name for file in folder.iterdir())
    if as_json:
        print_json({"model": str(version), "folder": str(folder), "files": files})
    else:
        print(f"{version} is in {folder}: {', '.join(files)}")


def copy_whole(source: Path, folder: Path) -> None:
    """Copy a folder so that it appears complete or not at all.

    Raises: InputError when the place cannot be written.
    """
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            copied = Path(scratch) / "copy"
            shutil.copytree(source, copied)
            copied.replace(folder)
