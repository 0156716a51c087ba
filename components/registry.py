"""The model registry: versions of a model, and the aliases champion, challenger and previous."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from components.config import InputError
from components.tracking import connect, create_run, errors, is_missing, log_metrics, save_pyfunc

if TYPE_CHECKING:
    from mlflow import MlflowClient


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


class Registry:
    """Registered models: versions, and the aliases champion, challenger and previous."""

    def __init__(self, home: Path) -> None:
        self.home = home

    @cached_property
    def client(self) -> MlflowClient:
        return connect(self.home)

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
        # A search leaves the aliases out.
        aliases = self.client.get_registered_model(name).aliases
        named = {row.version: [alias for alias, version in aliases.items() if version == row.version] for row in found}
        return [self._version(row, named[row.version]) for row in sorted(found, key=lambda row: -int(row.version))]

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
        try:
            if version:
                row = self.client.get_model_version(name, version)
            else:
                row = self.client.get_model_version_by_alias(name, alias)
        except errors() as error:
            if not is_missing(error):
                raise
            return None
        return self._version(row, row.aliases)

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
        row = self.client.create_model_version(name, f"runs:/{run_id}/{name}", run_id, tags=dict(tags))
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
        if version is not None:
            self.client.set_registered_model_alias(name, alias, str(version.version))
        elif self.find(f"{name}@{alias}"):
            self.client.delete_registered_model_alias(name, alias)

    def promote(self, version: ModelVersion) -> None:
        """Make a version the champion; the old champion becomes `previous`."""
        champion = self.find(f"{version.name}@champion")
        if champion and champion.version == version.version:
            raise InputError(f"{version}: is the champion already")
        if champion:
            self.alias(version.name, "previous", champion)
        self.alias(version.name, "champion", version)
        if "challenger" in version.aliases:
            self.alias(version.name, "challenger", None)
        if "rolled_back" in version.tags:
            self.tag(version, {"rolled_back": "false"})

    def rollback(self, name: str) -> ModelVersion:
        """Give the championship back to `previous`: the same move backwards.

        Raises: InputError when there is no previous champion.
        """
        previous = self.find(f"{name}@previous")
        if previous is None:
            self.versions(name)
            raise InputError(f'{name}@previous: there is no earlier champion; see "loopwright registry show {name}"')
        beaten = self.resolve(f"{name}@champion")
        self.promote(previous)
        # Its files may still be what the pipeline made last: a run must not promote them again.
        self.tag(beaten, {"rolled_back": "true"})
        return self.resolve(f"{name}@champion")

    def _version(self, row: Any, named: Iterable[str]) -> ModelVersion:
        metrics = self.client.get_run(row.run_id).data.metrics
        aliases = tuple(sorted(named))
        created = row.creation_timestamp / 1000
        return ModelVersion(
            row.name, int(row.version), row.run_id, row.source, aliases, dict(row.tags), dict(metrics), created, self
        )


def is_empty(home: Path) -> bool:
    """Whether nothing was ever registered; told without MLflow, whose import takes seconds."""
    return "MLFLOW_TRACKING_URI" not in os.environ and not (home / "mlflow" / "mlflow.db").exists()


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
