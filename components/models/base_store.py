"""Base models that adapters share: weights in the state folder, by their digest.

An adapter's folder has what a model folder has, except for the weights: `base.json` names those by their digest. They
are in the folder's own `base` (in a Bento), or in the state folder's `base_weights`.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from components.config.params import InputError
from components.config.paths import CONFIG, ORIGIN, Paths, find_root
from components.models.weight_files import ADAPTER_CONFIG, INDEX, weight_files, weights_digest
from components.runtime.files import scratch_folder

BASE = "base.json"
"""In an adapter's folder: the digest of the base's weights, and its source."""
BUNDLED, STORE = "base", "base_weights"
"""The base's folder in an adapter's folder; the folder of all in the state folder."""


@dataclass(frozen=True)
class Base:
    """The model whose weights an adapter leaves as they are."""

    weights_sha256: str
    source: str
    """The registered version, or the folder."""


def is_adapter(folder: Path) -> bool:
    """Whether a model folder has an adapter in place of weights."""
    return (folder / ADAPTER_CONFIG).is_file()


def read_base(folder: Path) -> Base:
    """The base of an adapter's folder.

    Raises: InputError when base.json is missing or damaged.
    """
    try:
        return Base(**json.loads((folder / BASE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{folder / BASE}: does not name the adapter's base: {error}; import it with --base NAME@ALIAS"
        ) from None


def base_folder(folder: Path) -> Path:
    """The folder with the weights of an adapter's base.

    Raises: InputError when they are not on this machine.
    """
    base = read_base(folder)
    places = [folder / BUNDLED]
    for start in (folder, Path.cwd()):
        with suppress(InputError):  # no project there: a Bento, or a folder on its own
            places.append(stored_base(base.weights_sha256, Paths(find_root(start)).home))
    for candidate in places:
        if (candidate / CONFIG).is_file():
            return candidate
    raise InputError(
        f"{folder}: its base {base.source} (weights {base.weights_sha256[:12]}) is not on this machine; import it with"
        ' "loopwright import"'
    )


def stored_base(weights_sha256: str, home: Path) -> Path:
    """Where the state folder has, or would have, the base with these weights."""
    return home / STORE / weights_sha256


def store_base(folder: Path, home: Path, source: str = "", weights_sha256: str = "") -> Base:
    """Share a model folder's weights and configuration as a base, by hard links where the disk has them.

    An adapter's folder shares the base that it has. `source`: the registered version, unless its origin.json says.
    `weights_sha256`: the digest, where it is known.

    Raises: InputError as `weight_files`; OSError when the disk refuses.
    """
    if is_adapter(folder):
        return read_base(folder)
    digest = weights_sha256 or weights_digest(folder)
    if not source and (folder / ORIGIN).is_file():
        origin = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
        source = str(origin.get("version") or origin.get("folder"))
    target = stored_base(digest, home)
    if not (target / CONFIG).is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(home, "base") as scratch:
            part = scratch / digest
            part.mkdir()
            for file in (*weight_files(folder), folder / INDEX, folder / CONFIG):
                if file.is_file():
                    _link(file, part / file.name)
            with suppress(OSError):  # another process was first
                part.rename(target)
    return Base(digest, source or str(folder))


def copy_base(folder: Path, target: Path) -> None:
    """Make an adapter's folder at `target`, which may be the same, complete without the state folder."""
    shutil.copytree(base_folder(folder), target / BUNDLED, copy_function=_link, dirs_exist_ok=True)


def _link(source: Path | str, target: Path | str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
