"""What an improvement starts from after a revocation: real registry, store and stages, without DVC and Prefect.

`tests/test_scenario.py` goes the same way through both, by command.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from components.config.loop_settings import FeedbackConfig
from components.config.params import InputError, Refused
from components.config.paths import Paths
from components.evaluation.compare_agents import judge
from components.feedback.curate import curate
from components.feedback.ingest import ingest
from components.feedback.lineage import feedback_ids, trained_versions
from components.feedback.store import AnswerRecord, Store
from components.runtime.stage import digest
from components.tracking.registry import ModelVersion, Registry
from components.training.align import align
from flows import improve as flow
from flows.improve import Improvement, improve
from flows.orchestration.flow_run import FlowRun
from flows.release import Release
from tests.feedback.project import new_run, write_project

Register = Callable[..., ModelVersion]
CONFIG = FeedbackConfig(max_items=100, max_items_per_user=100, improve_after=20)
CALL = {"type": "call", "name": "lookup", "arguments": {"name": "name"}}
FEW_STEPS = {
    "align__max_steps": 2,
    "align__warmup_steps": 0,
    "align__checkpoint_seconds": 60.0,
    "judge__max_questions": 4,
}


@pytest.fixture
def paths(home: Path, monkeypatch: pytest.MonkeyPatch) -> Paths:
    """A project with earlier conversations, and a state folder over MLflow's tables."""
    monkeypatch.setenv("LOOPWRIGHT_HOME", str(home))
    return write_project(home.parent)


@pytest.fixture
def store(home: Path) -> Iterator[Store]:
    store = Store.of(home)
    yield store
    store.close()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for one another where others use the cores make tiny products slow."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def improved(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Improvement]:
    """`improve` whose stages and effects are called one after another in this process."""

    def stages(*_: Any) -> None:
        for name, stage in (("curate", curate), ("align", align), ("judge", judge)):
            stage(new_run(paths, name, **FEW_STEPS))
        made = {"path": "data/models/candidate", "md5": digest(paths.candidate)}
        (paths.root / "dvc.lock").write_text(json.dumps({"stages": {"align": {"outs": [made]}}}))

    def publish(registry: Registry, version: ModelVersion, reason: str, *_: Any) -> Release:
        registry.tag(version, {"gate": "passed", "gate_reason": reason})
        registry.promote(version)
        return Release(str(version), "promoted", 0.0)

    monkeypatch.setattr("prefect.artifacts.create_markdown_artifact", lambda *_, **__: None)
    monkeypatch.setattr(flow, "run_flow", lambda name, home, echo, body, **_: body(FlowRun("flow run", lambda _: None)))
    monkeypatch.setattr(flow, "effect", lambda function, *values, **_: function(*values))
    monkeypatch.setattr(flow, "stage_states", lambda *_, **__: [])
    monkeypatch.setattr(flow, "bring_up_to_date", stages)
    monkeypatch.setattr(flow, "publish", publish)
    monkeypatch.setattr(flow, "push_to_remote", lambda *_: None)
    return lambda **options: improve(paths.root, echo=lambda _: None, **options)


def correct(store: Store, paths: Paths, first: int, count: int) -> list[str]:
    """Corrections of so many answers, taken in; returns their ids."""
    ids = []
    for number in range(first, first + count):
        body = {"messages": [{"role": "user", "content": f"where is name_{number}?"}]}
        store.add_request(f"c{number}", "agent/1", body)
        result = {"type": "result", "name": "lookup", "content": f"module_{number}"}
        store.add_answer(f"c{number}", AnswerRecord("no idea", "stop", 5, 5, 0.1, [CALL, result]))
        ids.append(store.add_feedback(f"c{number}", "down", f"in module_{number}", user="user:a"))
    assert ingest(store, paths.feedback, CONFIG, lambda rows: {}).accepted == count
    return ids


def overrule(registry: Registry, refused: Callable[..., Improvement]) -> ModelVersion:
    """An improvement that the gate refuses, promoted by a person."""
    with pytest.raises(Refused, match=r"no significant gain|too little held-out feedback"):
        refused()
    version = registry.resolve("agent@challenger")
    registry.promote(version)
    return registry.resolve("agent@champion")


def mode(paths: Paths) -> str:
    return str(json.loads((paths.metrics / "judge.json").read_text())["mode"])


def test_a_champion_that_learned_what_was_revoked_is_replaced_from_its_nearest_clean_ancestor(
    paths: Paths, registry: Registry, store: Store, improved: Callable[..., Improvement]
) -> None:
    registry.promote(registry.register(paths.start, "agent", {"score": 0.0}, {}, None))
    early = correct(store, paths, 0, 8)
    second = overrule(registry, improved)
    late = correct(store, paths, 8, 8)
    third = overrule(registry, improved)
    assert [one.tags["parent"] for one in (second, third)] == ["agent/1", "agent/2"]
    assert set(feedback_ids(second)) < set(early)
    assert set(feedback_ids(third)) & set(late)
    assert mode(paths) == "gain"
    assert improved().outcome == "nothing new"

    # One generation back: what the champion alone learned.
    (gone, *_) = sorted(set(feedback_ids(third)) - set(feedback_ids(second)))
    store.revoke(gone, "poison")
    fourth = registry.resolve(improved().champion)
    assert (str(fourth), fourth.tags["parent"], mode(paths)) == ("agent/4", "agent/2", "replace")
    assert fourth.tags["gate_reason"].endswith("nothing regresses without it")
    assert set(feedback_ids(fourth)) == set(feedback_ids(third)) - {gone}
    assert trained_versions(registry, gone) == ["agent/3"]
    assert improved().outcome == "nothing new"

    # Two generations back: what the champion's parent learned is in the champion too.
    (oldest, *_) = sorted(set(feedback_ids(second)))
    store.revoke(oldest, "poison")
    fifth = registry.resolve(improved().champion)
    assert (str(fifth), fifth.tags["parent"], mode(paths)) == ("agent/5", "agent/1", "replace")
    assert set(feedback_ids(fifth)) == set(feedback_ids(third)) - {gone, oldest}
    assert "agent/5" not in trained_versions(registry, oldest)
    outcomes = [(row["candidate"], row["outcome"]) for row in store.improvements()]
    assert outcomes == [(f"agent/{n}", "refused" if n < 4 else "promoted") for n in range(2, 6)]
    assert improved().outcome == "nothing new"


@pytest.fixture
def line(registry: Registry, registered: Register, store: Store, paths: Paths) -> list[str]:
    """Three generations that learned an item each after the first, which learned none; returns the items."""
    items = correct(store, paths, 0, 4)
    (registry.home / "agent").mkdir()
    for number, learned in enumerate([[], items[:1], items[1:2], items[2:3]]):
        (registry.home / "agent" / "lessons.json").write_text(json.dumps({"feedback": learned}))
        parent = {"parent": f"agent/{number}"} if number else {}
        registry.promote(registered(0.5, **parent))
    store.add_improvement(4, "agent/4", "promoted", "better")
    return items


def test_a_dry_run_states_what_an_improvement_begins_with(
    paths: Paths, registry: Registry, store: Store, improved: Callable[..., Improvement]
) -> None:
    registry.promote(registry.register(paths.start, "agent", {"score": 0.0}, {}, None))
    assert improved(dry_run=True).outcome == "nothing new"
    correct(store, paths, 0, 8)
    plan = improved(dry_run=True)
    assert (plan.outcome, plan.champion) == ("would train", "agent/1")
    assert plan.reason == "8 accepted items of feedback wait, and training starts from agent/1"
    assert (store.waiting(), len(registry.versions("agent"))) == (8, 1)


@pytest.mark.parametrize("revoked", [{3: 4, 2: 3, 1: 2, 0: 1}, {0: 1}])
def test_it_starts_from_the_nearest_ancestor_that_learned_nothing_revoked(
    revoked: dict[int, int],
    line: list[str],
    paths: Paths,
    store: Store,
    improved: Callable[..., Improvement],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One item after another is revoked, the last of which was held out and learned by nobody."""

    def look(*_: Any, **__: Any) -> None:
        raise InterruptedError

    monkeypatch.setattr(flow, "stage_states", look)
    assert improved().outcome == "nothing new"
    for number, start in revoked.items():
        store.revoke(line[number])
        if start == 4:
            assert improved().outcome == "nothing new"
        with pytest.raises(InterruptedError):
            improved(force=start == 4)
        assert json.loads((paths.start / "origin.json").read_text()) == {"version": f"agent/{start}"}
        wanted = "gain" if start == 4 else "replace"
        assert json.loads((paths.champion / "gate.json").read_text()) == {"mode": wanted}
        assert line[number] in json.loads((paths.feedback / "withdrawn.json").read_text())
        learned = [[], line[:1], line[1:2], line[2:3]][start - 1]
        assert json.loads((paths.start / "lessons.json").read_text()) == {"feedback": learned}
        assert json.loads((paths.champion / "lessons.json").read_text()) == {"feedback": line[2:3]}


def test_without_an_ancestor_that_learned_nothing_revoked_it_refuses(
    paths: Paths, registry: Registry, registered: Register, store: Store, improved: Callable[..., Improvement]
) -> None:
    """As when the versions before were removed: what was revoked is in the weights of all that are left."""
    (item, *_) = correct(store, paths, 0, 3)
    (registry.home / "agent").mkdir()
    (registry.home / "agent" / "lessons.json").write_text(json.dumps({"feedback": [item]}))
    registry.promote(registered(0.5))
    store.revoke(item)
    with pytest.raises(InputError, match=r"agent/1: each of its ancestors was trained on revoked feedback; train a"):
        improved()


def test_an_improvement_killed_after_its_verdict_is_recorded_once(
    paths: Paths, registry: Registry, registered: Register, store: Store, improved: Callable[..., Improvement]
) -> None:
    correct(store, paths, 0, 3)
    registry.promote(registered(0.5))
    registered(0.6, feedback_sequence="3", gate="refused", gate_reason="no significant gain")
    registered(0.7, feedback_sequence="3", gate="passed", gate_reason="gains")  # killed before it was promoted
    for _ in range(2):
        assert improved().outcome == "nothing new"
    assert [(row["candidate"], row["outcome"], row["reason"]) for row in store.improvements()] == [
        ("agent/2", "refused", "no significant gain")
    ]
    registry.promote(registry.resolve("agent/3"))
    improved()
    assert [(row["candidate"], row["outcome"]) for row in store.improvements()][1:] == [("agent/3", "promoted")]


def test_without_a_champion_or_earlier_data_there_is_nothing_to_improve(
    paths: Paths, registry: Registry, registered: Register, improved: Callable[..., Improvement]
) -> None:
    with pytest.raises(InputError, match='agent@champion: there is no champion to improve; run "loopwright run"'):
        improved()
    registry.promote(registered(0.5))
    paths.collected.rename(paths.root / "aside")
    with pytest.raises(InputError, match='data/collected: not found; run "loopwright run" for the earlier data'):
        improved()
