"""The records of one person: exported as they are, or erased with what was said about them.

A person is named as the owner of API keys, or as the OpenAI `user` of requests. Erasing deletes texts and pictures; the
row of a vote stays, emptied and revoked, because models name the votes that they were trained on.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, or_, select, union

from components.config.errors import InputError
from components.datasets.formats import batched
from components.feedback.audit import Audit
from components.feedback.tables import (
    ANSWERS,
    FEEDBACK,
    OUTCOMES,
    PARTITIONS,
    PICTURES,
    REQUEST_PICTURES,
    REQUESTS,
    REVOCATIONS,
)

ERASED = "erased"
"""The reason of a revocation whose item is still in a partition."""
ERASURES = (ERASED, f"{ERASED}, also from its partition")
"""The reasons of revocations of erased votes."""
BATCH = 500
"""Ids of one statement."""


@dataclass(frozen=True)
class UserRecords:
    """What the database has of a person."""

    completions: list[str]
    """Ids of requests, oldest first."""
    votes: list[str]
    """Ids of votes on these, and of those that the person cast on others, oldest first."""


class People(Audit):
    """The part of the store that finds, exports and erases the records of a person."""

    def user_records(self, name: str, owner: str | None = None) -> UserRecords:
        """The records whose owner or `user` is `name`; of this `owner` alone where there is one.

        Raises: InputError when there are none, or when the name is a `user` of several owners.
        """
        with self._read() as connection:
            return _records(connection, name, owner)

    def erased_items(self) -> dict[str, set[str]]:
        """By partition, the erased votes whose items are still in its file."""
        statement = (
            select(OUTCOMES.c.partition, OUTCOMES.c.feedback_id)
            .join(REVOCATIONS, REVOCATIONS.c.feedback_id == OUTCOMES.c.feedback_id)
            .where(OUTCOMES.c.status == "accepted", REVOCATIONS.c.reason == ERASED)
        )
        items: dict[str, set[str]] = {}
        for row in self._rows(statement):
            items.setdefault(row["partition"], set()).add(row["feedback_id"])
        return items

    def replace_partition(self, name: str, digest: str, erased: Collection[str]) -> None:
        """Record that the file of a partition was written anew, without these items, and has to be versioned."""
        with self._write() as connection:
            partition = PARTITIONS.update().where(PARTITIONS.c.name == name)
            connection.execute(partition.values(digest=digest, dvc=None))
            for votes in batched(erased, BATCH):
                statement = REVOCATIONS.update().where(REVOCATIONS.c.feedback_id.in_(votes))
                connection.execute(statement.values(reason=ERASURES[1]))

    def vote(self, feedback_id: str) -> dict[str, Any]:
        """The row of a vote that exists."""
        return self._rows(select(FEEDBACK).where(FEEDBACK.c.id == feedback_id))[0]

    def erase_user(self, name: str, owner: str | None = None) -> UserRecords:
        """Erase the records of a person in one transaction, and return what they were.

        Raises: as `user_records`.
        """
        with self._write() as connection:
            self._in_turn(connection)
            records = _records(connection, name, owner)
            for votes in batched(records.votes, BATCH):
                _erase_votes(connection, votes)
            for completions in batched(records.completions, BATCH):
                _erase_completions(connection, completions)
            used = select(REQUEST_PICTURES.c.digest)
            connection.execute(PICTURES.delete().where(PICTURES.c.digest.not_in(used)))
            counts = f"{len(records.completions)} requests, {len(records.votes)} votes"
            self._add_audit(connection, "erase-user", name, counts)
        return records


def _records(connection: Connection, name: str, owner: str | None) -> UserRecords:
    is_theirs = or_(REQUESTS.c.owner == name, REQUESTS.c.body["user"].as_string() == name)
    is_their_vote = FEEDBACK.c.owner == name
    owners = {str(each) for each in connection.scalars(select(REQUESTS.c.owner).where(is_theirs).distinct())}
    owners |= {str(each) for each in connection.scalars(select(FEEDBACK.c.owner).where(is_their_vote).distinct())}
    owners &= owners if owner is None else {owner}
    if not owners:
        raise InputError(f"{name}: no record has this owner or user; see the field `user` of requests, or `keys list`")
    if len(owners) > 1:
        named = ", ".join(repr(each) for each in sorted(owners))
        raise InputError(f"{name}: records of the owners {named}; choose one with --owner")
    [owner_found] = owners
    completions = select(REQUESTS.c.id).where(is_theirs, REQUESTS.c.owner == owner_found)
    votes = [select(FEEDBACK.c.sequence, FEEDBACK.c.id).where(FEEDBACK.c.completion_id.in_(completions))]
    if owner_found == name:
        votes.append(select(FEEDBACK.c.sequence, FEEDBACK.c.id).where(is_their_vote))
    rows = connection.execute(union(*votes))
    return UserRecords(
        list(connection.scalars(completions.order_by(REQUESTS.c.created))),
        [vote_id for _, vote_id in sorted(map(tuple, rows))],
    )


def _erase_votes(connection: Connection, votes: list[str]) -> None:
    revoked = set(connection.scalars(select(REVOCATIONS.c.feedback_id).where(REVOCATIONS.c.feedback_id.in_(votes))))
    rows = [{"feedback_id": vote, "created": time.time(), "reason": ERASED} for vote in votes if vote not in revoked]
    if rows:
        connection.execute(REVOCATIONS.insert(), rows)
    connection.execute(REVOCATIONS.update().where(REVOCATIONS.c.feedback_id.in_(revoked)).values(reason=ERASED))
    empty = {"correction": None, "comment": None, "idempotency_key": None, "voice": "", "owner": ""}
    connection.execute(FEEDBACK.update().where(FEEDBACK.c.id.in_(votes)).values(**empty))
    outcomes = OUTCOMES.update().where(OUTCOMES.c.feedback_id.in_(votes))
    connection.execute(outcomes.values(voice="", content_digest=""))


def _erase_completions(connection: Connection, completions: list[str]) -> None:
    """Delete requests with their answers; those with votes, which refer to them, are emptied."""
    connection.execute(REQUEST_PICTURES.delete().where(REQUEST_PICTURES.c.request_id.in_(completions)))
    connection.execute(ANSWERS.delete().where(ANSWERS.c.request_id.in_(completions)))
    voted = set(connection.scalars(select(FEEDBACK.c.completion_id).where(FEEDBACK.c.completion_id.in_(completions))))
    empty = {"body": {"messages": []}, "owner": ""}
    connection.execute(REQUESTS.update().where(REQUESTS.c.id.in_(voted)).values(**empty))
    connection.execute(REQUESTS.delete().where(REQUESTS.c.id.in_(set(completions) - voted)))
