"""The status of each vote: ingested, quarantined, revoked, trained on.

One transaction writes a partition with the outcome of each of its votes; with it, the ingestion is complete. The
watermark is the last vote of the newest partition and is stored nowhere else.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, Select, and_, case, exists, func, select

from components.config.params import InputError
from components.feedback.audit import Audit
from components.feedback.tables import (
    ANSWERS,
    FEEDBACK,
    IMPROVEMENTS,
    OUTCOMES,
    PARTITIONS,
    PICTURES,
    REQUEST_PICTURES,
    REQUESTS,
    REVOCATIONS,
)
from components.feedback.user_records import ERASURES

Status = Literal["accepted", "quarantined"]
DAY_SECONDS = 86_400.0
_FORGOTTEN_AT_ONCE = 200
"""Requests that one transaction deletes: a vote waits for its end."""
_SECONDS_BETWEEN_BATCHES = 0.05


class UnknownFeedback(InputError):
    """The id of no vote in this database."""


@dataclass(frozen=True)
class Outcome:
    """The result of ingesting one vote."""

    feedback_id: str
    sequence: int
    status: Status
    reason: str | None
    """Why it was quarantined."""
    voice: str
    created: float
    """Time of the vote, in Unix time."""
    content_digest: str
    """Equal for votes of one user with the same content on the same prompt."""


class Ledger(Audit):
    """The part of the store that ingestion and improvement use."""

    def watermark(self) -> int:
        """Sequence of the last ingested vote; 0 before the first."""
        with self._read() as connection:
            return _watermark(connection)

    def behind_watermark(self, limit: int) -> list[dict[str, Any]]:
        """The next votes in order, each with its request and answer (null without one)."""
        with self._read() as connection:
            statement = _answered_votes().where(FEEDBACK.c.sequence > _watermark(connection)).limit(limit)
            return [dict(row) for row in connection.execute(statement).mappings()]

    def accepted_votes(self, partition: str) -> list[dict[str, Any]]:
        """The votes whose items belong into a partition, as `behind_watermark` returns them: without erased ones."""
        erased = exists().where(REVOCATIONS.c.feedback_id == OUTCOMES.c.feedback_id, REVOCATIONS.c.reason.in_(ERASURES))
        accepted = select(OUTCOMES.c.feedback_id).where(OUTCOMES.c.status == "accepted", ~erased)
        return self._rows(_answered_votes().where(FEEDBACK.c.id.in_(accepted.where(OUTCOMES.c.partition == partition))))

    def accepted_digests(self, digests: Iterable[str]) -> dict[str, str]:
        """Of these content digests, those of accepted and still valid votes, with the vote's id."""
        queried = list(digests)
        accepted: dict[str, str] = {}
        with self._read() as connection:
            for start in range(0, len(queried), 500):
                # By digest alone: with a condition on the status, SQLite scans all accepted votes.
                statement = (
                    select(OUTCOMES.c.content_digest, OUTCOMES.c.feedback_id, OUTCOMES.c.status)
                    .join(FEEDBACK, FEEDBACK.c.id == OUTCOMES.c.feedback_id)
                    .where(OUTCOMES.c.content_digest.in_(queried[start : start + 500]))
                    .where(FEEDBACK.c.replaced_by.is_(None), ~_revoked())
                )
                for digest, feedback_id, status in connection.execute(statement):
                    if status == "accepted":
                        accepted[str(digest)] = str(feedback_id)
        return accepted

    def accepted_times(self, user: str, since: float, limit: int) -> list[float]:
        """Times of a user's accepted votes since a time, at most `limit`."""
        statement = (
            select(OUTCOMES.c.created)
            .where(OUTCOMES.c.voice == user, OUTCOMES.c.created > since, OUTCOMES.c.status == "accepted")
            .order_by(OUTCOMES.c.created.desc())
            .limit(limit)
        )
        with self._read() as connection:
            return sorted(connection.scalars(statement))

    def commit_partition(self, name: str, digest: str, outcomes: Sequence[Outcome]) -> None:
        """Write a partition and the outcomes of its votes in one transaction.

        Raises: InputError when another ingestion has committed these votes meanwhile.
        """
        first, last = outcomes[0].sequence, outcomes[-1].sequence
        accepted = sum(outcome.status == "accepted" for outcome in outcomes)
        row = {"name": name, "first_sequence": first, "last_sequence": last, "created": time.time(), "digest": digest}
        with self._write() as connection:
            self._in_turn(connection)
            if _watermark(connection) >= first:
                raise InputError(f"{name}: another ingestion has committed these votes; run it again for the next ones")
            counts = {"accepted": accepted, "quarantined": len(outcomes) - accepted}
            connection.execute(PARTITIONS.insert(), row | counts)
            connection.execute(OUTCOMES.insert(), [vars(outcome) | {"partition": name} for outcome in outcomes])

    def partitions(self) -> list[dict[str, Any]]:
        """Every partition, oldest first."""
        return self._rows(select(PARTITIONS).order_by(PARTITIONS.c.last_sequence))

    def has_feedback(self, feedback_id: str) -> bool:
        return self._scalar(select(FEEDBACK.c.id).where(FEEDBACK.c.id == feedback_id)) is not None

    def unversioned(self) -> list[str]:
        """Partitions whose file DVC does not track yet."""
        statement = select(PARTITIONS.c.name).where(PARTITIONS.c.dvc.is_(None), PARTITIONS.c.digest != "")
        with self._read() as connection:
            return list(connection.scalars(statement))

    def mark_versioned(self, names: Iterable[str], dvc: str) -> None:
        """Store the DVC hash that contains these partitions."""
        with self._write() as connection:
            connection.execute(PARTITIONS.update().where(PARTITIONS.c.name.in_(list(names))).values(dvc=dvc))

    def revoke(self, feedback_id: str, reason: str | None = None) -> bool:
        """Revoke a vote; false when it was revoked before.

        Raises: UnknownFeedback.
        """
        with self._write() as connection:
            if connection.scalar(select(FEEDBACK.c.sequence).where(FEEDBACK.c.id == feedback_id)) is None:
                raise UnknownFeedback(f'{feedback_id}: no such feedback; see "loopwright feedback list" for the ids')
            revocation = select(REVOCATIONS.c.feedback_id).where(REVOCATIONS.c.feedback_id == feedback_id)
            if connection.scalar(revocation) is not None:
                return False
            row = {"feedback_id": feedback_id, "created": time.time(), "reason": reason}
            connection.execute(REVOCATIONS.insert(), row)
            self._add_audit(connection, "revoke", feedback_id, reason)
            return True

    def revoked(self) -> set[str]:
        """The ids of all revoked votes."""
        with self._read() as connection:
            return set(connection.scalars(select(REVOCATIONS.c.feedback_id)))

    def withdrawn(self) -> dict[str, str]:
        """Accepted votes that are no longer valid, and why: `revoked`, or `replaced` by a later vote."""
        votes = select(OUTCOMES.c.feedback_id, OUTCOMES.c.status)
        replaced = votes.where(OUTCOMES.c.feedback_id.in_(select(FEEDBACK.c.id).where(FEEDBACK.c.replaced_by > "")))
        revoked = votes.where(OUTCOMES.c.feedback_id.in_(select(REVOCATIONS.c.feedback_id)))
        withdrawn: dict[str, str] = {}
        with self._read() as connection:
            for reason, statement in (("replaced", replaced), ("revoked", revoked)):
                rows = connection.execute(statement)
                withdrawn.update((str(feedback_id), reason) for feedback_id, status in rows if status == "accepted")
        return withdrawn

    def fresh(self) -> int:
        """Number of votes not yet ingested."""
        with self._read() as connection:
            fresh = select(func.count()).select_from(FEEDBACK).where(FEEDBACK.c.sequence > _watermark(connection))
            return connection.scalar(fresh) or 0

    def oldest_fresh(self) -> float | None:
        """Time of the oldest vote not yet ingested, in seconds since the epoch; None without one."""
        with self._read() as connection:
            behind = FEEDBACK.c.sequence > _watermark(connection)
            seconds: float | None = connection.scalar(select(func.min(FEEDBACK.c.created)).where(behind))
            return seconds

    def waiting(self) -> int:
        """Number of valid accepted votes newer than those of the last improvement."""
        trained = select(func.coalesce(func.max(IMPROVEMENTS.c.last_sequence), 0)).scalar_subquery()
        return int(
            self._scalar(
                select(func.count())
                .select_from(OUTCOMES.join(FEEDBACK, FEEDBACK.c.id == OUTCOMES.c.feedback_id))
                .where(OUTCOMES.c.sequence > trained, OUTCOMES.c.status == "accepted")
                .where(FEEDBACK.c.replaced_by.is_(None), ~_revoked())
            )
        )

    def last_accepted_sequence(self) -> int:
        """Sequence of the newest accepted vote; 0 when there is none."""
        return self._scalar(select(func.max(OUTCOMES.c.sequence)).where(OUTCOMES.c.status == "accepted")) or 0

    def add_improvement(self, last_sequence: int, candidate: str, outcome: str, reason: str) -> None:
        """Record a candidate trained on every accepted vote up to `last_sequence`, and its outcome."""
        row = {"created": time.time(), "last_sequence": last_sequence, "candidate": candidate, "outcome": outcome}
        with self._write() as connection:
            connection.execute(IMPROVEMENTS.insert(), row | {"reason": reason})

    def improvements(self) -> list[dict[str, Any]]:
        """Every improvement, oldest first."""
        return self._rows(select(IMPROVEMENTS).order_by(IMPROVEMENTS.c.id))

    def votes(self, limit: int, quarantined: bool = False) -> list[dict[str, Any]]:
        """The newest votes with their `status`: fresh, accepted, quarantined, replaced or revoked."""
        statement = (
            select(
                *(FEEDBACK.c[name] for name in _SHOWN),
                REQUESTS.c.model,
                OUTCOMES.c.partition,
                OUTCOMES.c.reason,
                _state().label("status"),
            )
            .join(REQUESTS, REQUESTS.c.id == FEEDBACK.c.completion_id)
            .outerjoin(OUTCOMES, OUTCOMES.c.feedback_id == FEEDBACK.c.id)
            .outerjoin(REVOCATIONS, REVOCATIONS.c.feedback_id == FEEDBACK.c.id)
            .order_by(FEEDBACK.c.sequence.desc())
            .limit(limit)
        )
        if quarantined:
            statement = statement.where(OUTCOMES.c.status == "quarantined")
        return self._rows(statement)

    def feedback_counts(self) -> list[dict[str, Any]]:
        """Per answering model: valid votes up and down, corrections, and votes by status."""

        def count(condition: Any) -> Any:
            return func.coalesce(func.sum(case((condition, 1), else_=0)), 0)

        valid = FEEDBACK.c.replaced_by.is_(None)
        revoked = exists().where(REVOCATIONS.c.feedback_id == FEEDBACK.c.id)
        trained = select(func.coalesce(func.max(IMPROVEMENTS.c.last_sequence), 0)).scalar_subquery()
        statement = (
            select(
                REQUESTS.c.model,
                count(and_(valid, FEEDBACK.c.rating == "up")).label("up"),
                count(and_(valid, FEEDBACK.c.rating == "down")).label("down"),
                count(and_(valid, FEEDBACK.c.correction.is_not(None))).label("corrections"),
                count(OUTCOMES.c.status == "accepted").label("accepted"),
                count(OUTCOMES.c.status == "quarantined").label("quarantined"),
                count(and_(valid, OUTCOMES.c.status.is_(None))).label("fresh"),
                count(and_(valid, ~revoked, OUTCOMES.c.status == "accepted", OUTCOMES.c.sequence > trained)).label(
                    "waiting"
                ),
            )
            .join(REQUESTS, REQUESTS.c.id == FEEDBACK.c.completion_id)
            .outerjoin(OUTCOMES, OUTCOMES.c.feedback_id == FEEDBACK.c.id)
            .group_by(REQUESTS.c.model)
            .order_by(REQUESTS.c.model)
        )
        return self._rows(statement)

    def recent(self, since: float, until: float, limit: int) -> list[dict[str, Any]]:
        """The newest requests between two times: id, created, model, body, `steps` of the answer, `rating`."""
        vote = and_(FEEDBACK.c.completion_id == REQUESTS.c.id, FEEDBACK.c.replaced_by.is_(None))
        return self._rows(
            select(REQUESTS, ANSWERS.c.steps, FEEDBACK.c.rating)
            .outerjoin(ANSWERS, ANSWERS.c.request_id == REQUESTS.c.id)
            .outerjoin(FEEDBACK, vote)
            .where(REQUESTS.c.created > since, REQUESTS.c.created <= until)
            .order_by(REQUESTS.c.created.desc())
            .limit(limit)
        )

    def forget(self, keep_days: int) -> int:
        """Delete older requests without feedback, with their answers; returns how many.

        Age counts from the newest record, and a call deletes no more than was received within a day, the oldest first:
        a clock that jumped ahead deletes little until somebody notices. A picture goes with the last request that
        refers to it. Between batches, others write.
        """
        silent = ~exists().where(FEEDBACK.c.completion_id == REQUESTS.c.id)
        newest = [self._scalar(select(func.max(table.c.created))) for table in (REQUESTS, ANSWERS, FEEDBACK)]
        oldest = self._scalar(select(func.min(REQUESTS.c.created)).where(silent))
        if oldest is None:
            return 0
        until = min(time.time(), max(filter(None, newest), default=oldest)) - keep_days * DAY_SECONDS
        until = min(until, oldest + DAY_SECONDS)
        forgotten = 0
        while count := self._forget_batch(and_(REQUESTS.c.created < until, silent)):
            forgotten += count
        return forgotten

    def _forget_batch(self, old: Any) -> int:
        with self._write() as connection:
            started = time.monotonic()
            self._in_turn(connection)
            requests = list(connection.scalars(select(REQUESTS.c.id).where(old).limit(_FORGOTTEN_AT_ONCE)))
            references = REQUEST_PICTURES.c.request_id.in_(requests)
            pictures = list(connection.scalars(select(REQUEST_PICTURES.c.digest).where(references).distinct()))
            connection.execute(ANSWERS.delete().where(ANSWERS.c.request_id.in_(requests)))
            connection.execute(REQUEST_PICTURES.delete().where(references))
            unreferenced = ~exists().where(REQUEST_PICTURES.c.digest == PICTURES.c.digest)
            connection.execute(PICTURES.delete().where(PICTURES.c.digest.in_(pictures), unreferenced))
            connection.execute(REQUESTS.delete().where(REQUESTS.c.id.in_(requests)))
        # SQLite's lock goes to who asks next, and those who wait ask ever more rarely.
        time.sleep(max(_SECONDS_BETWEEN_BATCHES, time.monotonic() - started) if requests else 0)
        return len(requests)


_ANSWER = (ANSWERS.c.content, ANSWERS.c.steps, ANSWERS.c.tool_calls)
_SHOWN = ("id", "sequence", "completion_id", "created", "rating", "correction", "comment", "voice")


def _answered_votes() -> Select[Any]:
    """Votes in order, each with its request and answer."""
    return (
        select(FEEDBACK, REQUESTS.c.model, REQUESTS.c.body, *_ANSWER, REVOCATIONS.c.feedback_id.label("revoked"))
        .join(REQUESTS, REQUESTS.c.id == FEEDBACK.c.completion_id)
        .outerjoin(ANSWERS, ANSWERS.c.request_id == FEEDBACK.c.completion_id)
        .outerjoin(REVOCATIONS, REVOCATIONS.c.feedback_id == FEEDBACK.c.id)
        .order_by(FEEDBACK.c.sequence)
    )


def _watermark(connection: Connection) -> int:
    return connection.scalar(select(func.max(PARTITIONS.c.last_sequence))) or 0


def _revoked() -> Any:
    return exists().where(REVOCATIONS.c.feedback_id == OUTCOMES.c.feedback_id)


def _state() -> Any:
    return case(
        (REVOCATIONS.c.feedback_id.is_not(None), "revoked"),
        (OUTCOMES.c.status == "quarantined", "quarantined"),
        (FEEDBACK.c.replaced_by.is_not(None), "replaced"),
        (OUTCOMES.c.status == "accepted", "accepted"),
        else_="fresh",
    )
