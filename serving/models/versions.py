"""Where model versions come from: the registry, whose aliases move, or the Bento, which carries one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from components.config.params import InputError
from components.runtime.model_tasks import Task
from components.tracking.registry import Registry

TASKS: dict[str, Task] = {"agent": "chat", "classifier": "classify", "summarizer": "summarize"}
"""What the models that a run makes do; another name's folder is asked."""
DEFAULT = ",".join(f"{name}@champion" for name in TASKS)
"""Served where nothing is asked for: the champion of each, where there is one."""


class Version(Protocol):
    """A model version; its text is `NAME/VERSION`."""

    @property
    def folder(self) -> Path: ...

    @property
    def tags(self) -> Mapping[str, str]: ...


class Source(Protocol):
    """What a follower looks at."""

    def named(self, spec: str) -> tuple[str, str | None]:
        """`NAME/VERSION` of the model that `spec` names now, and of the challenger beside it; one cheap call."""

    def stamp(self) -> object:
        """Another one after each change, at no cost; None where only a look can tell."""

    def version(self, name: str) -> Version:
        """The version `NAME/VERSION`."""

    def mark_failed(self, version: Version, reason: str) -> None:
        """Note that a version failed; where it was just promoted, take that back."""


@dataclass(frozen=True)
class Bundled:
    """The model version that came with the Bento; a source that never changes."""

    folder: Path
    facts: Mapping[str, Any]
    """What the registry knew of it when the Bento was built: name, version, run_id, tags, metrics."""

    def __str__(self) -> str:
        return f"{self.facts['name']}/{self.facts['version']}"

    @property
    def tags(self) -> Mapping[str, str]:
        return self.facts.get("tags") or {}

    def named(self, _spec: str) -> tuple[str, str | None]:
        return str(self), None

    def stamp(self) -> object:
        return str(self)

    def version(self, _name: str) -> Version:
        return self

    def mark_failed(self, version: Version, reason: str) -> None:
        """A Bento is what it is."""


class Registered:
    """The versions of the registry."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def named(self, spec: str) -> tuple[str, str | None]:
        name, _, alias = spec.partition("@")
        aliases = self._registry.aliases(name) if alias else {}
        if alias not in aliases:
            return str(self._registry.resolve(spec)), None
        challenger = aliases.get("challenger")
        return f"{name}/{aliases[alias]}", f"{name}/{challenger}" if challenger else None

    def stamp(self) -> object:
        return self._registry.stamp()

    def version(self, name: str) -> Version:
        return self._registry.resolve(name)

    def mark_failed(self, version: Version, reason: str) -> None:
        self._registry.demote(self._registry.resolve(str(version)), reason)


@dataclass(frozen=True)
class NoModel:
    """The source of a task that this server leaves to others."""

    task: str
    others: list[str]
    """The models that are served."""

    def named(self, _spec: str) -> tuple[str, str | None]:
        raise InputError(f"no model that can {self.task} is served here; served: {', '.join(self.others)}")

    def stamp(self) -> object:
        return self.task

    def version(self, name: str) -> Version:
        raise InputError(f"{name}: not served here")

    def mark_failed(self, version: Version, reason: str) -> None:
        """Nothing fails where nothing is."""
