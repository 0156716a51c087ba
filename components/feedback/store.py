"""The durable record of the endpoint: what was asked, what was answered, what people said of it.

A write has reached the disk when its call returns, so whoever acknowledges after it never
acknowledges what a crash could lose. A later vote replaces an earlier one and both stay on
record. What became of the votes is kept beside them (ledger.py).
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import Column, Connection, Table, bindparam, func, select
from sqlalchemy.exc import IntegrityError

from components.config.params import InputError
from components.feedback.database import BUSY_SECONDS, StoreUnavailable, database_url, has_store
from components.feedback.keys import Keys
from components.feedback.ledger import Ledger
from components.feedback.tables import ANSWERS, FEEDBACK, REQUESTS, VOICE_CHARACTERS

__all__ = ["AnswerRecord", "Rating", "Store", "StoreUnavailable", "UnknownCompletion", "database_url", "has_store"]

Rating = Literal["up", "down"]


class UnknownCompletion(InputError):
    """Feedback or a trace for a completion that this database does not hold."""


@dataclass(frozen=True)
class AnswerRecord:
    """One finished answer."""

    content: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    """Wall time from request to last token."""
    steps: list[dict[str, Any]] = field(default_factory=list)
    tool_calls: list[dict[str, Any]] = field(default_factory=list)


_VOTED = ("id", "created", "rating", "correction", "comment", "idempotency_key", "voice")
_VOTE = (
    FEEDBACK.insert()
    .from_select(
        [*_VOTED, "completion_id"],
        select(*(bindparam(f"new_{name}", type_=FEEDBACK.c[name].type) for name in _VOTED), REQUESTS.c.id).where(
            REQUESTS.c.id == bindparam("completion")
        ),
        include_defaults=False,
    )
    # PostgreSQL's driver does not keep it for an insert, and it is how an unknown completion is seen.
    .execution_options(preserve_rowcount=True)
)
"""One vote, if its completion is on record."""
_REPLACE = (
    FEEDBACK.update()
    .where(FEEDBACK.c.completion_id == bindparam("completion"), FEEDBACK.c.replaced_by.is_(None))
    .where(FEEDBACK.c.id != bindparam("new_id"))
    .values(replaced_by=bindparam("new_id"))
)


class Store(Ledger, Keys):
    """Requests, answers and feedback in one database, with what became of the feedback and who may ask.

    Each method raises StoreUnavailable when the database is locked for too long, or gone.
    """

    @classmethod
    def of(cls, home: Path, busy_seconds: float = BUSY_SECONDS) -> Store:
        """The store that belongs to a state folder."""
        url = database_url(home)
        if url.startswith("sqlite"):
            home.mkdir(parents=True, exist_ok=True)
        return cls(url, busy_seconds)

    def add_request(self, completion_id: str, model: str, body: Mapping[str, Any]) -> None:
        """Record what is about to be answered, and by which `NAME/VERSION`.

        Not synced on its own: nothing is acknowledged before its answer, whose sync takes this along.
        """
        row = {"id": completion_id, "created": time.time(), "model": model, "body": dict(body)}
        with self._write(synced=False) as connection:
            connection.execute(REQUESTS.insert(), row)

    def add_answer(self, completion_id: str, answer: AnswerRecord) -> None:
        """Record the answer to a recorded request."""
        self._insert((ANSWERS, _answer_row(completion_id, answer)))

    def add_exchange(
        self, completion_id: str, model: str, body: Mapping[str, Any], asked: float, answer: AnswerRecord
    ) -> None:
        """Record what was asked at `asked` (Unix time) together with its answer, in half the time of one by one."""
        row = {"id": completion_id, "created": asked, "model": model, "body": dict(body)}
        self._insert((REQUESTS, row), (ANSWERS, _answer_row(completion_id, answer)))

    def add_feedback(
        self,
        completion_id: str,
        rating: Rating,
        correction: str | None = None,
        comment: str | None = None,
        idempotency_key: str | None = None,
        voice: str = "",
    ) -> str:
        """Record one vote of a `voice` and return its id; the same key returns the id of the first call with it.

        Raises: UnknownCompletion; InputError when the key was used for another completion.
        """
        vote = {"rating": rating, "correction": correction, "comment": comment, "idempotency_key": idempotency_key}
        for name, value in vote.items():
            if value and "\0" in value:
                raise InputError(f"{name}: holds a NUL character; send text without it")
        try:
            return self._vote(completion_id, {**vote, "voice": _voice(voice)})
        except IntegrityError:
            with self._read() as connection:
                known = _with_key(connection, idempotency_key)
            if known is None:
                raise
        if known["completion_id"] != completion_id:
            raise InputError(
                f"Idempotency-Key: {idempotency_key!r} was used for {known['completion_id']}; "
                "send a new key with each new feedback"
            )
        return str(known["id"])

    def _vote(self, completion_id: str, vote: Mapping[str, Any]) -> str:
        """Two statements when all is well: the database's own constraints say when it is not."""
        feedback_id = f"fb-{uuid.uuid4().hex}"
        row = {f"new_{name}": value for name, value in vote.items()}
        row |= {"completion": completion_id, "new_id": feedback_id, "new_created": time.time()}
        with self._write() as connection:
            self._in_turn(connection)
            if "\0" in completion_id or not connection.execute(_VOTE, row).rowcount:
                raise UnknownCompletion(
                    f"completion_id: {completion_id!r} is not a completion of this endpoint; send the id of an answer"
                )
            connection.execute(_REPLACE, {"completion": completion_id, "new_id": feedback_id})
        return feedback_id

    def completion(self, completion_id: str) -> dict[str, Any]:
        """Everything recorded about one completion: `id, created, model, request, answer, feedback`.

        `answer` is null while it is being written; `feedback` is oldest first.

        Raises: UnknownCompletion.
        """
        with self._read() as connection:
            known = "\0" not in completion_id  # which PostgreSQL would not even be asked for
            request = _one(connection, REQUESTS, REQUESTS.c.id, completion_id) if known else None
            if request is None:
                raise UnknownCompletion(f"{completion_id}: no such completion in {self.address}")
            answer = _one(connection, ANSWERS, ANSWERS.c.request_id, completion_id)
            votes = select(FEEDBACK).where(FEEDBACK.c.completion_id == completion_id).order_by(FEEDBACK.c.sequence)
            feedback = [dict(row) for row in connection.execute(votes).mappings()]
        if answer:
            del answer["request_id"]
        asked = request.pop("body")
        return {**request, "request": asked, "answer": answer, "feedback": feedback}

    def counts(self) -> dict[str, int]:
        """Rows on record; `feedback` counts standing votes, not replaced ones."""
        standing = select(func.count()).select_from(FEEDBACK).where(FEEDBACK.c.replaced_by.is_(None))
        with self._read() as connection:
            return {
                "requests": connection.scalar(select(func.count()).select_from(REQUESTS)) or 0,
                "answers": connection.scalar(select(func.count()).select_from(ANSWERS)) or 0,
                "feedback": connection.scalar(standing) or 0,
            }


def _answer_row(completion_id: str, answer: AnswerRecord) -> dict[str, Any]:
    row = {"request_id": completion_id, "created": time.time(), **vars(answer)}
    row["content"] = answer.content.replace("\0", "\ufffd")  # PostgreSQL's text has no NUL
    return row


def _voice(voice: str) -> str:
    """A voice that fits its column: what a client says of itself may be of any length."""
    if len(voice) <= VOICE_CHARACTERS and "\0" not in voice:
        return voice
    digest = hashlib.sha256(voice.encode(errors="surrogatepass")).hexdigest()[:32]
    return f"{voice.partition(':')[0][:16]}:{digest}".replace("\0", "")


def _one(connection: Connection, table: Table, column: Column[Any], value: str) -> dict[str, Any] | None:
    row = connection.execute(select(table).where(column == value)).mappings().first()
    return None if row is None else dict(row)


def _with_key(connection: Connection, key: str | None) -> dict[str, Any] | None:
    return None if key is None else _one(connection, FEEDBACK, FEEDBACK.c.idempotency_key, key)
