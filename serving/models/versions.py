"""Sources of model versions: the registry, whose aliases move, or a Bento, which carries one version."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from components.config.params import InputError
from components.models.base_store import base_folder, is_adapter, read_base
from components.models.weight_files import cached_digest, check_digest
from components.runtime.model_tasks import TASKS
from components.tracking.registry import ADAPTER_SHA256, BASE_SHA256, WEIGHTS_SHA256, Registry
from serving.engine.backend import BackendNotReady

DEFAULT = ",".join(f"{name}@champion" for name in TASKS)
"""Models served by default: the champion of each task, where there is one."""

logger = logging.getLogger("loopwright.versions")


class Version(Protocol):
    """A model version; its text is `NAME/VERSION`."""

    @property
    def folder(self) -> Path: ...

    @property
    def tags(self) -> Mapping[str, str]: ...


class Source(Protocol):
    """What an alias watcher polls."""

    def resolve(self, spec: str) -> tuple[str, str | None]:
        """`NAME/VERSION` of the model that `spec` names now, and of its challenger; one cheap call."""

    def etag(self) -> object:
        """Version token of the source, without a request: differs after each change; None where the source has none."""

    def version(self, name: str) -> Version:
        """The version `NAME/VERSION`."""

    def names(self, name: str) -> set[str]:
        """Every version of a model that a replica may have served."""

    def mark_failed(self, version: Version, reason: str, device: str) -> None:
        """Mark a version as failed on a device, and undo its promotion where that is the device of its release."""


@dataclass(frozen=True)
class Bundled:
    """The model version inside a Bento; a source that never changes."""

    folder: Path
    metadata: Mapping[str, Any]
    """From the registry, when the Bento was built: name, version, run_id, tags, metrics."""

    def __post_init__(self) -> None:
        """Raises: InputError when the weights are not those that were registered."""
        if sha256 := self.tags.get(WEIGHTS_SHA256) or self.tags.get(ADAPTER_SHA256):
            check_digest(self.folder, sha256, str(self))
        if sha256 := self.tags.get(BASE_SHA256):
            check_digest(base_folder(self.folder), sha256, str(self))

    def __str__(self) -> str:
        return f"{self.metadata['name']}/{self.metadata['version']}"

    @property
    def tags(self) -> Mapping[str, str]:
        return self.metadata.get("tags") or {}

    def resolve(self, _spec: str) -> tuple[str, str | None]:
        return str(self), None

    def etag(self) -> object:
        return str(self)

    def version(self, _name: str) -> Version:
        return self

    def names(self, _name: str) -> set[str]:
        return {str(self)}

    def mark_failed(self, version: Version, reason: str, device: str) -> None:
        """A Bento has no other version to return to."""


class Registered:
    """Versions of the registry."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._champions: dict[str, int] = {}
        """Of each model, as of the last look at who moved its alias."""

    def resolve(self, spec: str) -> tuple[str, str | None]:
        name, _, alias = spec.partition("@")
        aliases = self._registry.aliases(name) if alias else {}
        if alias not in aliases:
            return str(self._registry.resolve(spec)), None
        champion = aliases.get("champion")
        if champion is not None and champion != self._champions.get(name):
            try:
                self._registry.audit_last_move(name)
                self._champions[name] = champion
            except Exception:  # it is seen again at the next look; answers do not wait for the log
                logger.warning("the audit log has no row yet of who made %s/%s champion", name, champion, exc_info=True)
        challenger = aliases.get("challenger")
        return f"{name}/{aliases[alias]}", f"{name}/{challenger}" if challenger else None

    def etag(self) -> object:
        return self._registry.stamp()

    def version(self, name: str) -> Version:
        return self._registry.resolve(name)

    def names(self, name: str) -> set[str]:
        return self._registry.version_names(name)

    def mark_failed(self, version: Version, reason: str, device: str) -> None:
        failed = self._registry.resolve(str(version))
        if device == failed.tags.get("smoke_device", device):
            self._registry.demote(failed, reason)
        else:  # replicas on other devices go on with it
            self._registry.tag(failed, {f"smoke_failed {device}": reason})


@dataclass(frozen=True)
class NoModel:
    """The source of a task that is not served."""

    task: str
    served: list[str]
    """The models of other tasks."""

    def resolve(self, _spec: str) -> tuple[str, str | None]:
        raise InputError(f"no model that can {self.task} is served here; served: {', '.join(self.served)}")

    def etag(self) -> object:
        return self.task

    def version(self, name: str) -> Version:
        raise InputError(f"{name}: not served here")

    def names(self, _name: str) -> set[str]:
        return set()

    def mark_failed(self, version: Version, reason: str, device: str) -> None:
        """Never called: there is no version."""


def path_on_server(folder: Path, root: str | None, home: Path | None) -> str:
    """The path of a folder on the server's machine."""
    folder = folder.resolve()
    if root is None:
        return str(folder)
    if home is None or not folder.is_relative_to(home.resolve()):
        raise InputError(f"{folder}: is not in the state folder, which serve.adapter_root stands for; leave it out")
    return str(PurePosixPath(root) / folder.relative_to(home.resolve()).as_posix())


def check_weights(folder: Path, name: str, where: str, served: str | None) -> None:
    """Compare the served model, where its folder is on this machine, with the version's weights, or with its base's.

    Raises: BackendNotReady when they differ.
    """
    base = read_base(folder) if is_adapter(folder) else None
    actual = _digest(Path(served)) if served else None
    if actual is None:
        if base is None:
            logger.warning("%s: %s answers with the weights that it was started with, which may be others", name, where)
        return
    if actual != (base.weights_sha256 if base else _digest(folder)):
        model, source = (f"{base.source}, the base of {name}", base.source) if base else (name, folder)
        raise BackendNotReady(
            f"{where}: {served} does not have the weights of {model}, and a server cannot change its own while it runs;"
            f" start it with {source}"
        )


def _digest(folder: Path) -> str | None:
    """`weights_digest`; None where there are no weights."""
    try:
        return cached_digest(folder)
    except InputError:
        return None
