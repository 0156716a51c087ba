"""Everything behind one answer, and everything that came of one vote.

Backwards: what was asked, said and voted, the model version that said it, the versions that it was trained from, and
the feedback that each of them learned from. Forwards: the versions that learned from one item.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from components.feedback.store import Store
from components.tracking.registry import ModelVersion, Registry

LESSONS = "lessons.json"
"""In a model folder: the version it was trained from, and the ids of the feedback that it learned from."""

FactsOf = Callable[[str], Mapping[str, Any] | None]
"""What the registry knows of a `NAME/VERSION` (run, tags, metrics, ...); None when it does not know it."""


def lineage(store: Store, completion_id: str, facts_of: FactsOf) -> dict[str, Any]:
    """The record of one completion with `version`: the answering model's run, commit, data and checks.

    Raises: UnknownCompletion.
    """
    record = store.completion(completion_id)
    name, _, version = record["model"].partition("/")
    return {**record, "version": {**(facts_of(record["model"]) or {}), "name": name, "version": version}}


def registry_facts(home: Path) -> FactsOf:
    """The facts of versions in the registry of a state folder; the registry is opened when first asked."""
    registry = Registry(home)

    def facts_of(model: str) -> dict[str, Any] | None:
        version = registry.find(model)
        if version is None:
            return None
        return {
            "run_id": version.run_id,
            "created": version.created,
            "aliases": list(version.aliases),
            "tags": version.tags,
            "metrics": version.metrics,
            "taught_by": [
                {"version": str(one), "run_id": one.run_id, "feedback": lessons(one)}
                for one in ancestry(registry, version)
            ],
        }

    return facts_of


def ancestry(registry: Registry, version: ModelVersion) -> list[ModelVersion]:
    """The version itself, the one it was trained from, and so on to the one that `run` made."""
    found = [version]
    while parent := found[-1].tags.get("parent"):
        older = registry.find(parent)
        if older is None or older.version in {one.version for one in found}:
            break
        found.append(older)
    return found


def lessons(version: ModelVersion) -> list[str]:
    """Ids of the feedback that this version was trained on, beyond what the one before it was."""
    path = version.folder / LESSONS
    if not path.is_file():
        return []
    learned: list[str] = json.loads(path.read_text(encoding="utf-8"))["feedback"]
    return learned


def taught(registry: Registry, feedback_id: str) -> list[str]:
    """Every `NAME/VERSION` that learned from an item, itself or through the versions it was trained from."""
    versions = [version for name in registry.names() for version in registry.versions(name)]
    return [
        str(version) for version in versions if any(feedback_id in lessons(one) for one in ancestry(registry, version))
    ]
