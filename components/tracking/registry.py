"""The model registry: versions of a model, and the aliases champion, challenger and previous.

One write moves the championship: the alias `champion`. What else there is to know follows from what was written before
it: a version's tag `previous` names the champion before it, and counts while that version is champion. The aliases
`previous` and `challenger` are brought in line behind it, for programs that ask MLflow; a process that dies in between
leaves nothing that this module reads wrongly.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from components.agent.saved_tools import check_source, tool_tags
from components.config.params import InputError
from components.runtime.process import file_lock
from components.tracking.mlflow_client import (
    DATABASE,
    connect,
    create_run,
    errors,
    is_missing,
    log_metrics,
    mlflow_name,
    save_pyfunc,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

ALIASES = ("champion", "challenger", "previous")
PREVIOUS = "previous"
"""Tag of a version: the number of the champion before it, or empty; alias of the version that the tag names."""
_MOVE_SECONDS = 60.0
"""A change of aliases waits this long for another one."""


@dataclass(frozen=True)
class ModelVersion:
    """One version of a registered model."""

    name: str
    version: int
    run_id: str
    source: str
    """Where the files are, as `runs:/ID/path`."""
    aliases: tuple[str, ...]
    tags: dict[str, str]
    metrics: dict[str, float]
    created: float
    """Seconds since the epoch."""
    registry: Registry = field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"

    @cached_property
    def folder(self) -> Path:
        """The model folder (Hugging Face format) on this machine; downloaded once when a server keeps it.

        Raises: InputError when the code of its tools is not what was registered.
        """
        folder = next((self.registry.files(self) / "data").iterdir())
        if sha256 := self.tags.get("tools_sha256"):
            check_source(folder, sha256)
        return folder


class Registry:
    """Registered models: versions, and the aliases champion, challenger and previous."""

    def __init__(self, home: Path) -> None:
        self.home = home

    @cached_property
    def client(self) -> MlflowClient:
        return connect(self.home)

    def stamp(self) -> object:
        """Another one after every write to the database on this machine; None where a server keeps it.

        A thousandth of what it costs to ask, for those who wait for an alias to move.
        """
        if os.environ.get("MLFLOW_TRACKING_URI"):
            return None
        files = []
        for name in (DATABASE, f"{DATABASE}-wal"):
            with suppress(FileNotFoundError):
                facts = (self.home / "mlflow" / name).stat()
                files.append((facts.st_ino, facts.st_mtime_ns, facts.st_size))
        return tuple(files)

    def names(self) -> list[str]:
        """Registered models, in order of name."""
        return sorted(model.name for model in self.client.search_registered_models())

    def versions(self, name: str) -> list[ModelVersion]:
        """All versions, newest first.

        Raises: InputError for an unknown name.
        """
        if name not in (names := self.names()):
            raise InputError(f"{name}: no such model in the registry; {_one_of(names)}")
        found = self.client.search_model_versions(f"name = '{name}'")
        aliases = self.aliases(name)
        return [self._version(row, aliases) for row in sorted(found, key=lambda row: -int(row.version))]

    def resolve(self, wanted: str) -> ModelVersion:
        """The version that `NAME@ALIAS`, `NAME/VERSION` or `NAME` (its champion) names.

        Raises: InputError saying what there is.
        """
        found = self.find(wanted)
        if found:
            return found
        versions = self.versions(_parse(wanted)[0])
        there = [known for row in versions for known in (str(row), *(f"{row.name}@{alias}" for alias in row.aliases))]
        raise InputError(f"{wanted}: not in the registry; {_one_of(there)}")

    def find(self, wanted: str) -> ModelVersion | None:
        """`resolve`, or None where there is none."""
        name, version, alias = _parse(wanted)
        aliases = self.aliases(name)
        version = version or str(aliases.get(alias, ""))
        if not version:
            return None
        try:
            row = self.client.get_model_version(name, version)
        except errors() as error:
            if not is_missing(error):
                raise
            return None
        return self._version(row, aliases)

    def aliases(self, name: str) -> dict[str, int]:
        """The version that each alias points at; none for an unknown name."""
        try:
            model = self.client.get_registered_model(name)
        except errors() as error:
            if not is_missing(error):
                raise
            return {}
        aliases = {alias: int(version) for alias, version in model.aliases.items()}
        champion = aliases.get("champion")
        if champion is None:
            return aliases
        tags = self.client.get_model_version(name, str(champion)).tags
        if PREVIOUS in tags:  # versions of earlier releases have the alias alone
            aliases.pop(PREVIOUS, None)
            aliases |= {PREVIOUS: int(tags[PREVIOUS])} if tags[PREVIOUS] else {}
        # No version has two: a challenger that was promoted is one no more, nor is it its own predecessor.
        return {alias: version for alias, version in aliases.items() if alias == "champion" or version != champion}

    def files(self, version: ModelVersion) -> Path:
        """The MLflow model (pyfunc) of a version, as a local folder."""
        run_id, _, path = version.source.removeprefix("runs:/").partition("/")
        stored = f"{self.client.get_run(run_id).info.artifact_uri}/{path}"
        if stored.startswith("file:"):
            folder = Path(unquote(urlparse(stored).path))
            if not (folder / "data").is_dir():
                raise InputError(f"{version}: {folder}: its files are missing; restore the whole state folder")
            return folder
        kept = self.home / "mlflow" / "downloads" / version.name / str(version.version)
        if not kept.is_dir():
            with tempfile.TemporaryDirectory(dir=self.home) as scratch:
                fetched = self.client.download_artifacts(run_id, path, scratch)
                kept.parent.mkdir(parents=True, exist_ok=True)
                os.replace(fetched, kept)
        return kept

    def register(
        self, folder: Path, name: str, metrics: Mapping[str, float], tags: Mapping[str, str], parent: str | None
    ) -> ModelVersion:
        """Store a model folder as a new version of `name`: a run with the metrics, and a pyfunc that predicts."""
        tags = {**tool_tags(folder), **tags}
        run_id = create_run(self.client, f"register {name}", {}, parent, _now())
        try:
            self.log_metrics(run_id, metrics)
            with tempfile.TemporaryDirectory(dir=self.home) as scratch:
                save_pyfunc(folder, Path(scratch) / name)
                self.client.log_artifacts(run_id, str(Path(scratch) / name), name)
        except BaseException:
            # Nobody would ever look for half of a model, which takes the room that was missing.
            shutil.rmtree(self.home / "mlflow" / "artifacts" / run_id, ignore_errors=True)
            with suppress(*errors()):
                self.client.set_terminated(run_id, "FAILED")
            raise
        self.client.set_terminated(run_id)
        if name not in self.names():
            self.client.create_registered_model(name)
        row = self.client.create_model_version(
            name, f"runs:/{run_id}/{name}", run_id, tags={mlflow_name(key): tag for key, tag in tags.items()}
        )
        return self.resolve(f"{name}/{row.version}")

    def log_metrics(self, run_id: str, metrics: Mapping[str, float]) -> None:
        """Add metrics to a version's run."""
        log_metrics(self.client, run_id, [(key, float(value), _now(), 0) for key, value in metrics.items()])

    def tag(self, version: ModelVersion, tags: Mapping[str, str]) -> None:
        """Set tags on a version."""
        self._tag(version.name, version.version, tags)

    def alias(self, name: str, alias: str, version: ModelVersion | None) -> None:
        """Point an alias at a version, or remove it."""
        with self._locked():
            self._point(name, {alias: version.version if version else None})

    def promote(self, version: ModelVersion) -> None:
        """Make a version the champion; the old champion becomes `previous`."""
        with self._locked():
            champion = self.aliases(version.name).get("champion")
            if champion == version.version:
                raise InputError(f"{version}: is the champion already")
            self._crown(version.name, version.version, champion)

    def rollback(self, name: str) -> ModelVersion:
        """Make `previous` the champion again; the champion becomes `previous`.

        Raises: InputError when there is no previous champion.
        """
        if PREVIOUS not in self.aliases(name):
            self.versions(name)
            raise InputError(f'{name}@previous: there is no earlier champion; see "loopwright registry show {name}"')
        with self._locked():
            aliases = self.aliases(name)
            # Its files may still be what the pipeline made last: a run must not promote them again.
            self._tag(name, aliases["champion"], {"rolled_back": "true"})
            self._crown(name, aliases[PREVIOUS], aliases["champion"])
        return self.resolve(f"{name}@champion")

    def demote(self, version: ModelVersion, reason: str) -> bool:
        """Mark a version that fails in service; if it is the champion, the champion before it is champion again.

        False when there is nothing to go back to, or another process was first; the version is marked all the same.
        """
        with self._locked():
            aliases = self.aliases(version.name)
            self._tag(version.name, version.version, {"smoke_failed": reason})
            if aliases.get("champion") != version.version or PREVIOUS not in aliases:
                return False
            self._tag(version.name, version.version, {"rolled_back": "true"})
            before = self.client.get_model_version(version.name, str(aliases[PREVIOUS])).tags.get(PREVIOUS)
            self._crown(version.name, aliases[PREVIOUS], before)
            return True

    def _locked(self) -> AbstractContextManager[None]:
        """Keep others on this machine from changing aliases meanwhile.

        Raises: InputError when another process does so for longer than `_MOVE_SECONDS`.
        """
        return file_lock(self.home / "mlflow", "aliases", _MOVE_SECONDS)

    def _crown(self, name: str, version: int, before: int | str | None) -> None:
        """Make a version champion, with `before` as its `previous`.

        Tags first, which count for nothing until the alias moves: `previous` is read of the champion alone, and a
        champion does not count as rolled back.
        """
        aliases = self._align(name)  # as a change that was cut short left them
        champion = aliases.get("champion")
        if champion and PREVIOUS in aliases:
            self._tag(name, champion, {PREVIOUS: str(aliases[PREVIOUS])})
        self._tag(name, version, {PREVIOUS: str(before or "")})
        self.client.set_registered_model_alias(name, "champion", str(version))
        tags = self.client.get_model_version(name, str(version)).tags
        stale = {"rolled_back": "false", "smoke_failed": ""}
        self._tag(name, version, {key: value for key, value in stale.items() if key in tags})
        self._align(name)

    def _align(self, name: str) -> dict[str, int]:
        """Bring the aliases in MLflow in line with what they are here."""
        aliases = self.aliases(name)
        self._point(name, {alias: aliases.get(alias) for alias in ALIASES})
        return aliases

    def _point(self, name: str, target: Mapping[str, int | None]) -> None:
        """Set each alias that is not yet so."""
        aliases = self.client.get_registered_model(name).aliases
        for alias, version in target.items():
            if version is not None and aliases.get(alias) != str(version):
                self.client.set_registered_model_alias(name, alias, str(version))
            elif version is None and alias in aliases:
                self.client.delete_registered_model_alias(name, alias)

    def _tag(self, name: str, version: int, tags: Mapping[str, str]) -> None:
        for key, value in tags.items():
            self.client.set_model_version_tag(name, str(version), key, value)

    def _version(self, row: Any, pointing: Mapping[str, int]) -> ModelVersion:
        metrics = self.client.get_run(row.run_id).data.metrics
        aliases = tuple(sorted(alias for alias, version in pointing.items() if version == int(row.version)))
        tags = dict(row.tags)
        if "champion" in aliases and "rolled_back" in tags:
            tags["rolled_back"] = "false"
        created = row.creation_timestamp / 1000
        return ModelVersion(
            row.name, int(row.version), row.run_id, row.source, aliases, tags, dict(metrics), created, self
        )


def is_empty(home: Path) -> bool:
    """Whether nothing was ever registered; told without MLflow, whose import takes seconds."""
    return "MLFLOW_TRACKING_URI" not in os.environ and not (home / "mlflow" / DATABASE).exists()


def resolve(wanted: str, home: Path) -> ModelVersion:
    """The registered version that `NAME@ALIAS`, `NAME/VERSION` or `NAME` (its champion) names."""
    return Registry(home).resolve(wanted)


def _parse(wanted: str) -> tuple[str, str, str]:
    """Name, version, alias of `NAME@ALIAS`, `NAME/VERSION` or `NAME`."""
    name, at, alias = wanted.removeprefix("models:/").partition("@")
    if at:
        return name, "", alias
    name, slash, version = name.partition("/")
    return (name, version, "") if slash else (name, "", "champion")


def _one_of(names: list[str]) -> str:
    return f"known: {', '.join(names)}" if names else 'it is empty; run "loopwright run"'


def _now() -> int:
    return int(time.time() * 1000)
