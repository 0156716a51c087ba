"""Assessments of traces in MLflow: a user's votes as feedback and expectations, and what people enter on its page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.tracking.mlflow_client import connect
from components.tracking.mlflow_database import EXPERIMENT
from components.tracking.traces import use_address_of

if TYPE_CHECKING:
    from mlflow import MlflowClient

RATING = "user_rating"
"""Feedback on an answer: true for a thumb up."""
EXPECTED = "expected_response"
"""The expectation that MLflow's own judges read: the right answer, as text."""
_VOTE = "loopwright.feedback_id"
"""Metadata of the assessments that we write."""
_PAGE = 200
"""Traces that MLflow lists in one answer."""


@dataclass(frozen=True)
class Entered:
    """An expectation that a person entered in MLflow."""

    key: str
    """Of this value: another one after each edit."""
    person: str
    text: str
    comment: str | None


@dataclass(frozen=True)
class AssessedTrace:
    trace_id: str
    completion_id: str
    votes: dict[str, list[str]]
    """Ids of the assessments that we wrote, by the vote that each is of."""
    complete: set[str]
    """The votes of which none is missing."""
    entered: list[Entered]
    """Oldest first."""


class Assessments:
    """The assessments of a state folder's traces, or of the server's that MLFLOW_TRACKING_URI names."""

    def __init__(self, home: Path) -> None:
        self._client: MlflowClient = connect(home)
        use_address_of(self._client)

    def traces(self, since: float) -> Iterator[AssessedTrace]:
        """The traces of answers since a Unix time."""
        experiment = self._client.get_experiment_by_name(EXPERIMENT).experiment_id
        token = None
        while True:
            page = self._client.search_traces(
                locations=[experiment],
                filter_string=f"trace.timestamp_ms > {int(since * 1000)}",
                max_results=_PAGE,
                page_token=token,
                include_spans=False,
            )
            yield from (_assessed(trace.info) for trace in page if "completion_id" in trace.info.tags)
            if not (token := page.token):
                return

    def add_vote(
        self, trace_id: str, feedback_id: str, person: str, rating: str, correction: str | None, comment: str | None
    ) -> None:
        """Write a vote: its thumb as feedback, its correction as an expectation."""
        from mlflow import log_expectation, log_feedback
        from mlflow.entities import AssessmentSource

        source = AssessmentSource("HUMAN", person)
        metadata = {_VOTE: feedback_id}
        if correction is not None:
            log_expectation(trace_id=trace_id, name=EXPECTED, value=correction, source=source, metadata=metadata)
        # The last one: with it the vote is complete.
        log_feedback(
            trace_id=trace_id, name=RATING, value=rating == "up", source=source, rationale=comment, metadata=metadata
        )

    def remove(self, trace_id: str, assessment_ids: list[str]) -> None:
        from mlflow import delete_assessment

        for assessment_id in assessment_ids:
            delete_assessment(trace_id, assessment_id)


def _assessed(info: Any) -> AssessedTrace:
    trace = AssessedTrace(info.trace_id, info.tags["completion_id"], {}, set(), [])
    for assessment in sorted(info.assessments, key=lambda assessment: assessment.create_time_ms):
        if vote := (assessment.metadata or {}).get(_VOTE):
            trace.votes.setdefault(vote, []).append(assessment.assessment_id)
            if assessment.name == RATING:
                trace.complete.add(vote)
        elif assessment.name == EXPECTED and assessment.valid is not False and assessment.expectation:
            value, person = assessment.expectation.value, assessment.source.source_id
            key = f"{assessment.assessment_id}-{assessment.last_update_time_ms}"
            if isinstance(value, str) and value.strip():
                trace.entered.append(Entered(key, person or "", value, assessment.rationale))
    return trace
