"""What the daily drift check compares: prompts of a day with what was trained on, its votes with the month before."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from components.config.paths import Paths
from components.datasets.formats import DatasetWriter
from components.feedback.drift import Measure
from components.feedback.store import AnswerRecord, Rating, Store, has_store
from flows import monitor as flow
from flows.monitor import monitor
from flows.orchestration.flow_run import FlowRun

DAY = 86_400


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Paths:
    """A project whose agent was trained on questions of four words, and a flow run without Prefect."""
    monkeypatch.delenv("LOOPWRIGHT_HOME", raising=False)
    monkeypatch.setattr(flow, "run_flow", lambda name, home, echo, body, **_: body(FlowRun("flow run", lambda _: None)))
    monkeypatch.setattr(flow, "effect", lambda function, *values: function(*values))
    monkeypatch.setattr("prefect.artifacts.create_markdown_artifact", lambda *_, **__: None)
    paths = Paths(tmp_path)
    with DatasetWriter(paths.collected / "talks", "talks", "conversations") as talks:
        for number in range(200):
            asked = {"role": "user", "content": f"where is name {number}?"}
            answered = {"role": "assistant", "content": "here"}
            talks.write("train", {"id": str(number), "messages": [asked, answered]})
            talks.write("test", {"id": f"t{number}", "messages": [asked | {"content": "why"}, answered]})
    with DatasetWriter(paths.collected / "texts", "texts", "documents") as texts:
        texts.write("train", {"id": "1", "text": "no conversation", "source": "here"})
    return paths


@pytest.fixture
def store(paths: Paths) -> Iterator[Store]:
    store = Store.of(paths.home)
    yield store
    store.close()


def ask(store: Store, days: float, count: int, rating: Rating | None, question: str = "where is name 7?") -> None:
    """So many questions of some days ago, each with a vote or none."""
    for number in range(count):
        name = f"{days}-{rating}-{question}-{number}"
        asked = time.time() - days * DAY
        body = {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": question}]}
        store.add_exchange(name, "agent/1", body, asked, AnswerRecord("here", "stop", 1, 1, 0.1))
        if rating:
            store.add_feedback(name, rating)


def seen(paths: Paths) -> dict[str, Measure]:
    return {one.name: one for one in monitor(paths.root, lambda _: None)}


def test_without_a_store_nothing_is_compared(paths: Paths) -> None:
    assert monitor(paths.root, print) == []
    assert not has_store(paths.home)
    (report,) = (paths.home / "reports").iterdir()
    assert "No recent requests" in report.read_text()


def test_a_day_is_compared_with_training_and_with_the_month_before_it(paths: Paths, store: Store) -> None:
    ask(store, 0.9, 30, "up")
    ask(store, 1.1, 40, "up", "an earlier question of another length")
    ask(store, 30.9, 2, "down")
    ask(store, 31.1, 100, "down")
    measures = seen(paths)
    assert {name: one.samples for name, one in measures.items()} == {
        "prompt length": 30,
        "first word": 30,
        "rating (p value)": 30,
    }
    assert measures["rating (p value)"].value == pytest.approx(0.51, abs=0.01), "30 up, 0 down after 40 up, 2 down"
    assert not any(one.drifted for one in measures.values())


def test_several_days_are_compared_with_the_month_before_them(paths: Paths, store: Store) -> None:
    ask(store, 0.9, 30, "up")
    ask(store, 2.9, 30, "up")
    ask(store, 3.1, 40, "up")
    ask(store, 33.1, 100, "down")
    measures = {measure.name: measure for measure in monitor(paths.root, lambda _: None, days=3)}
    assert measures["prompt length"].samples == 60
    assert not measures["rating (p value)"].drifted


def test_a_busy_day_leaves_the_days_before_in(paths: Paths, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.monitor._MAX_REQUESTS", 30)
    ask(store, 2, 30, "down")
    ask(store, 0.5, 40, "up")
    assert seen(paths)["rating (p value)"].drifted


def test_a_vote_that_was_changed_counts_as_it_stands(paths: Paths, store: Store) -> None:
    ask(store, 2, 30, "up")
    ask(store, 0.5, 30, "down")
    for number in range(30):
        store.add_feedback(f"0.5-down-where is name 7?-{number}", "up")
    measure = seen(paths)["rating (p value)"]
    assert (measure.samples, measure.value) == (30, 1.0)


def test_prompts_alone_and_votes_alone_are_compared(paths: Paths, store: Store) -> None:
    ask(store, 0.5, 5, None)
    assert set(seen(paths)) == {"prompt length", "first word"}
    ask(store, 0.5, 5, "up")
    assert set(seen(paths)) == {"prompt length", "first word"}, "no votes to compare with"
    ask(store, 3, 5, "up")
    assert set(seen(paths)) == {"prompt length", "first word", "rating (p value)"}


def test_the_first_prompt_of_a_conversation_is_compared_whatever_parts_it_has(paths: Paths, store: Store) -> None:
    parts = [{"type": "text", "text": "where is"}, {"type": "image_url"}, {"type": "text", "text": "name 7?"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "here"}]
    turns.append({"role": "user", "content": "now tell me at length about each of the names that you know"})
    for number in range(30):
        store.add_exchange(
            str(number), "agent/1", {"messages": turns}, time.time(), AnswerRecord("", "stop", 1, 1, 0.1)
        )
    measures = seen(paths)
    assert {name: one.samples for name, one in measures.items()} == {"prompt length": 30, "first word": 30}
    assert not any(one.drifted for one in measures.values())


def test_without_conversations_to_train_on_votes_alone_are_compared(paths: Paths, store: Store) -> None:
    shutil.rmtree(paths.collected / "talks")
    ask(store, 0.5, 5, "up")
    ask(store, 3, 5, "up")
    assert set(seen(paths)) == {"rating (p value)"}


def test_what_drifted_is_said_reported_and_raised(paths: Paths, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[tuple[str, object]] = []
    monkeypatch.setattr("prefect.events.emit_event", lambda event, _, payload: raised.append((event, payload)))
    ask(store, 3, 60, "up")
    ask(store, 0.5, 60, "up")
    said: list[str] = []
    monitor(paths.root, said.append)
    assert raised == []
    assert [line.split(",")[0].rpartition(" ")[0] for line in said] == [
        "monitor: prompt length",
        "monitor: first word",
        "monitor: rating (p value)",
    ]
    ask(store, 0.4, 60, "down", "tell me at length what a name is and where it is to be found")
    assert [one.name for one in monitor(paths.root, print) if one.drifted] == [
        "prompt length",
        "first word",
        "rating (p value)",
    ]
    assert raised == [("loopwright.drift", {"drifted": ["prompt length", "first word", "rating (p value)"]})]
    (report,) = (paths.home / "reports").iterdir()
    lines = report.read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines if line.endswith("| DRIFTED |")] == [
        "| prompt length",
        "| first word",
        "| rating (p value)",
    ]
