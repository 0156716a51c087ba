"""Following an alias: swaps to what loads, stays with what answers when something does not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from components.config.params import InputError, load_params
from serving.engine.backend import Ask, Finished, Notify, Retired, Ticket
from serving.engine.local import Engine
from serving.models.alias_watcher import Follower, Unfit, describe
from serving.models.versions import Bundled, Version

USER = {"role": "user", "content": "Hello"}
GREETING = "Grüße, naïve façade: 日本語 and \N{SNOWMAN}."
CONFIG = load_params(Path(__file__).parents[2] / "params.yaml").serve.model_copy(
    update={"max_new_tokens": 64, "max_running": 4, "max_waiting": 1, "follow_seconds": 1}
)


class Aliases:
    """Aliases that a test moves by hand, and the versions behind them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 1
        self.challenger: int | None = None
        self.tags: dict[int, dict[str, str]] = {}
        self.folders: dict[int, Path] = {}
        self.demoted: list[tuple[str, str]] = []
        self.loads: list[str] = []
        self.stamped: object = None
        self.looks = 0

    def named(self, spec: str) -> tuple[str, str | None]:
        assert spec == "agent@champion"
        self.looks += 1
        if self.number == 0:
            raise OSError("the registry is away")
        return f"agent/{self.number}", f"agent/{self.challenger}" if self.challenger else None

    def stamp(self) -> object:
        return self.stamped

    def version(self, name: str) -> Bundled:
        number = int(name.partition("/")[2])
        facts = {"name": "agent", "version": number, "tags": self.tags.get(number, {})}
        return Bundled(self.folders.get(number, self.folder), facts)

    def demote(self, version: Version, reason: str) -> None:
        if self.number == 0:
            raise OSError("the registry is away")
        self.demoted.append((str(version), reason))

    def load(self, folder: Path, name: str) -> Engine:
        self.loads.append(name)
        return Engine.load(folder, name, CONFIG)


@pytest.fixture
def alias(agent_folder: Path) -> Aliases:
    return Aliases(agent_folder)


@pytest.fixture
def follower(alias: Aliases) -> Iterator[Follower]:
    follower = Follower("agent@champion", alias, alias.load, None, share=0.25)
    yield follower
    follower.close()


def test_moved_alias_swaps_and_retires(follower: Follower, alias: Aliases) -> None:
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


def test_names_that_are_answered_to(follower: Follower, alias: Aliases) -> None:
    follower.look()
    alias.number = 2
    follower.look()
    for name in (None, "agent", "agent@champion", "agent/2", "agent/1"):
        assert follower.answers_to(name)
    for name in ("agent/3", "agent@challenger", "other", ""):
        assert not follower.answers_to(name)


def test_version_that_does_not_load_leaves_the_old_one(follower: Follower, alias: Aliases, tmp_path: Path) -> None:
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
    follower: Follower, alias: Aliases, caplog: pytest.LogCaptureFixture
) -> None:
    follower.look()
    alias.number = 0
    follower.start()
    assert follower.first.wait(60)
    assert follower.error is None
    assert follower.engine is not None
    assert follower.engine.name == "agent/1"
    deadline = time.monotonic() + 60
    while "the registry is away" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "the registry is away" in caplog.text


def test_first_model_that_does_not_load_is_reported(alias: Aliases, tmp_path: Path) -> None:
    alias.folder = tmp_path
    follower = Follower("agent@champion", alias, alias.load, None)
    follower.start()
    assert follower.first.wait(60)
    assert isinstance(follower.error, InputError)
    assert follower.engine is None
    follower.close()


def names(follower: Follower) -> tuple[str | None, str | None]:
    lineup = follower.lineup
    return tuple(engine.name if engine else None for engine in (lineup.champion, lineup.challenger))


def test_model_that_fails_before_the_swap_never_answers(follower: Follower, alias: Aliases) -> None:
    follower.look()
    alias.number, alias.tags[2] = 2, {"smoke_question": "Hello", "smoke_answer": "Something else"}
    with pytest.raises(Unfit, match="agent/2: failed its smoke test: 'Hello': answered 'Gr"):
        follower.look()
    assert names(follower) == ("agent/1", None)
    assert follower.served == {"agent/1"}
    assert [name for name, _ in alias.demoted] == ["agent/2"]
    follower.look()
    assert alias.loads == ["agent/1", "agent/2"], "not tried again"
    assert len(alias.demoted) == 1


class Fading(Engine):
    """A model that is well when it is tried beside the old one, and broken once people ask it."""

    def submit(self, ask: Ask, notify: Notify, first: bool = False) -> Ticket:
        if self.running == self.waiting == 0 and getattr(self, "asked", 0) == 2:
            with torch.no_grad():
                for weight in self.model.parameters():
                    weight.zero_()
        self.asked = getattr(self, "asked", 0) + 1
        return super().submit(ask, notify, first)


def test_model_that_fails_after_the_swap_gives_the_place_back(follower: Follower, alias: Aliases) -> None:
    follower.look()
    first = follower.engine
    alias.number, alias.tags[2] = 2, {"smoke_question": "Hello", "smoke_answer": GREETING}
    follower._load = lambda folder, name: Fading.load(folder, name, CONFIG)
    with pytest.raises(Unfit, match="agent/2: failed its smoke test"):
        follower.look()
    assert "agent/2" in follower.served, "it did answer for a moment"
    assert follower.engine is first
    assert first is not None
    done = threading.Event()
    first.submit(Ask([USER], max_tokens=1), lambda event: done.set() if isinstance(event, Finished) else None)
    assert done.wait(60), "the old engine was kept until the test"
    assert [name for name, _ in alias.demoted] == ["agent/2"]


def test_registry_that_is_away_hears_of_a_failure_later(follower: Follower, alias: Aliases) -> None:
    follower.look()
    alias.number, alias.tags[2] = 2, {"smoke_answer": "Something else"}
    demote, alias.demote = alias.demote, None  # type: ignore[method-assign, assignment]
    with pytest.raises(Unfit):
        follower.look()
    alias.demote = demote  # type: ignore[method-assign]
    follower.look()
    assert [name for name, _ in alias.demoted] == ["agent/2"]
    assert names(follower) == ("agent/1", None)


def test_challenger_comes_changes_fails_and_goes(follower: Follower, alias: Aliases, tmp_path: Path) -> None:
    follower.look()
    champion = follower.engine
    alias.challenger = 2
    follower.look()
    assert names(follower) == ("agent/1", "agent/2")
    assert [(row["id"], row["role"]) for row in describe(follower)] == [
        ("agent/1", "champion"),
        ("agent/2", "challenger"),
    ]
    alias.challenger = 3
    follower.look()
    assert names(follower) == ("agent/1", "agent/3")
    alias.challenger, alias.folders[4] = 4, tmp_path
    follower.look()
    assert names(follower) == ("agent/1", None)
    alias.challenger, alias.tags[5] = 5, {"smoke_answer": "Something else"}
    follower.look()
    follower.look()
    assert [name for name, _ in alias.demoted] == ["agent/5"]
    alias.challenger = 6
    follower.look()
    alias.challenger = None
    follower.look()
    assert names(follower) == ("agent/1", None)
    assert follower.engine is champion
    assert alias.loads == [f"agent/{number}" for number in range(1, 7)]


def test_challenger_that_wins_is_not_loaded_twice(follower: Follower, alias: Aliases) -> None:
    alias.challenger = 2
    follower.look()
    second = follower.lineup.challenger
    alias.number, alias.challenger = 2, 1
    follower.look()
    assert names(follower) == ("agent/2", "agent/1"), "and the beaten one may challenge"
    assert follower.engine is second
    assert alias.loads == ["agent/1", "agent/2"]


def test_share_is_sticky_about_right_and_shuffled_by_the_next_challenger(follower: Follower, alias: Aliases) -> None:
    people = [f"user-{number}" for number in range(2000)]

    def chosen() -> set[str]:
        engines = {who: follower.choose("agent", who) for who in people}
        assert {who: follower.choose(None, who) for who in people} == engines
        return {who for who, engine in engines.items() if engine is follower.lineup.challenger}

    alias.challenger = 2
    follower.look()
    first = chosen()
    assert 0.2 < len(first) / len(people) < 0.3
    alias.challenger = 3
    follower.look()
    second = chosen()
    assert 0.2 < len(second) / len(people) < 0.3
    assert len(first & second) / len(people) < 0.1, "independent draws: a sixteenth are in both"


def test_pinned_models_are_answered_by_themselves(follower: Follower, alias: Aliases) -> None:
    alias.challenger = 2
    follower.look()
    champion, challenger = follower.lineup.champion, follower.lineup.challenger
    assert all(
        follower.choose(model, str(who)) is champion for model in ("agent/1", "agent@champion") for who in "abcdefgh"
    )
    assert all(
        follower.choose(model, str(who)) is challenger
        for model in ("agent/2", "agent@challenger")
        for who in "abcdefgh"
    )
    assert follower.choose("agent/9", "a") is None
    assert [follower.role(model) for model in ("agent/1", "agent/2", "agent/9")] == ["champion", "challenger", "former"]
    alias.challenger = None
    follower.look()
    assert follower.choose("agent/2", "a") is champion, "whoever pinned it is not dropped"
    assert follower.choose("agent@challenger", "a") is None


def test_a_registry_that_did_not_change_is_not_asked(alias: Aliases, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(3))
    alias.stamped = "same"
    follower = Follower("agent@champion", alias, alias.load, 0.0)
    turns: list[Callable[[], None]] = [lambda: None, lambda: setattr(alias, "stamped", "another")]

    def wait(_seconds: float) -> bool:
        if (tick := next(ticks)) < len(turns):
            turns[tick]()
        return tick == len(turns)

    monkeypatch.setattr(follower, "_stop", SimpleNamespace(is_set=lambda: False, wait=wait, set=lambda: None))
    follower._follow()
    assert alias.looks == 2, "at first, and when its stamp was another"
    follower.close()


def test_what_a_look_left_to_do_is_looked_at_again(alias: Aliases, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter((False, True))
    alias.stamped, alias.number = "same", 0
    follower = Follower("agent@champion", alias, alias.load, 0.0)
    stop = SimpleNamespace(is_set=lambda: False, wait=lambda _seconds: next(ticks), set=lambda: None)
    monkeypatch.setattr(follower, "_stop", stop)
    follower._follow()
    assert alias.looks == 2, "the registry was away"
    follower.close()
