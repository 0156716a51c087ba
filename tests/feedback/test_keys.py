"""API keys on record: nothing of the key itself, and nothing that opens after it was revoked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from components.config.params import InputError
from components.feedback.keys import key_digest
from components.feedback.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store.of(tmp_path)
    yield store
    store.close()


def test_the_key_is_nowhere_on_disk(store: Store, tmp_path: Path) -> None:
    _, key = store.create_key("laptop", ["predict"])
    assert key.startswith("lw-")
    assert len(key) >= 43
    for file in tmp_path.iterdir():
        assert key.encode() not in file.read_bytes()
        assert key.removeprefix("lw-").encode() not in file.read_bytes()
    assert store.open_keys()[0].digest == key_digest(key)


def test_a_revoked_key_stays_listed_and_opens_nothing(store: Store) -> None:
    first, _ = store.create_key("one", ["feedback", "predict"], 30)
    second, _ = store.create_key("two", ["admin"])
    store.revoke_key(first)
    assert [key.id for key in store.open_keys()] == [second]
    listed = store.keys()
    assert [(key["id"], key["revoked"] is None) for key in listed] == [(first, False), (second, True)]
    assert listed[0]["scopes"] == ["predict", "feedback"]
    assert "digest" not in listed[0]
    with pytest.raises(InputError, match=f"{first}: no active key has this id"):
        store.revoke_key(first)


def test_scopes_open_what_they_say_and_admin_opens_all(store: Store) -> None:
    for scopes in (["predict"], ["feedback"], ["admin"]):
        store.create_key("of one", scopes)
    predict, feedback, admin = store.open_keys()
    assert [predict.opens("predict"), predict.opens("feedback"), predict.opens("admin")] == [True, False, False]
    assert [feedback.opens("predict"), feedback.opens("feedback"), feedback.opens("admin")] == [False, True, False]
    assert [admin.opens("predict"), admin.opens("feedback"), admin.opens("admin")] == [True, True, True]


@pytest.mark.parametrize(
    ("name", "scopes", "limit", "said"),
    [
        (" ", ["predict"], None, "name: ' ' is empty"),
        ("x" * 65, ["predict"], None, "longer than 64 characters"),
        ("a", ["write"], None, "scope: 'write' is not one of predict, feedback, tools, admin"),
        ("a", [], None, "scope: 'none' is not one of"),
        ("a", ["predict"], 0, "requests_per_minute: 0 is below 1"),
    ],
)
def test_wrong_keys_are_not_made(store: Store, name: str, scopes: list[str], limit: int | None, said: str) -> None:
    with pytest.raises(InputError, match=said):
        store.create_key(name, scopes, limit)
    assert store.keys() == []
