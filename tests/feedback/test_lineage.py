"""Which versions a version was trained from, and which were trained on an item, on a real registry."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from components.feedback.lineage import ancestry, registry_metadata, trained_versions
from components.tracking.registry import ModelVersion, Registry

Register = Callable[..., ModelVersion]


@pytest.fixture
def learned(registry: Registry, registered: Register) -> Callable[..., ModelVersion]:
    """Register a version that was trained from a parent on feedback items."""

    def register(parent: str | None, *items: str, name: str = "agent") -> ModelVersion:
        folder = registry.home / name
        folder.mkdir(exist_ok=True)
        (folder / "lessons.json").write_text(json.dumps({"parent": parent, "feedback": items}))
        return registered(0.5, name, **({"parent": parent} if parent else {}))

    return register


def test_an_item_taught_the_versions_that_learned_it_and_those_trained_from_them(
    registry: Registry, learned: Callable[..., ModelVersion]
) -> None:
    learned(None)
    learned("agent/1", "a", "b")
    learned("agent/2", "c")
    sibling = learned("agent/1", "a")
    newest = learned("agent/3")
    learned(None, "d", name="other")
    assert [str(one) for one in ancestry(registry, newest)] == ["agent/5", "agent/3", "agent/2", "agent/1"]
    assert [str(one) for one in ancestry(registry, sibling)] == ["agent/4", "agent/1"]
    assert sorted(trained_versions(registry, "a")) == ["agent/2", "agent/3", "agent/4", "agent/5"]
    assert sorted(trained_versions(registry, "b")) == ["agent/2", "agent/3", "agent/5"]
    assert sorted(trained_versions(registry, "c")) == ["agent/3", "agent/5"]
    assert trained_versions(registry, "d") == ["other/1"]
    assert trained_versions(registry, "e") == []
    facts = registry_metadata(registry.home)
    found = facts("agent/5")
    assert found is not None
    assert [(one["version"], one["feedback"]) for one in found["taught_by"]] == [
        ("agent/5", []),
        ("agent/3", ["c"]),
        ("agent/2", ["a", "b"]),
        ("agent/1", []),
    ]
    assert facts("agent/6") is None
    assert facts("nobody/1") is None


def test_a_line_ends_where_a_parent_is_gone_or_comes_again(
    registry: Registry, learned: Callable[..., ModelVersion]
) -> None:
    """Tags are anybody's to write: a missing parent and a circle end the line, and nothing else."""
    orphan = learned("agent/9", "a")
    circle = learned("agent/3")
    learned("agent/2", "b")
    assert [str(one) for one in ancestry(registry, orphan)] == ["agent/1"]
    assert [str(one) for one in ancestry(registry, circle)] == ["agent/2", "agent/3"]
    assert sorted(trained_versions(registry, "b")) == ["agent/2", "agent/3"]
