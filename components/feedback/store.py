"""The endpoint's durable store: requests, answers and votes.

A write is on disk when its call returns: what is acknowledged after it survives a crash. A later vote replaces an
earlier one, and both stay on record. The status of the votes is in the same database (ledger.py).
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from sqlalchemy import Connection, Select, String, and_, bindparam, func, or_, select
from sqlalchemy.exc import IntegrityError

from components.config.params import InputError
from components.feedback.audit import Action
from components.feedback.database import (
    BUSY_SECONDS,
    StoreUnavailable,
    database_url,
    has_store,
    insertion,
    through_restarts,
)
from components.feedback.keys import Keys
from components.feedback.leases import Lease, Leases, leased
from components.feedback.ledger import Ledger
from components.feedback.pictures import PictureFile, Pictures
from components.feedback.replicas import Replicas
from components.feedback.schedules import Schedules
from components.feedback.tables import ANSWERS, FEEDBACK, REQUESTS, VOICE_CHARACTERS
from components.feedback.user_records import People
from components.runtime.process import host_id
from components.tracking.registry import Registry

__all__ = [
    "AnswerRecord",
    "Rating",
    "Store",
    "StoreUnavailable",
    "UnknownCompletion",
    "database_url",
    "has_store",
]

Rating = Literal["up", "down"]
ALIAS_SECONDS = 60.0
"""Longest wait for another host that moves aliases."""


class UnknownCompletion(InputError):
    """A completion id that this database does not have."""


@dataclass(frozen=True)
class AnswerRecord:
    content: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    """Wall time from the request to the last token."""
    steps: list[dict[str, Any]] = field(default_factory=list)
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    conversation: str | None = None
    """`conversation_digest` of the request's messages and this answer."""


_VOTED = ("id", "created", "rating", "correction", "comment", "idempotency_key", "voice", "owner")
_VOTE = (
    FEEDBACK.insert()
    .from_select(
        [*_VOTED, "completion_id"],
        select(*(bindparam(f"new_{name}", type_=FEEDBACK.c[name].type) for name in _VOTED), REQUESTS.c.id).where(
            REQUESTS.c.id == bindparam("completion"),
            or_(bindparam("viewer", type_=String).is_(None), REQUESTS.c.owner == bindparam("viewer")),
        ),
        include_defaults=False,
    )
    # A row count of 0 means an unknown completion; PostgreSQL's driver drops it for inserts by default.
    .execution_options(preserve_rowcount=True)
)
"""Insert a vote if its completion exists."""
_REPLACE = (
    FEEDBACK.update()
    .where(FEEDBACK.c.completion_id == bindparam("completion"), FEEDBACK.c.replaced_by.is_(None))
    .where(FEEDBACK.c.id != bindparam("new_id"))
    .values(replaced_by=bindparam("new_id"))
)


class Store(Ledger, Keys, Pictures, People, Replicas, Leases, Schedules):
    """Requests with their pictures, answers, feedback with its status, API keys, the audit log and what replicas share.

    `owner` is the owner of the API key that a row is made with, empty without a key. Where a `viewer` is given, the
    rows of other owners do not exist; None sees all. Every method raises StoreUnavailable when the database is locked
    for too long, or missing.
    """

    @classmethod
    def of(cls, home: Path, busy_seconds: float = BUSY_SECONDS) -> Store:
        url = database_url(home)
        if url.startswith("sqlite"):
            home.mkdir(parents=True, exist_ok=True)
        return cls(url, busy_seconds)

    @through_restarts
    def add_request(
        self,
        completion_id: str,
        model: str,
        body: Mapping[str, Any],
        pictures: Sequence[PictureFile] = (),
        owner: str = "",
    ) -> None:
        """Record a request, whose body refers to its pictures, and the `NAME/VERSION` that answers it.

        Not synced: nothing is acknowledged before its answer, which syncs both.
        """
        row = {"id": completion_id, "created": time.time(), "model": model, "body": dict(body), "owner": owner}
        with self._write(synced=False) as connection:
            self._insert_request(connection, row, pictures)

    @through_restarts
    def add_answer(self, completion_id: str, answer: AnswerRecord) -> None:
        self._insert((ANSWERS, _answer_row(completion_id, answer)))

    @through_restarts
    def add_exchange(
        self,
        completion_id: str,
        model: str,
        body: Mapping[str, Any],
        created: float,
        answer: AnswerRecord,
        pictures: Sequence[PictureFile] = (),
        owner: str = "",
    ) -> None:
        """Record a request, created at a Unix time, with its answer; takes half the time of two calls."""
        row = {"id": completion_id, "created": created, "model": model, "body": dict(body), "owner": owner}
        if not pictures:
            self._insert((REQUESTS, row), (ANSWERS, _answer_row(completion_id, answer)))
            return
        with self._write() as connection:
            self._insert_request(connection, row, pictures)
            answered = insertion(connection, ANSWERS).on_conflict_do_nothing()
            connection.execute(answered, _answer_row(completion_id, answer))

    def _insert_request(self, connection: Connection, row: dict[str, Any], pictures: Sequence[PictureFile]) -> None:
        if pictures:  # `forget` may be about to delete one that no other request refers to
            self._in_turn(connection)
        new = insertion(connection, REQUESTS).on_conflict_do_nothing().execution_options(preserve_rowcount=True)
        if connection.execute(new, row).rowcount:  # else its commit was not acknowledged
            self._add_pictures(connection, row["id"], pictures)

    def add_feedback(
        self,
        completion_id: str,
        rating: Rating,
        correction: str | None = None,
        comment: str | None = None,
        idempotency_key: str | None = None,
        user: str = "",
        owner: str = "",
        viewer: str | None = None,
    ) -> str:
        """Record a user's vote and return its id; an owner's repeated idempotency key returns the id of its first call.

        Raises: UnknownCompletion; InputError when the key was used for another completion.
        """
        vote = {"rating": rating, "correction": correction, "comment": comment, "idempotency_key": idempotency_key}
        for name, value in vote.items():
            if value and "\0" in value:
                raise InputError(f"{name}: contains a NUL character; send text without it")
        feedback_id = f"fb-{uuid.uuid4().hex}"
        row: dict[str, Any] = {"new_id": feedback_id, **{f"new_{name}": value for name, value in vote.items()}}
        row |= {"new_voice": _column_value(user), "new_owner": owner, "new_created": time.time()}
        try:
            self._vote(completion_id, row, viewer)
        except IntegrityError:
            known = self._recorded_vote(feedback_id, owner, idempotency_key)
            if known is None:
                raise
        else:
            return feedback_id
        if known["completion_id"] != completion_id:
            raise InputError(
                f"Idempotency-Key: {idempotency_key!r} was used for {known['completion_id']}; "
                "send a new key with each new feedback"
            )
        return str(known["id"])

    @through_restarts
    def _vote(self, completion_id: str, row: Mapping[str, Any], viewer: str | None) -> None:
        """Insert a vote with two statements; the database's constraints detect errors."""
        with self._write() as connection:
            self._in_turn(connection)
            new = {**row, "completion": completion_id, "viewer": viewer}
            if "\0" in completion_id or not connection.execute(_VOTE, new).rowcount:
                raise UnknownCompletion(
                    f"completion_id: {completion_id!r} is not a completion of this endpoint; send the id of an answer"
                )
            connection.execute(_REPLACE, {"completion": completion_id, "new_id": row["new_id"]})

    @through_restarts
    def _recorded_vote(self, feedback_id: str, owner: str, idempotency_key: str | None) -> dict[str, Any] | None:
        """The vote of this id, whose commit was not acknowledged, or of this key."""
        keyed = and_(FEEDBACK.c.owner == owner, FEEDBACK.c.idempotency_key == idempotency_key)
        with self._read() as connection:
            return _first(connection, select(FEEDBACK).where(or_(FEEDBACK.c.id == feedback_id, keyed)))

    @through_restarts
    def completion(self, completion_id: str, viewer: str | None = None) -> dict[str, Any]:
        """The record of one completion: `id, created, model, owner, request, answer, feedback`.

        `answer` is null while it is being written; `feedback` is oldest first.

        Raises: UnknownCompletion.
        """
        valid = "\0" not in completion_id  # PostgreSQL's driver refuses NUL
        with self._read() as connection:
            request = _first(connection, select(REQUESTS).where(REQUESTS.c.id == completion_id)) if valid else None
            if request is None or viewer not in (None, request["owner"]):
                raise UnknownCompletion(f"{completion_id}: no such completion in {self.address}")
            answer = _first(connection, select(ANSWERS).where(ANSWERS.c.request_id == completion_id))
            votes = select(FEEDBACK).where(FEEDBACK.c.completion_id == completion_id).order_by(FEEDBACK.c.sequence)
            feedback = [dict(row) for row in connection.execute(votes).mappings()]
        if answer:
            del answer["request_id"], answer["conversation"]
        body = request.pop("body")
        return {**request, "request": body, "answer": answer, "feedback": feedback}

    def counts(self) -> dict[str, int]:
        """Number of rows; `feedback` excludes replaced votes."""
        return {
            "requests": self._scalar(select(func.count()).select_from(REQUESTS)),
            "answers": self._scalar(select(func.count()).select_from(ANSWERS)),
            "feedback": self._scalar(
                select(func.count()).select_from(FEEDBACK).where(FEEDBACK.c.replaced_by.is_(None))
            ),
        }


@contextmanager
def leased_in(home: Path, name: str, patience: float = 0.0, ends_process: bool = False) -> Iterator[Lease | None]:
    """As `leased`, where the state folder's store is shared; who loses the lease goes on, unless `ends_process`."""
    if not is_shared(home):
        yield None
        return
    host = host_id(home)
    with closing(Store.of(home)) as store, leased(store, name, patience, ends_process, host) as lease:
        yield lease


def is_shared(home: Path) -> bool:
    """Whether other hosts may use the state folder's store too."""
    return database_url(home).startswith("postgres")


def record_success(home: Path, flow: str) -> None:
    """Remember in the state folder's store that a flow, or a backup, has succeeded now."""
    with closing(Store.of(home)) as store:
        store.record_success(flow)


def shared_registry(home: Path) -> Registry:
    """The registry, whose aliases one host at a time moves where several share the store, and each move is audited."""

    def audit(action: str, target: str, detail: str, actor: str) -> None:
        with closing(Store.of(home)) as store:
            store.add_audit(cast(Action, action), target, detail or None, actor)

    return Registry(home, lambda: leased_in(home, "aliases", ALIAS_SECONDS), audit)


def _answer_row(completion_id: str, answer: AnswerRecord) -> dict[str, Any]:
    row = {"request_id": completion_id, "created": time.time(), **vars(answer)}
    row["content"] = answer.content.replace("\0", "\ufffd")  # PostgreSQL's text has no NUL
    return row


def _column_value(user: str) -> str:
    """The value of the column `voice`: a longer user, which a client may send, becomes its digest."""
    if len(user) <= VOICE_CHARACTERS and "\0" not in user:
        return user
    digest = hashlib.sha256(user.encode(errors="surrogatepass")).hexdigest()[:32]
    return f"{user.partition(':')[0][:16]}:{digest}".replace("\0", "")


def _first(connection: Connection, statement: Select[Any]) -> dict[str, Any] | None:
    row = connection.execute(statement).mappings().first()
    return None if row is None else dict(row)
