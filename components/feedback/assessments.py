"""Feedback and MLflow's assessments, in both directions: votes go to the traces, entered expectations become votes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.feedback.ledger import DAY_SECONDS
from components.feedback.privacy import mask
from components.feedback.store import Store, UnknownCompletion
from components.feedback.tables import OWNER_CHARACTERS
from components.tracking.assessments import AssessedTrace, Assessments, Entered

DAYS = 30
"""Older traces are left as they are."""
_OWNER = "mlflow:"
"""Before the name of who entered an expectation: its owner is nobody with an API key by chance."""


def exchange(store: Store, home: Path) -> int:
    """Bring the assessments of recent traces and the votes on their answers in line; returns the votes that were added.

    May be repeated and interrupted anywhere: an assessment names its vote, and a vote its assessment.
    """
    assessments, revoked = Assessments(home), store.revoked()
    added = 0
    for trace in assessments.traces(time.time() - DAYS * DAY_SECONDS):
        try:
            votes = store.completion(trace.completion_id)["feedback"]
        except UnknownCompletion:  # of another store, or deleted for its age
            continue
        known = {vote["idempotency_key"] for vote in votes}
        if fresh := [entered for entered in trace.entered if entered.key not in known]:
            for entered in fresh:
                _add_correction(store, trace.completion_id, entered)
            votes = store.completion(trace.completion_id)["feedback"]
            added += len(fresh)
        valid = (vote for vote in votes if vote["replaced_by"] is None and vote["id"] not in revoked)
        _write_votes(assessments, trace, [vote for vote in valid if not vote["owner"].startswith(_OWNER)])
    return added


def _add_correction(store: Store, completion_id: str, entered: Entered) -> None:
    owner = f"{_OWNER}{entered.person}"[:OWNER_CHARACTERS]
    correction, comment = (text and text.replace("\0", "") for text in (entered.text, entered.comment))
    store.add_feedback(completion_id, "down", correction, comment, entered.key, user=owner, owner=owner)


def _write_votes(assessments: Assessments, trace: AssessedTrace, votes: Sequence[Mapping[str, Any]]) -> None:
    """Let a trace have the assessments of these votes and of no other."""
    current = {vote["id"] for vote in votes} & trace.complete
    for feedback_id, ids in trace.votes.items():
        if feedback_id not in current:
            assessments.remove(trace.trace_id, ids)
    for vote in votes:
        if vote["id"] not in current:
            person = vote["owner"] or vote["voice"] or "user"
            correction, comment = (text and mask(text) for text in (vote["correction"], vote["comment"]))
            assessments.add_vote(trace.trace_id, vote["id"], person, vote["rating"], correction, comment)
