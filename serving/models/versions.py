"""Sources of model versions: the registry, whose aliases move, or a Bento, which carries one version."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from components.config.params import InputError
from components.runtime.model_tasks import TASKS
from components.tracking.registry import Registry

DEFAULT = ",".join(f"{name}@champion" for name in TASKS)
"""Models served by default: the champion of each task, where there is one."""


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

    def mark_failed(self, version: Version, reason: str) -> None:
        """Mark a version as failed, and undo its promotion."""


@dataclass(frozen=True)
class Bundled:
    """The model version inside a Bento; a source that never changes."""

    folder: Path
    metadata: Mapping[str, Any]
    """From the registry, when the Bento was built: name, version, run_id, tags, metrics."""

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

    def mark_failed(self, version: Version, reason: str) -> None:
        """A Bento has no other version to return to."""


class Registered:
    """Versions of the registry."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def resolve(self, spec: str) -> tuple[str, str | None]:
        name, _, alias = spec.partition("@")
        aliases = self._registry.aliases(name) if alias else {}
        if alias not in aliases:
            return str(self._registry.resolve(spec)), None
        challenger = aliases.get("challenger")
        return f"{name}/{aliases[alias]}", f"{name}/{challenger}" if challenger else None

    def etag(self) -> object:
        return self._registry.stamp()

    def version(self, name: str) -> Version:
        return self._registry.resolve(name)

    def mark_failed(self, version: Version, reason: str) -> None:
        self._registry.demote(self._registry.resolve(str(version)), reason)


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

    def mark_failed(self, version: Version, reason: str) -> None:
        """Never called: there is no version."""
