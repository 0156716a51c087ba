"""Votes on MLflow's traces, and corrections that people enter there; in a real MLflow."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.entities import AssessmentSource, Expectation

from components.feedback.assessments import exchange
from components.feedback.store import AnswerRecord, Store
from components.tracking.assessments import EXPECTED, RATING
from components.tracking.mlflow_client import connect
from components.tracking.mlflow_database import EXPERIMENT
from components.tracking.traces import Span, Traces

ALICE = AssessmentSource("HUMAN", "alice")


class Traced:
    """A state folder with one traced answer."""

    def __init__(self, home: Path) -> None:
        self.home, self.id = home, "chatcmpl-1"
        self.store = Store.of(home)
        body = {"messages": [{"role": "user", "content": "What is 6*7?"}]}
        self.store.add_exchange(self.id, "agent/1", body, time.time(), AnswerRecord("41", "stop", 5, 1, 0.1))
        traces, now = Traces(home, share=1.0), time.time()
        traces.add(Span("answer", "AGENT", now - 1, now, body, "41"), [], {"completion_id": self.id})
        traces.close(seconds=60.0)

    @property
    def trace(self) -> Any:
        client = connect(self.home)
        experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
        (trace,) = client.search_traces(locations=[experiment], include_spans=False)
        return trace.info

    def assessments(self) -> list[tuple[str, Any, str, str | None]]:
        assessments = [
            (each.name, (each.feedback or each.expectation).value, each.source.source_id, each.rationale)
            for each in self.trace.assessments
        ]
        return sorted(assessments, key=lambda row: row[0])

    def votes(self) -> list[tuple[str, str | None, str, bool]]:
        """Rating, correction, owner and whether it is the current one."""
        votes = self.store.completion(self.id)["feedback"]
        return [(vote["rating"], vote["correction"], vote["owner"], vote["replaced_by"] is None) for vote in votes]


@pytest.fixture
def traced(database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Traced:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("LOOPWRIGHT_DATABASE_URL", raising=False)
    shutil.copytree(database, tmp_path / "var")
    return Traced(tmp_path / "var")


def test_a_vote_is_on_its_trace_once_and_goes_with_it(traced: Traced) -> None:
    vote = traced.store.add_feedback(traced.id, "down", "42, or bob.smith@gmail.com", "no", user="u1", owner="team-a")
    for _ in range(2):
        assert exchange(traced.store, traced.home) == 0
        (expectation, rating) = traced.assessments()
        assert rating == (RATING, False, "team-a", "no")
        assert expectation[:1] + expectation[2:] == (EXPECTED, "team-a", None)
        assert expectation[1].startswith("42, or "), expectation
        assert "bob.smith@gmail.com" not in expectation[1], "personal data is masked as in training data"
    traced.store.add_feedback(traced.id, "up")
    exchange(traced.store, traced.home)
    assert traced.assessments() == [(RATING, True, "user", None)]
    traced.store.revoke(traced.store.completion(traced.id)["feedback"][-1]["id"])
    exchange(traced.store, traced.home)
    assert traced.assessments() == []
    assert vote


def test_a_vote_that_was_half_written_is_completed(traced: Traced) -> None:
    vote = traced.store.add_feedback(traced.id, "down", "42")
    exchange(traced.store, traced.home)
    (rating,) = [each.assessment_id for each in traced.trace.assessments if each.name == RATING]
    mlflow.delete_assessment(traced.trace.trace_id, rating)
    exchange(traced.store, traced.home)
    assert [row[:2] for row in traced.assessments()] == [(EXPECTED, "42"), (RATING, False)]
    assert vote


def test_an_expectation_of_mlflow_becomes_a_correction(traced: Traced) -> None:
    exchange(traced.store, traced.home)  # points MLflow at this state folder
    trace_id = traced.trace.trace_id
    entered = mlflow.log_expectation(trace_id=trace_id, name=EXPECTED, value="42", source=ALICE)
    mlflow.log_expectation(trace_id=trace_id, name="expected_facts", value=["6*7"], source=ALICE)
    assert [exchange(traced.store, traced.home) for _ in range(3)] == [1, 0, 0]
    assert traced.votes() == [("down", "42", "mlflow:alice", True)]
    assert len(traced.assessments()) == 2, "what was entered is not written beside itself"

    mlflow.update_assessment(trace_id, entered.assessment_id, Expectation(EXPECTED, "42.", ALICE))
    assert [exchange(traced.store, traced.home) for _ in range(2)] == [1, 0]
    assert traced.votes() == [("down", "42", "mlflow:alice", False), ("down", "42.", "mlflow:alice", True)]
