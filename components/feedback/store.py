"""The durable record of the endpoint: what was asked, what was answered, what people said of it.

A write has reached the disk when its call returns, so whoever acknowledges after it never
acknowledges what a crash could lose. The only door to SQLAlchemy. Any number of threads and
processes may use one database; a later vote replaces an earlier one and both stay on record.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import (
    JSON,
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    func,
    select,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, NoSuchModuleError, OperationalError

from components.config import InputError

Rating = Literal["up", "down"]

BUSY_SECONDS = 30
"""How long a write waits for another process's write."""

_METADATA = MetaData()

REQUESTS = Table(
    "requests",
    _METADATA,
    Column("id", String(64), primary_key=True),
    Column("created", Float, nullable=False, index=True),
    Column("model", String(256), nullable=False),
    Column("body", JSON, nullable=False),
)
ANSWERS = Table(
    "answers",
    _METADATA,
    Column("request_id", ForeignKey("requests.id"), primary_key=True),
    Column("created", Float, nullable=False),
    Column("content", Text, nullable=False),
    Column("steps", JSON, nullable=False),
    Column("tool_calls", JSON, nullable=False),
    Column("finish_reason", String(32), nullable=False),
    Column("prompt_tokens", Integer, nullable=False),
    Column("completion_tokens", Integer, nullable=False),
    Column("seconds", Float, nullable=False),
)
FEEDBACK = Table(
    "feedback",
    _METADATA,
    # Grows in the order of the commits, so that a reader can go on from the last number it saw.
    Column("sequence", Integer, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("completion_id", ForeignKey("requests.id"), nullable=False, index=True),
    Column("created", Float, nullable=False),
    Column("rating", String(8), nullable=False),
    Column("correction", Text),
    Column("comment", Text),
    Column("idempotency_key", String(256), unique=True),
    Column("replaced_by", String(64)),
    sqlite_autoincrement=True,
)


class UnknownCompletion(InputError):
    """Feedback or a trace for a completion that this database does not hold."""


@dataclass(frozen=True)
class Answered:
    """One finished answer."""

    content: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    """Wall time from request to last token."""
    steps: list[dict[str, Any]] = field(default_factory=list)
    tool_calls: list[dict[str, Any]] = field(default_factory=list)


def database_url(home: Path) -> str:
    """Address of the database: `LOOPWRIGHT_DATABASE_URL`, else SQLite in the state folder."""
    return os.environ.get("LOOPWRIGHT_DATABASE_URL") or f"sqlite:///{home / 'feedback.db'}"


class Store:
    """Requests, answers and feedback in one database."""

    def __init__(self, url: str) -> None:
        """Open the database and create what it lacks.

        Raises: InputError when the address cannot be used.
        """
        self._engine = _open(url)
        try:
            with self._write() as connection:
                _METADATA.create_all(connection)
        except OperationalError as error:
            raise InputError(f"{_shown(url)}: cannot be opened: {error.orig}; check LOOPWRIGHT_DATABASE_URL") from error

    @classmethod
    def of(cls, home: Path) -> Store:
        """The store that belongs to a state folder."""
        url = database_url(home)
        if url.startswith("sqlite"):
            home.mkdir(parents=True, exist_ok=True)
        return cls(url)

    def close(self) -> None:
        self._engine.dispose()

    def add_request(self, completion_id: str, model: str, body: Mapping[str, Any]) -> None:
        """Record what is about to be answered, and by which `NAME/VERSION`."""
        with self._write() as connection:
            connection.execute(
                REQUESTS.insert(), {"id": completion_id, "created": time.time(), "model": model, "body": dict(body)}
            )

    def add_answer(self, completion_id: str, answer: Answered) -> None:
        """Record the answer to a recorded request."""
        with self._write() as connection:
            connection.execute(
                ANSWERS.insert(), {"request_id": completion_id, "created": time.time(), **asdict(answer)}
            )

    def add_feedback(
        self,
        completion_id: str,
        rating: Rating,
        correction: str | None = None,
        comment: str | None = None,
        idempotency_key: str | None = None,
    ) -> str:
        """Record one vote and return its id; the same key returns the id of the first call with it.

        Raises: UnknownCompletion; InputError when the key was used for another completion.
        """
        vote = {"rating": rating, "correction": correction, "comment": comment, "idempotency_key": idempotency_key}
        try:
            return self._vote(completion_id, vote)
        except IntegrityError:
            # Databases that let two writers run: the other one took the key between our look and our insert.
            return self._vote(completion_id, vote)

    def _vote(self, completion_id: str, vote: Mapping[str, Any]) -> str:
        with self._write() as connection:
            if known := _with_key(connection, vote["idempotency_key"]):
                if known["completion_id"] != completion_id:
                    raise InputError(
                        f"Idempotency-Key: {vote['idempotency_key']!r} was used for {known['completion_id']}; "
                        "send a new key with each new feedback"
                    )
                return str(known["id"])
            if connection.scalar(select(REQUESTS.c.id).where(REQUESTS.c.id == completion_id)) is None:
                raise UnknownCompletion(
                    f"completion_id: {completion_id!r} is not a completion of this endpoint; send the id of an answer"
                )
            feedback_id = f"fb-{uuid.uuid4().hex}"
            connection.execute(
                FEEDBACK.update()
                .where(FEEDBACK.c.completion_id == completion_id, FEEDBACK.c.replaced_by.is_(None))
                .values(replaced_by=feedback_id)
            )
            row = {"id": feedback_id, "completion_id": completion_id, "created": time.time(), **vote}
            connection.execute(FEEDBACK.insert(), row)
            return feedback_id

    def completion(self, completion_id: str) -> dict[str, Any]:
        """Everything recorded about one completion: `id, created, model, request, answer, feedback`.

        `answer` is null while it is being written; `feedback` is oldest first.

        Raises: UnknownCompletion.
        """
        with self._read() as connection:
            request = _one(connection, REQUESTS, REQUESTS.c.id, completion_id)
            if request is None:
                raise UnknownCompletion(f"{completion_id}: no such completion in {_shown(str(self._engine.url))}")
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

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        with self._engine.begin() as connection:
            yield connection

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        with self._engine.connect().execution_options(loopwright_read=True) as connection:
            yield connection


def _open(url: str) -> Engine:
    try:
        address = make_url(url)
        engine = create_engine(address)
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
        raise InputError(
            f"LOOPWRIGHT_DATABASE_URL: {_shown(url)!r} cannot be used ({error}); write it as sqlite:///FILE"
        ) from error
    if address.get_backend_name() == "sqlite":
        _prepare_sqlite(engine)
    return engine


def _prepare_sqlite(engine: Engine) -> None:
    """Durable commits, readers beside one writer, and writers that queue instead of failing."""

    @event.listens_for(engine, "connect")
    def connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # transactions begin below, not in the driver
        for pragma in (
            f"busy_timeout={BUSY_SECONDS * 1000}",
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
        ):
            connection.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that reads first and then writes cannot wait for another writer; it must start as a writer.
        reads = connection.get_execution_options().get("loopwright_read")
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def _one(connection: Connection, table: Table, column: Column[Any], value: str) -> dict[str, Any] | None:
    row = connection.execute(select(table).where(column == value)).mappings().first()
    return None if row is None else dict(row)


def _with_key(connection: Connection, key: str | None) -> dict[str, Any] | None:
    return None if key is None else _one(connection, FEEDBACK, FEEDBACK.c.idempotency_key, key)


def _shown(url: str) -> str:
    """The address without its password."""
    try:
        address: URL = make_url(url)
    except ArgumentError:
        return url
    return address.render_as_string(hide_password=True)
