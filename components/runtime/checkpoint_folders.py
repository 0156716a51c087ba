"""Folders of resumable checkpoints: one for each stage and digest of its inputs.

A folder is removed when dvc.lock holds the result that was trained in it: a finished stage that was killed before DVC
had stored its outputs ends again without a step. Of each stage the last two folders are kept, in the order in which
they were used; the clock, which may step backwards, decides nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from components.config.params import InputError
from components.config.paths import Paths
from components.runtime.files import remove, write_text
from components.runtime.process import file_lock

MAX_FOLDERS = 2
_SUFFIX = ".history.json"
_LOCK_FILES = ("dvc.lock", "data/improve/dvc.lock")


@dataclass
class CheckpointFolder:
    """The folder of one stage and digest of inputs."""

    key: str
    finished: bool = False
    """Whether the stage ended with a result."""
    lock_before: str = ""
    """Digest of the stage's entry in dvc.lock when it ended; DVC's commit changes it."""
    metrics: str = ""
    """MD5 of the metrics that it wrote, as dvc.lock states it; empty without metrics."""
    seconds: float = 0.0
    """Time of all its runs, those that were killed left out."""


@dataclass
class History:
    """What is known of a stage's runs: `stages/NAME.history.json` in the state folder."""

    name: str
    paths: Paths
    seconds: float | None = None
    """Time that the last result took."""
    folders: list[CheckpointFolder] = field(default_factory=list)
    """Last used first."""

    @classmethod
    def read(cls, name: str, paths: Paths) -> History:
        """The history of a stage; empty where it never ran here."""
        try:
            saved = json.loads((paths.home / "stages" / f"{name}{_SUFFIX}").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls(name, paths)
        return cls(name, paths, saved["seconds"], [CheckpointFolder(**entry) for entry in saved["folders"]])

    def write(self) -> None:
        saved = {"seconds": self.seconds, "folders": [asdict(entry) for entry in self.folders]}
        write_text(self.paths.home / "stages" / f"{self.name}{_SUFFIX}", json.dumps(saved))

    def open(self, key: str, afresh: bool) -> Path:
        """The folder for these inputs, which becomes the last used; `afresh` removes what is in it."""
        known = [entry for entry in self.folders if entry.key == key and not afresh]
        entry = CheckpointFolder(key, seconds=known[0].seconds if known else 0.0)
        self.folders = [entry, *(other for other in self.folders if other.key != key)][:MAX_FOLDERS]
        folder = self._folder(key)
        if afresh:
            remove(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for other in folder.parent.iterdir():
            if other.name not in [entry.key for entry in self.folders]:
                remove(other)
        self.write()
        return folder

    def ended(self, seconds: float, finished: bool) -> None:
        """Record a run of the last used folder's inputs."""
        entry = self.folders[0]
        entry.seconds += seconds
        if finished:
            locked, metrics = _locked(self.name, self.paths), self.paths.metrics / f"{self.name}.json"
            entry.finished, entry.lock_before = True, _digest(locked)
            entry.metrics = hashlib.md5(metrics.read_bytes()).hexdigest() if metrics.is_file() else ""
            self.seconds = entry.seconds
        with suppress(InputError):  # a full disk: what the stage ended with counts, and its checkpoints stay
            self.write()

    def remove_committed(self, last: bool) -> None:
        """Remove the folders whose result dvc.lock holds; that of the last used for certain, if `last`."""
        finished = [entry for entry in self.folders if entry.finished]
        if not finished:
            return
        locked = _locked(self.name, self.paths)
        md5s = {out.get("md5") for out in locked.get("outs", [])}
        for entry in finished:
            is_committed = entry.lock_before != _digest(locked) and (not entry.metrics or entry.metrics in md5s)
            if is_committed or (last and entry is self.folders[0]):
                os.sync()  # DVC does not: after a power cut, either the checkpoints are there or the result is
                self.folders = [other for other in self.folders if other is not entry]
                remove(self._folder(entry.key))
        self.write()

    def _folder(self, key: str) -> Path:
        return checkpoint_folder(self.name, key, self.paths)


def checkpoint_folder(name: str, key: str, paths: Paths) -> Path:
    """The folder of one stage and digest of inputs."""
    return paths.home / "checkpoints" / name / key


def finished_checkpoints(name: str, home: Path) -> set[Path]:
    """The files by which the checkpoints of a stage are known to be whole, of all its trainings and inputs."""
    folder = home / "checkpoints" / name
    return {*folder.glob("**/step-*.safetensors"), *folder.glob("**/step-*-shards/commit.json")}


def remove_committed(paths: Paths, committed: str = "") -> None:
    """Remove the checkpoints of every stage whose result dvc.lock holds, as that of the stage `committed` just did.

    Those of a running stage stay.
    """
    for path in sorted((paths.home / "stages").glob(f"*{_SUFFIX}")):
        name = path.name.removesuffix(_SUFFIX)
        with suppress(InputError), file_lock(path.parent, name):
            History.read(name, paths).remove_committed(last=name == committed)


def copy_lock_files(paths: Paths) -> None:
    """Copy DVC's lock files into the state folder while a stage runs, and so while DVC writes none.

    `dvc repro` by hand writes them in place, and tears them when it is killed meanwhile.
    """
    for name in _LOCK_FILES:
        if (paths.root / name).is_file():
            copy = _copy_of(name, paths)
            copy.parent.mkdir(parents=True, exist_ok=True)
            write_text(copy, (paths.root / name).read_text(encoding="utf-8"))


def restore_lock_files(paths: Paths) -> list[str]:
    """Replace torn lock files by their copies; returns their names. The caller holds DVC's lock."""
    restored = []
    for name in _LOCK_FILES:
        file, copy = paths.root / name, _copy_of(name, paths)
        if not copy.is_file() or not file.is_file():
            continue
        try:
            is_torn = not yaml.load(file.read_text(encoding="utf-8"), yaml.CSafeLoader)
        except (yaml.YAMLError, UnicodeDecodeError):
            is_torn = True
        if is_torn:
            write_text(file, copy.read_text(encoding="utf-8"))
            restored.append(name)
    return restored


def _copy_of(name: str, paths: Paths) -> Path:
    return paths.home / "stages" / name.replace("/", "-")


def _locked(name: str, paths: Paths) -> dict[str, Any]:
    """The stage's entry in dvc.lock; empty where there is none, or where the file cannot be read."""
    for file in _LOCK_FILES:
        with suppress(FileNotFoundError, yaml.YAMLError):
            text = (paths.root / file).read_text(encoding="utf-8")
            stages = (yaml.load(text, yaml.CSafeLoader) or {}).get("stages", {})
            if name in stages:
                entry: dict[str, Any] = stages[name]
                return entry
    return {}


def _digest(entry: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()
