"""Following an alias: swaps to what loads, stays with what answers when something does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from components.config import InputError, ServeConfig
from serving.engine import Ask, Engine, Retired
from serving.follow import Bundled, Follower, describe

CONFIG = ServeConfig(max_body_bytes=2**20, max_new_tokens=64, max_steps=4, max_waiting=1, follow_seconds=1)


class Alias:
    """An alias that a test moves by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 1

    def resolve(self, spec: str) -> Bundled:
        assert spec == "agent@champion"
        if self.number == 0:
            raise OSError("the registry is away")
        return Bundled(self.folder, {"name": "agent", "version": self.number})


@pytest.fixture
def alias(agent_folder: Path) -> Alias:
    return Alias(agent_folder)


@pytest.fixture
def follower(alias: Alias) -> Any:
    follower = Follower("agent@champion", alias.resolve, lambda folder, name: Engine.load(folder, name, CONFIG), None)
    yield follower
    follower.close()


def test_moved_alias_swaps_and_retires(follower: Follower, alias: Alias) -> None:
    assert describe(follower) == []
    follower.look()
    first = follower.engine
    assert first is not None
    follower.look()
    assert follower.engine is first
    alias.number = 2
    follower.look()
    assert follower.engine is not None
    assert follower.engine.name == "agent/2"
    assert [model["id"] for model in describe(follower)] == ["agent/2"]
    with pytest.raises(Retired):
        first.submit(Ask([]), lambda event: None)


def test_names_that_are_answered_to(follower: Follower, alias: Alias) -> None:
    follower.look()
    alias.number = 2
    follower.look()
    for name in (None, "agent", "agent@champion", "agent/2", "agent/1"):
        assert follower.answers_to(name)
    for name in ("agent/3", "agent@challenger", "other", ""):
        assert not follower.answers_to(name)


def test_version_that_does_not_load_leaves_the_old_one(follower: Follower, alias: Alias, tmp_path: Path) -> None:
    follower.look()
    good, alias.folder, alias.number = alias.folder, tmp_path, 2
    with pytest.raises(InputError):
        follower.look()
    follower.look()  # not tried again
    assert follower.engine is not None
    assert follower.engine.name == "agent/1"
    alias.folder, alias.number = good, 3
    follower.look()
    assert follower.engine.name == "agent/3"


def test_registry_that_is_away_leaves_the_old_one(
    follower: Follower, alias: Alias, caplog: pytest.LogCaptureFixture
) -> None:
    follower.look()
    alias.number = 0
    follower.start()
    assert follower.first.wait(60)
    assert follower.error is None
    assert follower.engine is not None
    assert follower.engine.name == "agent/1"
    assert "the registry is away" in caplog.text


def test_first_model_that_does_not_load_is_reported(alias: Alias, tmp_path: Path) -> None:
    alias.folder = tmp_path
    follower = Follower("agent@champion", alias.resolve, lambda folder, name: Engine.load(folder, name, CONFIG), None)
    follower.start()
    assert follower.first.wait(60)
    assert isinstance(follower.error, InputError)
    assert follower.engine is None
    follower.close()
