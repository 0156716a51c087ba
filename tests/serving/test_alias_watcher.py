"""Following an alias: swaps to what loads, stays with what answers when something does not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from components.config.errors import Unavailable
from components.config.params import InputError, load_params
from serving.engine.backend import BackendRetired, Completion, GenerationRequest, GenerationTask, Notify
from serving.engine.local import LocalEngine
from serving.models.alias_watcher import LONGEST_PAUSE_SECONDS, AliasWatcher, ModelRejected, poll_pause
from serving.models.state import describe
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

    def resolve(self, spec: str) -> tuple[str, str | None]:
        assert spec == "agent@champion"
        self.looks += 1
        if self.number == 0:
            raise OSError("the registry is away")
        return f"agent/{self.number}", f"agent/{self.challenger}" if self.challenger else None

    def etag(self) -> object:
        return self.stamped

    def version(self, name: str) -> Bundled:
        number = int(name.partition("/")[2])
        facts = {"name": "agent", "version": number, "tags": self.tags.get(number, {})}
        return Bundled(self.folders.get(number, self.folder), facts)

    def names(self, _name: str) -> set[str]:
        return set()

    def mark_failed(self, version: Version, reason: str, _device: str) -> None:
        if self.number == 0:
            raise OSError("the registry is away")
        self.demoted.append((str(version), reason))

    def load(self, folder: Path, name: str) -> LocalEngine:
        self.loads.append(name)
        return LocalEngine.load(folder, name, CONFIG)


@pytest.fixture
def alias(agent_folder: Path) -> Aliases:
    return Aliases(agent_folder)


@pytest.fixture
def watcher(alias: Aliases) -> Iterator[AliasWatcher]:
    watcher = AliasWatcher("agent@champion", alias, alias.load, None, share=0.25)
    yield watcher
    watcher.close()


def test_moved_alias_swaps_and_retires(watcher: AliasWatcher, alias: Aliases) -> None:
    assert describe(watcher) == []
    watcher.update()
    first = watcher.engine
    assert first is not None
    watcher.update()
    assert watcher.engine is first
    alias.number = 2
    watcher.update()
    assert watcher.engine is not None
    assert watcher.engine.name == "agent/2"
    assert [model["id"] for model in describe(watcher)] == ["agent/2"]
    with pytest.raises(BackendRetired):
        first.submit(GenerationRequest([]), lambda event: None)


def test_names_that_are_answered_to(watcher: AliasWatcher, alias: Aliases) -> None:
    watcher.update()
    alias.number = 2
    watcher.update()
    for name in (None, "agent", "agent@champion", "agent/2", "agent/1"):
        assert watcher.answers_to(name)
    for name in ("agent/3", "agent@challenger", "other", ""):
        assert not watcher.answers_to(name)


def test_version_that_does_not_load_leaves_the_old_one(watcher: AliasWatcher, alias: Aliases, tmp_path: Path) -> None:
    watcher.update()
    good, alias.folder, alias.number = alias.folder, tmp_path, 2
    with pytest.raises(InputError):
        watcher.update()
    watcher.update()  # not tried again
    assert watcher.engine is not None
    assert watcher.engine.name == "agent/1"
    alias.folder, alias.number = good, 3
    watcher.update()
    assert watcher.engine.name == "agent/3"


def test_version_that_cannot_be_downloaded_is_tried_again(
    watcher: AliasWatcher, alias: Aliases, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(name: str) -> Bundled:
        raise Unavailable(f"{name}: cannot be downloaded")

    watcher.update()
    alias.number = 2
    with monkeypatch.context() as patch:
        patch.setattr(alias, "version", away)
        with pytest.raises(Unavailable):
            watcher.update()
    assert watcher.engine is not None
    assert (watcher.engine.name, watcher.rejected) == ("agent/1", 0)
    watcher.update()
    assert watcher.engine.name == "agent/2"


def test_registry_that_is_away_leaves_the_old_one(
    watcher: AliasWatcher, alias: Aliases, caplog: pytest.LogCaptureFixture
) -> None:
    watcher.update()
    alias.number = 0
    watcher.start()
    assert watcher.first.wait(60)
    assert watcher.error is None
    assert watcher.engine is not None
    assert watcher.engine.name == "agent/1"
    deadline = time.monotonic() + 60
    while "the registry is away" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "the registry is away" in caplog.text


def test_first_model_that_does_not_load_is_reported(alias: Aliases, tmp_path: Path) -> None:
    alias.folder = tmp_path
    watcher = AliasWatcher("agent@champion", alias, alias.load, None)
    watcher.start()
    assert watcher.first.wait(60)
    assert isinstance(watcher.error, InputError)
    assert watcher.engine is None
    watcher.close()


def names(watcher: AliasWatcher) -> tuple[str | None, str | None]:
    serving_models = watcher.serving_models
    return tuple(engine.name if engine else None for engine in (serving_models.champion, serving_models.challenger))


def test_model_that_fails_before_the_swap_never_answers(watcher: AliasWatcher, alias: Aliases) -> None:
    watcher.update()
    alias.number, alias.tags[2] = 2, {"smoke_question": "Hello", "smoke_answer": "Something else"}
    with pytest.raises(ModelRejected, match="agent/2: failed its smoke test: 'Hello': answered 'Gr"):
        watcher.update()
    assert names(watcher) == ("agent/1", None)
    assert watcher.served == {"agent/1"}
    assert [name for name, _ in alias.demoted] == ["agent/2"]
    watcher.update()
    assert alias.loads == ["agent/1", "agent/2"], "not tried again"
    assert len(alias.demoted) == 1


class Fading(LocalEngine):
    """A model that is well when it is tried beside the old one, and broken once people ask it."""

    def submit(self, ask: GenerationRequest, notify: Notify, first: bool = False) -> GenerationTask:
        if self.running == self.waiting == 0 and getattr(self, "asked", 0) == 2:
            with torch.no_grad():
                for weight in self.model.parameters():
                    weight.zero_()
        self.asked = getattr(self, "asked", 0) + 1
        return super().submit(ask, notify, first)


def test_model_that_fails_after_the_swap_gives_the_place_back(watcher: AliasWatcher, alias: Aliases) -> None:
    watcher.update()
    first = watcher.engine
    alias.number, alias.tags[2] = 2, {"smoke_question": "Hello", "smoke_answer": GREETING}
    watcher._load = lambda folder, name: Fading.load(folder, name, CONFIG)
    with pytest.raises(ModelRejected, match="agent/2: failed its smoke test"):
        watcher.update()
    assert "agent/2" in watcher.served, "it did answer for a moment"
    assert watcher.engine is first
    assert first is not None
    done = threading.Event()
    first.submit(
        GenerationRequest([USER], max_tokens=1), lambda event: done.set() if isinstance(event, Completion) else None
    )
    assert done.wait(60), "the old engine was kept until the test"
    assert [name for name, _ in alias.demoted] == ["agent/2"]


def test_registry_that_is_away_hears_of_a_failure_later(watcher: AliasWatcher, alias: Aliases) -> None:
    watcher.update()
    alias.number, alias.tags[2] = 2, {"smoke_answer": "Something else"}
    mark_failed, alias.mark_failed = alias.mark_failed, None  # type: ignore[method-assign, assignment]
    with pytest.raises(ModelRejected):
        watcher.update()
    alias.mark_failed = mark_failed  # type: ignore[method-assign]
    watcher.update()
    assert [name for name, _ in alias.demoted] == ["agent/2"]
    assert names(watcher) == ("agent/1", None)


def test_challenger_comes_changes_fails_and_goes(watcher: AliasWatcher, alias: Aliases, tmp_path: Path) -> None:
    watcher.update()
    champion = watcher.engine
    alias.challenger = 2
    watcher.update()
    assert names(watcher) == ("agent/1", "agent/2")
    assert [(row["id"], row["role"]) for row in describe(watcher)] == [
        ("agent/1", "champion"),
        ("agent/2", "challenger"),
    ]
    alias.challenger = 3
    watcher.update()
    assert names(watcher) == ("agent/1", "agent/3")
    alias.challenger, alias.folders[4] = 4, tmp_path
    watcher.update()
    assert names(watcher) == ("agent/1", None)
    alias.challenger, alias.tags[5] = 5, {"smoke_answer": "Something else"}
    watcher.update()
    watcher.update()
    assert [name for name, _ in alias.demoted] == ["agent/5"]
    alias.challenger = 6
    watcher.update()
    alias.challenger = None
    watcher.update()
    assert names(watcher) == ("agent/1", None)
    assert watcher.engine is champion
    assert alias.loads == [f"agent/{number}" for number in range(1, 7)]


def test_challenger_that_wins_is_not_loaded_twice(watcher: AliasWatcher, alias: Aliases) -> None:
    alias.challenger = 2
    watcher.update()
    second = watcher.serving_models.challenger
    alias.number, alias.challenger = 2, 1
    watcher.update()
    assert names(watcher) == ("agent/2", "agent/1"), "and the beaten one may challenge"
    assert watcher.engine is second
    assert alias.loads == ["agent/1", "agent/2"]


def test_share_is_sticky_about_right_and_shuffled_by_the_next_challenger(watcher: AliasWatcher, alias: Aliases) -> None:
    people = [f"user-{number}" for number in range(2000)]

    def chosen() -> set[str]:
        engines = {who: watcher.choose("agent", who) for who in people}
        assert {who: watcher.choose(None, who) for who in people} == engines
        return {who for who, engine in engines.items() if engine is watcher.serving_models.challenger}

    alias.challenger = 2
    watcher.update()
    first = chosen()
    assert 0.2 < len(first) / len(people) < 0.3
    alias.challenger = 3
    watcher.update()
    second = chosen()
    assert 0.2 < len(second) / len(people) < 0.3
    assert len(first & second) / len(people) < 0.1, "independent draws: a sixteenth are in both"


def test_pinned_models_are_answered_by_themselves(watcher: AliasWatcher, alias: Aliases) -> None:
    alias.challenger = 2
    watcher.update()
    champion, challenger = watcher.serving_models.champion, watcher.serving_models.challenger
    assert all(
        watcher.choose(model, str(who)) is champion for model in ("agent/1", "agent@champion") for who in "abcdefgh"
    )
    assert all(
        watcher.choose(model, str(who)) is challenger for model in ("agent/2", "agent@challenger") for who in "abcdefgh"
    )
    assert watcher.choose("agent/9", "a") is None
    assert [watcher.role(model) for model in ("agent/1", "agent/2", "agent/9")] == ["champion", "challenger", "former"]
    alias.challenger = None
    watcher.update()
    assert watcher.choose("agent/2", "a") is champion, "whoever pinned it is not dropped"
    assert watcher.choose("agent@challenger", "a") is None


def test_a_registry_that_did_not_change_is_not_asked(alias: Aliases, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(3))
    alias.stamped = "same"
    watcher = AliasWatcher("agent@champion", alias, alias.load, 0.0)
    turns: list[Callable[[], None]] = [lambda: None, lambda: setattr(alias, "stamped", "another")]

    def wait(_seconds: float) -> bool:
        if (tick := next(ticks)) < len(turns):
            turns[tick]()
        return tick == len(turns)

    monkeypatch.setattr(watcher, "_stop", SimpleNamespace(is_set=lambda: False, wait=wait, set=lambda: None))
    watcher._watch_source()
    assert alias.looks == 2, "at first, and when its stamp was another"
    watcher.close()


def test_what_a_look_left_to_do_is_looked_at_again(alias: Aliases, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter((False, True))
    alias.stamped, alias.number = "same", 0
    watcher = AliasWatcher("agent@champion", alias, alias.load, 0.0)
    stop = SimpleNamespace(is_set=lambda: False, wait=lambda _seconds: next(ticks), set=lambda: None)
    monkeypatch.setattr(watcher, "_stop", stop)
    watcher._watch_source()
    assert alias.looks == 2, "the registry was away"
    watcher.close()


class Others:
    """What the other replicas have loaded."""

    def __init__(self) -> None:
        self.loaded = {"agent/1"}

    def is_everywhere(self, spec: str, version: str) -> bool:
        return spec == "agent@champion" and version in self.loaded

    def loaded_elsewhere(self, spec: str) -> set[str]:
        return self.loaded


@pytest.fixture
def others() -> Others:
    return Others()


@pytest.fixture
def handing_over(alias: Aliases, others: Others) -> Iterator[AliasWatcher]:
    """A watcher that polls, whose former champion stays for an hour."""
    watcher = AliasWatcher("agent@champion", alias, alias.load, 0.01, 0.0, 3600.0, others)  # type: ignore[arg-type]
    yield watcher
    watcher.close()


def name_of(chosen: object) -> str:
    return str(getattr(chosen, "name", None))


def test_a_conversation_stays_with_its_model_and_new_ones_wait_for_all_replicas(
    handing_over: AliasWatcher, alias: Aliases, others: Others
) -> None:
    handing_over.start()
    assert handing_over.first.wait(60)
    alias.number = 2
    wait_until(lambda: name_of(handing_over.engine) == "agent/2")
    assert name_of(handing_over.choose(None, "ada")) == "agent/1", "another replica would answer with it"
    assert name_of(handing_over.choose("agent/2", "ada")) == "agent/2"
    assert name_of(handing_over.choose(None, "ada", "agent/2")) == "agent/2", "a conversation of another replica"
    others.loaded.add("agent/2")
    wait_until(lambda: name_of(handing_over.choose(None, "ada")) == "agent/2")
    assert name_of(handing_over.choose(None, "ada", "agent/1")) == "agent/1"
    assert name_of(handing_over.choose("agent", "ada", "agent/1")) == "agent/1"
    alias.number = 3
    wait_until(lambda: name_of(handing_over.engine) == "agent/3")
    assert name_of(handing_over.choose(None, "ada", "agent/1")) != "agent/1", "only the last champion is kept"


def test_a_replica_that_starts_in_a_handover_has_the_former_champion_too(
    handing_over: AliasWatcher, alias: Aliases
) -> None:
    alias.number = 2
    handing_over.update()
    assert name_of(handing_over.choose(None, "ada")) == "agent/1"
    assert name_of(handing_over.choose(None, "ada", "agent/2")) == "agent/2"


def test_nothing_goes_on_with_a_model_that_was_rolled_back(handing_over: AliasWatcher, alias: Aliases) -> None:
    handing_over.update()
    for alias.number in (2, 1):
        handing_over.update()
    assert name_of(handing_over.choose(None, "ada", "agent/2")) == "agent/1"
    assert [engine.name for engine in handing_over.serving_models] == ["agent/1"]


def test_the_former_champion_is_retired_when_its_time_is_over(alias: Aliases) -> None:
    watcher = AliasWatcher("agent@champion", alias, alias.load, 0.01, handover_seconds=0.05)
    watcher.start()
    try:
        assert watcher.first.wait(60)
        first, alias.number = watcher.engine, 2
        wait_until(lambda: [engine.name for engine in watcher.engines] == ["agent/2"])
        assert first is not None
        with pytest.raises(BackendRetired):
            first.submit(GenerationRequest([]), lambda event: None)
    finally:
        watcher.close()


def test_a_version_that_another_replica_served_is_answered(watcher: AliasWatcher, alias: Aliases) -> None:
    alias.names = lambda name: {"agent/1", "agent/2"}  # type: ignore[method-assign]
    alias.number = 2
    watcher.update()
    assert watcher.answers_to("agent/1")
    assert not watcher.answers_to("agent/3")


def test_other_words_on_another_device_refuse_nothing(watcher: AliasWatcher, alias: Aliases) -> None:
    watcher.update()
    alias.number, alias.tags[2] = 2, {"smoke_answer": "Something else", "smoke_device": "cuda bfloat16"}
    watcher.update()
    assert name_of(watcher.engine) == "agent/2"
    alias.number, alias.tags[3] = 3, {"smoke_answer": "Something else", "smoke_device": "cpu float32"}
    with pytest.raises(ModelRejected, match="agent/3: failed its smoke test"):
        watcher.update()


def test_polls_of_a_source_that_is_away_become_rare_and_differ() -> None:
    pauses = [poll_pause(2.0, failures) for failures in range(12)]
    assert pauses[0] <= 2.5
    assert 6.0 <= pauses[2] <= 10.0
    assert 0.75 * LONGEST_PAUSE_SECONDS <= pauses[-1] <= 1.25 * LONGEST_PAUSE_SECONDS
    assert len({poll_pause(2.0, 3) for _ in range(8)}) > 1


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
