"""The model registry: versions of a model, and the aliases champion, challenger and previous.

The three aliases move together though MLflow sets one a call: a move is first written down whole, as one
tag of the registered model, and counts from then on. Whoever finds it unfinished finishes it.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from components.config.params import InputError
from components.runtime.process import only_one
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
MOVE = "move"
"""Tag of a registered model: the last move of its aliases."""
_MOVE_SECONDS = 60.0
"""A move waits this long for another one."""


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
        """The model folder (Hugging Face format) on this machine; downloaded once when a server keeps it."""
        return next((self.registry.files(self) / "data").iterdir())


@dataclass(frozen=True)
class _Move:
    """Where the three aliases were, where they go, and what versions are told on the way."""

    before: dict[str, int | None]
    after: dict[str, int | None]
    tags: dict[str, dict[str, str]]
    """Tags to set, by version."""
    done: bool = False

    @classmethod
    def read(cls, text: str | None) -> _Move | None:
        return cls(**json.loads(text)) if text else None

    def written(self, done: bool) -> str:
        return json.dumps({"before": self.before, "after": self.after, "tags": self.tags, "done": done})


@dataclass(frozen=True)
class _Aliases:
    """Where all aliases of a model point in MLflow, and the last move written down."""

    set: dict[str, int]
    move: _Move | None

    @property
    def unfinished(self) -> _Move | None:
        return self.move if self.move and not self.move.done else None

    @property
    def meant(self) -> dict[str, int]:
        """Where they point once the move is finished."""
        if self.unfinished is None:
            return self.set
        meant = {**self.set, **self.unfinished.after}
        return {alias: version for alias, version in meant.items() if version is not None}


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
        aliases = self._seen(name)
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
        aliases = self._seen(name)
        version = version or str(aliases.meant.get(alias, ""))
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
        """The version that each alias points at, in one call; none for an unknown name.

        A move that a killed process left half done is seen as done, and finished.
        """
        return self._seen(name).meant

    def _seen(self, name: str) -> _Aliases:
        try:
            aliases = self._aliases(name)
        except errors() as error:
            if not is_missing(error):
                raise
            return _Aliases({}, None)
        if aliases.unfinished:
            # Held: its mover lives and finishes it.
            with suppress(InputError), self._moving(name, patience=0.0):
                pass
        return aliases

    def files(self, version: ModelVersion) -> Path:
        """The MLflow model (pyfunc) of a version, as a local folder."""
        run_id, _, path = version.source.removeprefix("runs:/").partition("/")
        stored = f"{self.client.get_run(run_id).info.artifact_uri}/{path}"
        if stored.startswith("file:"):
            return Path(unquote(urlparse(stored).path))
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
        run_id = create_run(self.client, f"register {name}", {}, parent, _now())
        self.log_metrics(run_id, metrics)
        with tempfile.TemporaryDirectory(dir=self.home) as scratch:
            save_pyfunc(folder, Path(scratch) / name)
            self.client.log_artifacts(run_id, str(Path(scratch) / name), name)
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
        for key, value in tags.items():
            self.client.set_model_version_tag(version.name, str(version.version), key, value)

    def alias(self, name: str, alias: str, version: ModelVersion | None) -> None:
        """Point an alias at a version, or remove it."""
        with self._moving(name) as aliases:
            self._move(name, aliases, {alias: version.version if version else None}, {})

    def promote(self, version: ModelVersion) -> None:
        """Make a version the champion; the old champion becomes `previous`."""
        with self._moving(version.name) as aliases:
            champion = aliases.get("champion")
            if champion == version.version:
                raise InputError(f"{version}: is the champion already")
            self._move(version.name, aliases, _promotion(aliases, version.version), _cleared(version))

    def rollback(self, name: str) -> ModelVersion:
        """Give the championship back to `previous`: the same move backwards.

        Raises: InputError when there is no previous champion.
        """
        if "previous" not in self.aliases(name):
            self.versions(name)
            raise InputError(f'{name}@previous: there is no earlier champion; see "loopwright registry show {name}"')
        previous = self.resolve(f"{name}@previous")
        with self._moving(name) as aliases:
            if aliases.get("previous") != previous.version:
                raise InputError(f"{name}@previous: moved meanwhile; look, and roll back again")
            # Its files may still be what the pipeline made last: a run must not promote them again.
            tags = {str(aliases["champion"]): {"rolled_back": "true"}, **_cleared(previous)}
            self._move(name, aliases, _promotion(aliases, previous.version), tags)
        return self.resolve(f"{name}@champion")

    def withdraw(self, version: ModelVersion, reason: str) -> bool:
        """Take back the promotion of a version that fails in service: every alias is again where it was before.

        False when there is nothing to go back to, or another process was first; the version is marked all the same.
        """
        failed = {"smoke_failed": reason}
        with self._moving(version.name) as aliases:
            last = self._aliases(version.name).move
            if aliases.get("champion") != version.version or "previous" not in aliases:
                self.tag(version, failed)
                return False
            target: dict[str, int | None] = {"champion": aliases["previous"], "previous": None}
            if last and last.before["champion"] != last.after["champion"] == version.version:
                target["previous"] = last.before["previous"]
            if aliases.get("challenger") == version.version:
                target["challenger"] = None
            self._move(version.name, aliases, target, {str(version.version): {"rolled_back": "true", **failed}})
            return True

    def _aliases(self, name: str) -> _Aliases:
        model = self.client.get_registered_model(name)
        aliases = {alias: int(version) for alias, version in model.aliases.items()}
        return _Aliases(aliases, _Move.read(model.tags.get(MOVE)))

    @contextmanager
    def _moving(self, name: str, patience: float = _MOVE_SECONDS) -> Iterator[dict[str, int]]:
        """Keep others on this machine from moving, finish what is unfinished, and give the aliases as they are then.

        Raises: InputError when another process moves for longer than `patience`.
        """
        with only_one(self.home / "mlflow", "aliases", patience):
            aliases = self._aliases(name)
            if aliases.unfinished:
                self._finish(name, aliases.unfinished, aliases.set)
            yield aliases.meant

    def _move(
        self,
        name: str,
        aliases: Mapping[str, int],
        target: Mapping[str, int | None],
        tags: dict[str, dict[str, str]],
    ) -> None:
        """Write the move down, then make it."""
        before = {alias: aliases.get(alias) for alias in {**dict.fromkeys(ALIASES), **target}}
        move = _Move(before, {**before, **target}, tags)
        self.client.set_registered_model_tag(name, MOVE, move.written(done=False))
        self._finish(name, move, aliases)

    def _finish(self, name: str, move: _Move, aliases: Mapping[str, int]) -> None:
        for version, tags in move.tags.items():
            for key, value in tags.items():
                self.client.set_model_version_tag(name, version, key, value)
        for alias, target in move.after.items():
            if target is not None and aliases.get(alias) != target:
                self.client.set_registered_model_alias(name, alias, str(target))
            elif target is None and alias in aliases:
                self.client.delete_registered_model_alias(name, alias)
        self.client.set_registered_model_tag(name, MOVE, move.written(done=True))

    def _version(self, row: Any, seen: _Aliases) -> ModelVersion:
        metrics = self.client.get_run(row.run_id).data.metrics
        aliases = tuple(sorted(alias for alias, version in seen.meant.items() if version == int(row.version)))
        tags = dict(row.tags) | (seen.unfinished.tags.get(str(row.version), {}) if seen.unfinished else {})
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


def _promotion(aliases: Mapping[str, int], version: int) -> dict[str, int | None]:
    """The move that makes a version champion."""
    target: dict[str, int | None] = {"champion": version}
    if "champion" in aliases:
        target["previous"] = aliases["champion"]
    if aliases.get("challenger") == version:
        target["challenger"] = None
    return target


def _cleared(version: ModelVersion) -> dict[str, dict[str, str]]:
    """What stands against a version no longer does once it is made champion."""
    stale = {"rolled_back": "false", "smoke_failed": ""}
    tags = {key: value for key, value in stale.items() if key in version.tags}
    return {str(version.version): tags} if tags else {}


def _one_of(names: list[str]) -> str:
    return f"known: {', '.join(names)}" if names else 'it is empty; run "loopwright run"'


def _now() -> int:
    return int(time.time() * 1000)
