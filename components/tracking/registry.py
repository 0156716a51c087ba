"""The model registry: versions of a model, and the aliases champion, challenger and previous.

One write makes a version champion: that of the alias `champion`. The rest follows from earlier writes: a version's tag
`previous` names the champion before it, and counts while that version is champion. The aliases `previous` and
`challenger` are updated afterwards, for programs that read MLflow directly; a process that is killed in between leaves
a registry that this module reads correctly.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from components.agent.saved_tools import check_source, tool_tags
from components.config.params import InputError, flat
from components.config.paths import writing
from components.models.base_store import base_folder, is_adapter, read_base, store_base, stored_base
from components.models.weight_files import check_digest, weights_digest
from components.runtime.files import scratch_folder
from components.runtime.process import file_lock, os_user
from components.tracking.downloads import local_copy, model_folder
from components.tracking.mlflow_client import connect, create_run, log_metrics, log_params, mlflow_name, save_pyfunc
from components.tracking.mlflow_database import DATABASE
from components.tracking.mlflow_requests import PROMOTED, create_version, errors, is_missing, transfer
from components.tracking.model_names import known_names, parse_name

if TYPE_CHECKING:
    from mlflow import MlflowClient

ALIASES = ("champion", "challenger", "previous")
PREVIOUS = "previous"
"""Tag of a version: the number of the champion before it, or empty; alias of the version that the tag names."""
WEIGHTS_SHA256, ADAPTER_SHA256 = "weights_sha256", "adapter_sha256"
BASE_SHA256, BASE_VERSION = "base_sha256", "base_version"
"""Tags: the digest of a version's weights or adapter; that of an adapter's base, and the version that has it."""
LINEAGE = "lineage.json"
"""File of a version's run: what the version was made from (components/tracking/version_files.py)."""
PRUNED = "pruned"
"""Tag of a version whose weights were removed (components/tracking/retention.py)."""
_LOCK_SECONDS = 60.0
"""Longest wait for another process that changes aliases."""


@dataclass(frozen=True)
class ModelVersion:
    """One version of a registered model."""

    name: str
    version: int
    run_id: str
    source: str
    """Address of the files, as `runs:/ID/path`."""
    aliases: tuple[str, ...]
    tags: dict[str, str]
    metrics: dict[str, float]
    created: float
    """Seconds since the epoch."""
    description: str
    """Its model card in Markdown, without what only its files have; empty for a version of earlier releases."""
    registry: Registry = field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"

    @property
    def stored(self) -> Path:
        """The model folder as it is stored, without any check; of a pruned version, what lineage reads."""
        return model_folder(self.registry.files(self))

    @cached_property
    def folder(self) -> Path:
        """The model folder (Hugging Face format) on this machine, and an adapter's base; downloaded once from a server.

        Raises: InputError when its weights or the source of its tools differ from the registered digests, or were
        pruned.
        """
        if self.tags.get(PRUNED) == "true":
            raise InputError(f"{self}: its weights were pruned (keep.versions in params.yaml); name a newer version")
        folder = self.stored
        self.verify(folder)
        if base := self.tags.get(BASE_SHA256):
            self.registry.fetch_base(base)
        return folder

    def verify(self, folder: Path) -> None:
        """Compare a model folder with the registered digests.

        Raises: InputError where its weights or the source of its tools differ.
        """
        if sha256 := self.tags.get(WEIGHTS_SHA256) or self.tags.get(ADAPTER_SHA256):
            check_digest(folder, sha256, str(self))
        if sha256 := self.tags.get("tools_sha256"):
            check_source(folder, sha256)


class Registry:
    """Registered models: versions, and the aliases champion, challenger and previous."""

    def __init__(
        self,
        home: Path,
        lock: Callable[[], AbstractContextManager[Any]] = nullcontext,
        audit: Callable[[str, str, str, str], None] = lambda action, target, detail, actor: None,
    ) -> None:
        """`lock` keeps other hosts from moving aliases; what it yields, if anything, can `check` that it is held still.

        `audit` writes a row of the audit log; with no actor, this process's account.
        """
        self.home, self._lock, self._audit = home, lock, audit

    @cached_property
    def client(self) -> MlflowClient:
        return connect(self.home)

    def stamp(self) -> object:
        """A token that changes with every write to the database on this machine; None with a server.

        It costs a thousandth of a query, for those who poll an alias.
        """
        if os.environ.get("MLFLOW_TRACKING_URI"):
            return None
        files = []
        for name in (DATABASE, f"{DATABASE}-wal"):
            with suppress(FileNotFoundError):
                info = (self.home / "mlflow" / name).stat()
                files.append((info.st_ino, info.st_mtime_ns, info.st_size))
        return tuple(files)

    def names(self) -> list[str]:
        """Registered models, in order of name."""
        return sorted(model.name for model in self.client.search_registered_models())

    def versions(self, name: str, newest: int | None = None) -> list[ModelVersion]:
        """The `newest` versions, or all, newest first.

        Raises: InputError for an unknown name.
        """
        if name not in (names := self.names()):
            raise InputError(f"{name}: no such model in the registry; {known_names(names)}")
        rows = self.client.search_model_versions(f"name = '{name}'")
        aliases = self.aliases(name)
        return [self._version(row, aliases) for row in sorted(rows, key=lambda row: -int(row.version))[:newest]]

    def version_names(self, name: str) -> set[str]:
        """`NAME/VERSION` of all versions, in one query."""
        return {f"{name}/{row.version}" for row in self.client.search_model_versions(f"name = '{name}'")}

    def resolve(self, name: str) -> ModelVersion:
        """The version that `NAME@ALIAS`, `NAME/VERSION` or `NAME` (its champion) names.

        Raises: InputError listing the registered versions.
        """
        if version := self.find(name):
            return version
        versions = self.versions(parse_name(name)[0])
        names = [name for row in versions for name in (str(row), *(f"{row.name}@{alias}" for alias in row.aliases))]
        raise InputError(f"{name}: not in the registry; {known_names(names)}")

    def find(self, name: str) -> ModelVersion | None:
        """`resolve`, or None where there is no such version."""
        name, version, alias = parse_name(name)
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
        # A promoted challenger is challenger no more, nor is the champion its own predecessor.
        return {alias: version for alias, version in aliases.items() if alias == "champion" or version != champion}

    def files(self, version: ModelVersion) -> Path:
        """The MLflow model (pyfunc) of a version, as a local folder; of a server's version, a verified copy.

        Raises: Unavailable when it cannot be downloaded, InputError when it is not what was registered.
        """
        run_id, _, path = version.source.removeprefix("runs:/").partition("/")
        stored = f"{self.client.get_run(run_id).info.artifact_uri}/{path}"
        if stored.startswith("file:"):
            folder = Path(unquote(urlparse(stored).path))
            if not (folder / "data").is_dir():
                raise InputError(f"{version}: {folder}: its files are missing; restore the state folder as a whole")
            return folder
        return local_copy(
            self.home / "mlflow" / "downloads" / version.name / str(version.version),
            str(version),
            lambda scratch: self.client.download_artifacts(run_id, path, scratch),
            version.verify,
        )

    def register(
        self,
        folder: Path,
        name: str,
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        parent: str | None,
        lineage: Mapping[str, Any] | None = None,
    ) -> ModelVersion:
        """Store a model folder as a new version of `name`: a run with the metrics, and a pyfunc that predicts.

        `lineage` is stored with the run. An adapter's base that is not registered becomes a version of `NAME-base`.
        """
        tags = {**tool_tags(folder), **self._weights_tags(folder, name, parent), **tags}
        run_id = create_run(self.client, f"register {name}", {}, parent, int(time.time() * 1000))
        try:
            self.log_metrics(run_id, metrics)
            if lineage:
                self.client.log_dict(run_id, dict(lineage), LINEAGE)
                log_params(self.client, run_id, flat(lineage.get("params", {})))
            with scratch_folder(self.home, "register") as scratch:
                save_pyfunc(folder, scratch / name)
                with transfer():
                    self.client.log_artifacts(run_id, str(scratch / name), name)
        except BaseException:
            # A partial model is of no use, and takes the disk space that was missing.
            shutil.rmtree(self.home / "mlflow" / "artifacts" / run_id, ignore_errors=True)
            with suppress(*errors()):
                self.client.set_terminated(run_id, "FAILED")
            raise
        self.client.set_terminated(run_id)
        named = {mlflow_name(key): tag for key, tag in tags.items()}
        return self.resolve(f"{name}/{create_version(self.client, name, f'runs:/{run_id}/{name}', run_id, named)}")

    def _weights_tags(self, folder: Path, name: str, parent: str | None) -> dict[str, str]:
        """Tags by which weights are found again: a model's own, or those of an adapter's base."""
        if not is_adapter(folder):
            return {WEIGHTS_SHA256: weights_digest(folder)}
        base = read_base(folder)
        version = self.with_weights(base.weights_sha256)
        if version is None:
            version = self.register(base_folder(folder), f"{name}-base", {}, {"family": "base"}, parent)
        about_base = {BASE_VERSION: str(version), BASE_SHA256: base.weights_sha256}
        return {ADAPTER_SHA256: weights_digest(folder), **about_base}

    def with_weights(self, weights_sha256: str) -> ModelVersion | None:
        """The newest version that has these weights itself."""
        rows = self.client.search_model_versions(f"tag.{WEIGHTS_SHA256} = '{weights_sha256}'")
        newest = max(rows, key=lambda row: row.creation_timestamp, default=None)
        return self.resolve(f"{newest.name}/{newest.version}") if newest is not None else None

    def fetch_base(self, weights_sha256: str) -> None:
        """Put the base with these weights into the state folder, if it is registered; what is there is checked."""
        if (stored := stored_base(weights_sha256, self.home)).is_dir():
            check_digest(stored, weights_sha256, "the base")
        elif version := self.with_weights(weights_sha256):
            with writing(self.home):
                store_base(version.folder, self.home, str(version), weights_sha256)

    def log_metrics(self, run_id: str, metrics: Mapping[str, float]) -> None:
        """Add metrics to a version's run."""
        now = int(time.time() * 1000)
        log_metrics(self.client, run_id, [(key, float(value), now, 0) for key, value in metrics.items()])

    def tag(self, version: ModelVersion, tags: Mapping[str, str]) -> None:
        """Set tags on a version."""
        self._tag(version.name, version.version, tags)

    def alias(self, name: str, alias: str, version: ModelVersion | None) -> None:
        """Point an alias at a version, or remove it."""
        with self._locked():
            self._set_aliases(name, {alias: version.version if version else None})

    def promote(self, version: ModelVersion, expected: str | None = None, detail: str = "") -> None:
        """Make a version the champion; the old champion becomes `previous`.

        `expected` is the champion that it was compared with, empty for none; None: whichever there is. `detail` goes
        into the audit log.
        Raises: InputError when it is already, its files cannot be used, or another champion than `expected` is there.
        """
        _ = version.folder
        with self._locked() as check:
            champion = self.aliases(version.name).get("champion")
            if champion == version.version:
                raise InputError(f"{version}: is the champion already")
            current = f"{version.name}/{champion}" if champion else ""
            if expected is not None and current != expected:
                compared = f"compared with {expected or 'no champion'}"
                raise InputError(f"{version}: was {compared}, and {current} is the champion now; run it again")
            self._make_champion(version.name, version.version, champion, check, ("promote", str(version), detail))

    def rollback(self, name: str) -> ModelVersion:
        """Make `previous` the champion again; the champion becomes `previous`.

        Raises: InputError when there is no previous champion, or another process has moved the alias meanwhile.
        """
        seen = self.aliases(name)
        if PREVIOUS not in seen:
            self.versions(name)
            raise InputError(f'{name}@previous: there is no earlier champion; see "loopwright registry show {name}"')
        with self._locked() as check:
            aliases = self.aliases(name)
            if aliases["champion"] != seen["champion"]:
                raise InputError(
                    f"{name}: {name}/{aliases.get('champion')} has become the champion meanwhile; look again"
                )
            # It may still be the pipeline's newest model: a run must not promote it again.
            self._tag(name, aliases["champion"], {"rolled_back": "true"})
            row = ("rollback", f"{name}/{aliases[PREVIOUS]}", "")
            self._make_champion(name, aliases[PREVIOUS], aliases["champion"], check, row)
        return self.resolve(f"{name}@champion")

    def audit_last_move(self, name: str) -> None:
        """Record who moved the alias champion, where that is not on record.

        It is not after a kill between the move and its row, or where another program moved it, as MLflow's page; who
        used that is not known. Version 0 stands for none; several moves between two calls count as a single move.
        """
        with self._locked():
            self._audit_last_move(name)

    def _audit_last_move(self, name: str) -> None:
        model = self.client.get_registered_model(name)
        champion, promoted = str(model.aliases.get("champion", 0)), model.tags.get(PROMOTED, "").split(maxsplit=3)
        if promoted and champion == promoted[0]:
            return
        if len(promoted) == 4 and champion == promoted[1]:
            self._audit(promoted[2], f"{name}/{champion}", "its process was killed meanwhile", promoted[3])
        elif promoted and champion not in promoted:  # models of earlier releases have no such tag, or no action in it
            former = f"outside of Loopwright; the champion was {name}/{promoted[:2][-1]}"
            self._audit("moved", f"{name}/{champion}", former, "unknown")
        self.client.set_registered_model_tag(name, PROMOTED, champion)

    def demote(self, version: ModelVersion, reason: str) -> bool:
        """Mark a version that fails its smoke test; if it is champion, make the previous champion champion again.

        False when there is no previous champion, or another process was first; the version is marked all the same.
        """
        with self._locked() as check:
            aliases = self.aliases(version.name)
            self._tag(version.name, version.version, {"smoke_failed": reason})
            if aliases.get("champion") != version.version or PREVIOUS not in aliases:
                return False
            self._tag(version.name, version.version, {"rolled_back": "true"})
            before = self.client.get_model_version(version.name, str(aliases[PREVIOUS])).tags.get(PREVIOUS)
            row = ("rollback", str(version), f"by the endpoint: {reason}")
            self._make_champion(version.name, aliases[PREVIOUS], before, check, row)
            return True

    @contextmanager
    def _locked(self) -> Iterator[Callable[[], None]]:
        """Lock the aliases; yields what raises InputError where another host has taken the lock meanwhile.

        Raises: InputError when another process holds it for longer than `_LOCK_SECONDS`.
        """
        with file_lock(self.home / "mlflow", "aliases", _LOCK_SECONDS), self._lock() as lock:
            yield lock.check if lock else lambda: None

    def _make_champion(
        self, name: str, version: int, before: int | str | None, check: Callable[[], None], row: tuple[str, str, str]
    ) -> None:
        """Make a version champion, with `before` as its `previous`, and record it: action, object and detail.

        Tags first, which have no effect until the alias moves: `previous` is read from the champion alone, and a
        champion does not count as rolled back. The tag `promoted` names the move until its row is written.
        """
        self._audit_last_move(name)
        aliases = self._update_aliases(name)  # after a change that was interrupted
        champion = aliases.get("champion")
        if champion and PREVIOUS in aliases:
            self._tag(name, champion, {PREVIOUS: str(aliases[PREVIOUS])})
        self._tag(name, version, {PREVIOUS: str(before or "")})
        self.client.set_registered_model_tag(name, PROMOTED, f"{champion or 0} {version} {row[0]} {os_user()}")
        check()  # the lease of a process that was suspended may be another's: the move is compared and set under it
        self.client.set_registered_model_alias(name, "champion", str(version))
        self._audit(*row, "")
        self.client.set_registered_model_tag(name, PROMOTED, str(version))
        tags = self.client.get_model_version(name, str(version)).tags
        stale = {"rolled_back": "false", "smoke_failed": ""}
        self._tag(name, version, {key: value for key, value in stale.items() if key in tags})
        self._update_aliases(name)

    def _update_aliases(self, name: str) -> dict[str, int]:
        """Write to MLflow the aliases that follow from the champion, and return them."""
        aliases = self.aliases(name)
        self._set_aliases(name, {alias: aliases.get(alias) for alias in ALIASES})
        return aliases

    def _set_aliases(self, name: str, target: Mapping[str, int | None]) -> None:
        """Set or delete each alias whose version differs."""
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
        created, text = row.creation_timestamp / 1000, row.description or ""
        return ModelVersion(
            row.name, int(row.version), row.run_id, row.source, aliases, tags, dict(metrics), created, text, self
        )


def is_empty(home: Path) -> bool:
    """Whether nothing was ever registered; without importing MLflow, which takes seconds."""
    return "MLFLOW_TRACKING_URI" not in os.environ and not (home / "mlflow" / DATABASE).exists()


def resolve(name: str, home: Path) -> ModelVersion:
    """The registered version that `NAME@ALIAS`, `NAME/VERSION` or `NAME` (its champion) names."""
    return Registry(home).resolve(name)
