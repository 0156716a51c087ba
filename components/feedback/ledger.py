"""What became of each vote: taken in, quarantined, withdrawn, learned from.

One transaction writes a partition with the outcome of each of its votes; that is the moment at which an ingestion has
happened. The watermark is the last vote of the newest partition and stands nowhere else.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, Select, and_, case, exists, func, select

from components.config.params import InputError
from components.feedback.database import Database
from components.feedback.tables import ANSWERS, FEEDBACK, IMPROVEMENTS, OUTCOMES, PARTITIONS, REQUESTS, REVOCATIONS

Status = Literal["accepted", "quarantined"]
DAY_SECONDS = 86_400.0


class UnknownFeedback(InputError):
    """An id that is no vote of this database."""


@dataclass(frozen=True)
class Outcome:
    """What ingestion made of one vote."""

    feedback_id: str
    sequence: int
    status: Status
    reason: str | None
    """Why it was quarantined."""
    voice: str
    created: float
    """When it was said, seconds since the epoch."""
    content_digest: str
    """Equal for the same voice saying the same of the same prompt."""


class Ledger(Database):
    """The store as the loop sees it."""

    def watermark(self) -> int:
        """The last vote that was ingested; 0 before the first."""
        with self._read() as connection:
            return _watermark(connection)

    def behind_watermark(self, most: int) -> list[dict[str, Any]]:
        """The next votes in order, each with the request and the answer (null while there is none) it is about."""
        with self._read() as connection:
            wanted = (
                select(FEEDBACK, REQUESTS.c.model, REQUESTS.c.body, ANSWERS.c.content, ANSWERS.c.steps, *_MORE)
                .join(REQUESTS, REQUESTS.c.id == FEEDBACK.c.completion_id)
                .outerjoin(ANSWERS, ANSWERS.c.request_id == FEEDBACK.c.completion_id)
                .outerjoin(REVOCATIONS, REVOCATIONS.c.feedback_id == FEEDBACK.c.id)
                .where(FEEDBACK.c.sequence > _watermark(connection))
                .order_by(FEEDBACK.c.sequence)
                .limit(most)
            )
            return [dict(row) for row in connection.execute(wanted).mappings()]

    def said_before(self, digests: Iterable[str]) -> dict[str, str]:
        """Of these contents, those of accepted votes that still stand, with the vote's id."""
        wanted = list(digests)
        found: dict[str, str] = {}
        with self._read() as connection:
            for start in range(0, len(wanted), 500):
                # Only by digest: with the status beside it, SQLite would rather walk through all that was accepted.
                asked = (
                    select(OUTCOMES.c.content_digest, OUTCOMES.c.feedback_id, OUTCOMES.c.status)
                    .join(FEEDBACK, FEEDBACK.c.id == OUTCOMES.c.feedback_id)
                    .where(OUTCOMES.c.content_digest.in_(wanted[start : start + 500]))
                    .where(FEEDBACK.c.replaced_by.is_(None), ~_revoked())
                )
                for digest, feedback_id, status in connection.execute(asked):
                    if status == "accepted":
                        found[str(digest)] = str(feedback_id)
        return found

    def accepted_of(self, voice: str, since: float, most: int) -> list[float]:
        """When a voice said what was accepted of it after a moment, at most so many."""
        asked = (
            select(OUTCOMES.c.created)
            .where(OUTCOMES.c.voice == voice, OUTCOMES.c.created > since, OUTCOMES.c.status == "accepted")
            .order_by(OUTCOMES.c.created.desc())
            .limit(most)
        )
        with self._read() as connection:
            return sorted(connection.scalars(asked))

    def commit_partition(self, name: str, digest: str, outcomes: Sequence[Outcome]) -> None:
        """Write a partition and the outcomes of its votes, all at once.

        Raises: InputError when another ingestion took these votes meanwhile.
        """
        first, last = outcomes[0].sequence, outcomes[-1].sequence
        accepted = sum(outcome.status == "accepted" for outcome in outcomes)
        row = {"name": name, "first_sequence": first, "last_sequence": last, "created": time.time(), "digest": digest}
        with self._write() as connection:
            self._in_turn(connection)
            if _watermark(connection) >= first:
                raise InputError(f"{name}: another ingestion has taken these votes; run it again for the next ones")
            counts = {"accepted": accepted, "quarantined": len(outcomes) - accepted}
            connection.execute(PARTITIONS.insert(), row | counts)
            connection.execute(OUTCOMES.insert(), [vars(outcome) | {"partition": name} for outcome in outcomes])

    def partitions(self) -> list[dict[str, Any]]:
        """Every partition, oldest first."""
        with self._read() as connection:
            asked = select(PARTITIONS).order_by(PARTITIONS.c.last_sequence)
            return [dict(row) for row in connection.execute(asked).mappings()]

    def knows(self, feedback_id: str) -> bool:
        """Whether this is a vote of this database."""
        with self._read() as connection:
            return connection.scalar(select(FEEDBACK.c.id).where(FEEDBACK.c.id == feedback_id)) is not None

    def has_partition(self, name: str) -> bool:
        with self._read() as connection:
            return connection.scalar(select(PARTITIONS.c.name).where(PARTITIONS.c.name == name)) is not None

    def unversioned(self) -> list[str]:
        """Partitions with a file that no version of the data holds yet."""
        asked = select(PARTITIONS.c.name).where(PARTITIONS.c.dvc.is_(None), PARTITIONS.c.digest != "")
        with self._read() as connection:
            return list(connection.scalars(asked))

    def mark_versioned(self, names: Iterable[str], dvc: str) -> None:
        """Note under which of DVC's hashes partitions can be found."""
        with self._write() as connection:
            connection.execute(PARTITIONS.update().where(PARTITIONS.c.name.in_(list(names))).values(dvc=dvc))

    def revoke(self, feedback_id: str, reason: str | None = None) -> bool:
        """Withdraw a vote; false when it was withdrawn before.

        Raises: UnknownFeedback.
        """
        with self._write() as connection:
            if connection.scalar(select(FEEDBACK.c.sequence).where(FEEDBACK.c.id == feedback_id)) is None:
                raise UnknownFeedback(f'{feedback_id}: no such feedback; see "loopwright feedback list" for the ids')
            known = select(REVOCATIONS.c.feedback_id).where(REVOCATIONS.c.feedback_id == feedback_id)
            if connection.scalar(known) is not None:
                return False
            row = {"feedback_id": feedback_id, "created": time.time(), "reason": reason}
            connection.execute(REVOCATIONS.insert(), row)
            return True

    def withdrawn(self) -> dict[str, str]:
        """Accepted votes that no longer count, and why: `revoked`, or `replaced` by a later vote."""
        voted = select(OUTCOMES.c.feedback_id, OUTCOMES.c.status)
        replaced = voted.where(OUTCOMES.c.feedback_id.in_(select(FEEDBACK.c.id).where(FEEDBACK.c.replaced_by > "")))
        revoked = voted.where(OUTCOMES.c.feedback_id.in_(select(REVOCATIONS.c.feedback_id)))
        gone: dict[str, str] = {}
        with self._read() as connection:
            for why, asked in (("replaced", replaced), ("revoked", revoked)):
                rows = connection.execute(asked)
                gone.update((str(feedback_id), why) for feedback_id, status in rows if status == "accepted")
        return gone

    def fresh(self) -> int:
        """Votes that no ingestion has looked at."""
        with self._read() as connection:
            behind = select(func.count()).select_from(FEEDBACK).where(FEEDBACK.c.sequence > _watermark(connection))
            return connection.scalar(behind) or 0

    def waiting(self) -> int:
        """Accepted votes that stand and that came after what the last improvement learned from."""
        with self._read() as connection:
            learned = connection.scalar(select(func.max(IMPROVEMENTS.c.last_sequence))) or 0
            return connection.scalar(_standing(learned)) or 0

    def last_accepted_sequence(self) -> int:
        """The newest accepted vote; 0 when there is none."""
        newest = select(func.max(OUTCOMES.c.sequence)).where(OUTCOMES.c.status == "accepted")
        with self._read() as connection:
            return connection.scalar(newest) or 0

    def add_improvement(self, last_sequence: int, candidate: str, outcome: str, reason: str) -> None:
        """Note that a candidate learned from every accepted vote up to `last_sequence`, and what came of it."""
        row = {"created": time.time(), "last_sequence": last_sequence, "candidate": candidate, "outcome": outcome}
        with self._write() as connection:
            connection.execute(IMPROVEMENTS.insert(), row | {"reason": reason})

    def improvements(self) -> list[dict[str, Any]]:
        """Every improvement, oldest first."""
        with self._read() as connection:
            return [
                dict(row) for row in connection.execute(select(IMPROVEMENTS).order_by(IMPROVEMENTS.c.id)).mappings()
            ]

    def votes(self, most: int, quarantined: bool = False) -> list[dict[str, Any]]:
        """The newest votes with what became of them: `status` is fresh, accepted, quarantined, replaced or revoked."""
        asked = (
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
            .limit(most)
        )
        if quarantined:
            asked = asked.where(OUTCOMES.c.status == "quarantined")
        with self._read() as connection:
            return [dict(row) for row in connection.execute(asked).mappings()]

    def feedback_counts(self) -> list[dict[str, Any]]:
        """Per model that answered: standing votes up and down, corrections, and what became of them."""

        def count(condition: Any) -> Any:
            return func.coalesce(func.sum(case((condition, 1), else_=0)), 0)

        stands = FEEDBACK.c.replaced_by.is_(None)
        gone = exists().where(REVOCATIONS.c.feedback_id == FEEDBACK.c.id)
        learned = select(func.coalesce(func.max(IMPROVEMENTS.c.last_sequence), 0)).scalar_subquery()
        asked = (
            select(
                REQUESTS.c.model,
                count(and_(stands, FEEDBACK.c.rating == "up")).label("up"),
                count(and_(stands, FEEDBACK.c.rating == "down")).label("down"),
                count(and_(stands, FEEDBACK.c.correction.is_not(None))).label("corrections"),
                count(OUTCOMES.c.status == "accepted").label("accepted"),
                count(OUTCOMES.c.status == "quarantined").label("quarantined"),
                count(and_(stands, OUTCOMES.c.status.is_(None))).label("fresh"),
                count(and_(stands, ~gone, OUTCOMES.c.status == "accepted", OUTCOMES.c.sequence > learned)).label(
                    "waiting"
                ),
            )
            .join(REQUESTS, REQUESTS.c.id == FEEDBACK.c.completion_id)
            .outerjoin(OUTCOMES, OUTCOMES.c.feedback_id == FEEDBACK.c.id)
            .group_by(REQUESTS.c.model)
            .order_by(REQUESTS.c.model)
        )
        with self._read() as connection:
            return [dict(row) for row in connection.execute(asked).mappings()]

    def recent(self, since: float, most: int) -> list[dict[str, Any]]:
        """The newest requests after a moment: id, created, model and body, `steps` of the answer, and the `rating`."""
        vote = and_(FEEDBACK.c.completion_id == REQUESTS.c.id, FEEDBACK.c.replaced_by.is_(None))
        asked = (
            select(REQUESTS, ANSWERS.c.steps, FEEDBACK.c.rating)
            .outerjoin(ANSWERS, ANSWERS.c.request_id == REQUESTS.c.id)
            .outerjoin(FEEDBACK, vote)
            .where(REQUESTS.c.created > since)
            .order_by(REQUESTS.c.created.desc())
            .limit(most)
        )
        with self._read() as connection:
            return [dict(row) for row in connection.execute(asked).mappings()]

    def forget(self, keep_days: int) -> int:
        """Delete requests, with their answers, that are older and that nobody spoke about; returns how many."""
        old = and_(
            REQUESTS.c.created < time.time() - keep_days * DAY_SECONDS,
            ~exists().where(FEEDBACK.c.completion_id == REQUESTS.c.id),
        )
        with self._write() as connection:
            self._in_turn(connection)
            connection.execute(ANSWERS.delete().where(ANSWERS.c.request_id.in_(select(REQUESTS.c.id).where(old))))
            return int(connection.execute(REQUESTS.delete().where(old)).rowcount)


_MORE = (
    ANSWERS.c.tool_calls,
    REVOCATIONS.c.feedback_id.label("revoked"),
)
_SHOWN = ("id", "sequence", "completion_id", "created", "rating", "correction", "comment", "voice")


def _watermark(connection: Connection) -> int:
    return connection.scalar(select(func.max(PARTITIONS.c.last_sequence))) or 0


def _revoked() -> Any:
    return exists().where(REVOCATIONS.c.feedback_id == OUTCOMES.c.feedback_id)


def _standing(behind: int) -> Select[tuple[int]]:
    """The number of accepted votes behind a sequence that were neither replaced nor revoked."""
    return (
        select(func.count())
        .select_from(OUTCOMES.join(FEEDBACK, FEEDBACK.c.id == OUTCOMES.c.feedback_id))
        .where(OUTCOMES.c.sequence > behind, OUTCOMES.c.status == "accepted")
        .where(FEEDBACK.c.replaced_by.is_(None), ~_revoked())
    )


def _state() -> Any:
    return case(
        (REVOCATIONS.c.feedback_id.is_not(None), "revoked"),
        (OUTCOMES.c.status == "quarantined", "quarantined"),
        (FEEDBACK.c.replaced_by.is_not(None), "replaced"),
        (OUTCOMES.c.status == "accepted", "accepted"),
        else_="fresh",
    )
