"""Lineage: backwards from an answer, forwards from a feedback item.

Backwards: the request, the answer and its votes, the model version that answered, its ancestors, and the
feedback that each of them was trained on. Forwards: the versions that were trained on an item.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from components.config.paths import TRAINED_ON_FILE
from components.config.secrets import redacted_tags
from components.feedback.pictures import marked_content
from components.feedback.store import Store
from components.tracking.registry import ModelVersion, Registry
from components.tracking.version_files import lineage as lineage_tags

VersionMetadata = Callable[[str], Mapping[str, Any] | None]
"""Metadata of a `NAME/VERSION` (run, tags, metrics, ...); None for an unknown version."""


def lineage(store: Store, completion_id: str, metadata: VersionMetadata, viewer: str | None = None) -> dict[str, Any]:
    """The record of one completion with `version`: the answering model's run, commit, data and checks.

    Where a `viewer` is given, the completions of other owners do not exist.

    `pictures` are those of the request, each with the endpoint's path of its file.

    Raises: UnknownCompletion.
    """
    record = store.completion(completion_id, viewer)
    name, _, version = record["model"].partition("/")
    about = {**(metadata(record["model"]) or {}), "name": name, "version": version}
    if "tags" in about:
        about["tags"] = redacted_tags(about["tags"])
    return {**record, "pictures": _pictures(store, record), "version": about}


def _pictures(store: Store, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The pictures of a record, in the order in which they were shown."""
    stored = {picture["digest"]: picture for picture in store.pictures_of(record["id"])}
    messages = record["request"].get("messages") or [] if stored else []
    shown = [digest for message in messages for digest in marked_content(message.get("content"))[1]]
    path = f"/v1/pictures/{record['id']}"
    return [{**stored[digest], "path": f"{path}/{digest}"} for digest in dict.fromkeys(shown) if digest in stored]


def registry_metadata(home: Path) -> VersionMetadata:
    registry = Registry(home)

    def metadata(model: str) -> dict[str, Any] | None:
        version = registry.find(model)
        if version is None:
            return None
        return {
            "run_id": version.run_id,
            "created": version.created,
            "aliases": list(version.aliases),
            "tags": lineage_tags(version),
            "metrics": version.metrics,
            "taught_by": [
                {"version": str(each), "run_id": each.run_id, "feedback": feedback_ids(each)}
                for each in ancestry(registry, version)
            ],
        }

    return metadata


def ancestry(registry: Registry, version: ModelVersion) -> list[ModelVersion]:
    """The version, its parent (the version it was trained from), and so on to the version without one."""
    versions = [version]
    while parent := versions[-1].tags.get("parent"):
        older = registry.find(parent)
        if older is None or older.version in {each.version for each in versions}:
            break
        versions.append(older)
    return versions


def feedback_ids(version: ModelVersion) -> list[str]:
    """Ids of the feedback items that this version was trained on beyond its parent."""
    path = version.stored / TRAINED_ON_FILE
    if not path.is_file():
        return []
    ids: list[str] = json.loads(path.read_text(encoding="utf-8"))["feedback"]
    return ids


def trained_versions(registry: Registry, feedback_id: str) -> list[str]:
    """Every `NAME/VERSION` that was trained on an item, itself or through its ancestors."""
    return list(versions_trained_on(registry, [feedback_id]))


def versions_trained_on(registry: Registry, items: Collection[str]) -> dict[str, list[str]]:
    """By `NAME/VERSION`, those of the feedback items that it was trained on, itself or through its ancestors."""
    learned: dict[str, list[str]] = {}
    for version in [version for name in registry.names() for version in registry.versions(name)]:
        ids = {item for each in ancestry(registry, version) for item in feedback_ids(each)}
        if known := [item for item in items if item in ids]:
            learned[str(version)] = known
    return learned
