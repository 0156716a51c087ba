"""Keys that expire, are rotated, and name their tools."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from components.config.errors import InputError
from components.feedback import keys
from components.feedback.keys import key_digest
from components.feedback.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store.of(tmp_path)
    yield store
    store.close()


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of the keys, which a test may move."""
    now = [1e9]

    class Clock:
        @staticmethod
        def time() -> float:
            return now[0]

    monkeypatch.setattr(keys, "time", Clock)
    return now


def digests(store: Store) -> set[str]:
    return {key.digest for key in store.open_keys()}


def test_a_key_opens_nothing_from_its_expiry(store: Store, now: list[float]) -> None:
    _, key = store.create_key("a", ["predict"], seconds=60)
    assert digests(store) == {key_digest(key)}
    now[0] += 60
    assert digests(store) == set()
    assert store.keys()[0]["expires"] == now[0]


def test_rotation_leaves_the_old_key_its_grace_and_gives_the_new_one_its_rights(store: Store, now: list[float]) -> None:
    _, first = store.create_key("a", ["predict"], 5, "shop", 1000, ["search"])
    _, other = store.create_key("b", ["predict"])
    now[0] += 10
    _, second = store.rotate_key("a", 60)
    old, new = next(key for key in store.open_keys() if key.digest == key_digest(first)), store.open_keys()[-1]
    assert (old.expires, new.expires) == (now[0] + 60, now[0] + 1000)
    rights = (frozenset({"predict"}), 5, "shop", frozenset({"search"}))
    assert (new.scopes, new.requests_per_minute, new.owner, new.tools) == rights
    now[0] += 60
    assert digests(store) == {key_digest(second), key_digest(other)}
    with pytest.raises(InputError, match='nobody: no active key has this name or id; run "loopwright keys list"'):
        store.rotate_key("nobody", 60)


def test_rotation_never_prolongs_a_key(store: Store, now: list[float]) -> None:
    store.create_key("a", ["predict"], seconds=10)
    store.rotate_key("a", 3600)
    assert store.keys()[0]["expires"] == now[0] + 10


def test_tools_are_named_as_tools_are(store: Store) -> None:
    with pytest.raises(InputError, match="tools: 'a tool' is not the name of a tool"):
        store.create_key("a", ["predict"], tools=["a tool"])
