"""Everything behind one answer: what was asked, said and voted, and the model version that said it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from components.feedback.store import Store
from components.registry import Registry

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
        }

    return facts_of
