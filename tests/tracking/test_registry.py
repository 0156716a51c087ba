"""Aliases that move together: no kill leaves half a move, and going back restores what was."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest

from components.runtime.process import only_one
from components.tracking.registry import ModelVersion, Registry

Register = Callable[..., ModelVersion]
CALLS = 8
"""More than a move makes."""


class Killed(BaseException):
    """Stands for a process that ends here: nothing of ours runs after it."""


class Mortal:
    """An MLflow client whose process is killed before its call number `left` that changes something."""

    def __init__(self, client: Any, left: int) -> None:
        self.client, self.left = client, left

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("set_", "delete_")):
            if not self.left:
                raise Killed
            self.left -= 1
        return getattr(self.client, name)


def mortal(registry: Registry, left: int) -> Registry:
    doomed = Registry(registry.home)
    vars(doomed)["client"] = Mortal(registry.client, left)
    return doomed


def direct(registry: Registry) -> dict[str, int]:
    """The aliases as MLflow has them, for programs that know nothing of us."""
    aliases = registry.client.get_registered_model("agent").aliases
    return {alias: int(version) for alias, version in aliases.items()}


@pytest.mark.parametrize("left", range(CALLS))
def test_kill_between_any_two_calls_leaves_a_whole_move(registry: Registry, registered: Register, left: int) -> None:
    first, second = registered(0.5), registered(0.6)
    registry.promote(first)
    registry.alias("agent", "challenger", second)
    before, after = {"champion": 1, "challenger": 2}, {"champion": 2, "previous": 1}
    killed = False
    try:
        mortal(registry, left).promote(second)
    except Killed:
        killed = True
    assert killed == (left < 5), "the move is five calls"
    seen = Registry(registry.home).aliases("agent")
    assert seen == (after if left else before)
    assert direct(registry) == seen, "whoever looked finished it"
    back = mortal(registry, left)
    if seen == after:
        with pytest.raises(Killed) if left < 5 else nullcontext():
            back.rollback("agent")
        assert registry.aliases("agent") == {"champion": 1, "previous": 2}
        assert registry.resolve("agent/2").tags["rolled_back"] == "true"


def test_a_move_in_progress_is_seen_whole(registry: Registry, registered: Register) -> None:
    first, second = registered(0.5), registered(0.6)
    registry.promote(first)
    registry.tag(second, {"rolled_back": "true"})
    with pytest.raises(Killed):
        mortal(registry, 1).promote(registry.resolve("agent/2"))
    with only_one(registry.home / "mlflow", "aliases"):  # its mover lives: nobody else finishes it
        named = [str(registry.resolve(f"agent@{alias}")) for alias in ("champion", "previous")]
        assert named == ["agent/2", "agent/1"]
        assert registry.resolve("agent@champion").tags["rolled_back"] == "false", "told with the move"
        assert direct(registry) == {"champion": 1}
    registry.aliases("agent")
    assert direct(registry) == {"champion": 2, "previous": 1}


def test_withdrawal_restores_every_alias_and_happens_once(registry: Registry, registered: Register) -> None:
    versions = [registered(score / 10) for score in range(4)]
    for version in versions[:2]:
        registry.promote(version)
    registry.alias("agent", "challenger", versions[3])
    before = registry.aliases("agent")
    assert before == {"champion": 2, "previous": 1, "challenger": 4}
    registry.promote(versions[2])
    assert registry.withdraw(versions[2], "says nothing")
    assert registry.aliases("agent") == before
    assert not registry.withdraw(versions[2], "says nothing"), "another server was first"
    assert registry.aliases("agent") == before
    tags = registry.resolve("agent/3").tags
    assert (tags["smoke_failed"], tags["rolled_back"]) == ("says nothing", "true")
    registry.promote(registry.resolve("agent/3"))
    assert registry.resolve("agent/3").tags["smoke_failed"] == "", "a person's word counts more"


def test_withdrawal_behind_another_move_leaves_no_version_two_aliases(registry: Registry, registered: Register) -> None:
    first, second, third = registered(0.4), registered(0.5), registered(0.6)
    registry.promote(first)
    registry.promote(second)
    registry.alias("agent", "challenger", third)
    assert registry.withdraw(second, "says nothing")
    assert registry.aliases("agent") == {"champion": 1, "challenger": 3}


def test_sole_champion_that_fails_stays(registry: Registry, registered: Register) -> None:
    version = registered(0.5)
    registry.promote(version)
    assert not registry.withdraw(version, "says nothing")
    assert registry.aliases("agent") == {"champion": 1}
    assert registry.resolve("agent/1").tags["smoke_failed"] == "says nothing"
    assert registry.aliases("nobody") == {}


def test_the_stamp_is_another_one_after_each_write(
    registry: Registry, registered: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = registered(0.1)
    before = registry.stamp()
    assert before
    assert registry.aliases("agent") == {}
    assert registry.stamp() == before, "reading is no change"
    registry.promote(version)
    assert registry.stamp() != before
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert registry.stamp() is None, "the file here says nothing of a server's"
