"""What endpoints that share a database know of each other: rate limits, loaded models, and who answered a conversation.

Times are those of the database's clock: replicas with clocks of their own agree.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, case, inspect, select
from sqlalchemy.exc import SQLAlchemyError

from components.feedback.database import Database, database_url, insertion, open_engine, through_restarts
from components.feedback.postgres import clock
from components.feedback.tables import ANSWERS, RATE_LIMITS, REPLICAS, REQUESTS

LIVE_SECONDS = 10.0
"""Time since its last sign of life up to which a replica counts."""
FORGOTTEN_SECONDS = 3600.0
"""Time after which the record of a replica that was killed is removed."""


def conversation_digest(messages: Sequence[Mapping[str, Any]]) -> str:
    """Digest of a conversation's roles, texts and calls, which a client sends back as it got them."""
    turns = []
    for message in messages:
        calls = [call["function"] for call in message.get("tool_calls") or ()]
        turns.append([message["role"], message["content"], [[call["name"], call["arguments"]] for call in calls]])
    return hashlib.sha256(json.dumps(turns).encode()).hexdigest()[:32]


class Replicas(Database):
    """The part of the store that several endpoints share while they run."""

    @through_restarts
    def take_request(self, key: str, per_minute: int) -> float:
        """Count a request of a key where its limit allows it: 0, else the seconds until the next one is allowed.

        A bucket of a minute's requests that refills continuously, as one number: when it is full again (GCRA). One
        statement, so that replicas together allow what a single one does.
        """
        interval = 60.0 / per_minute
        with self._read() as connection:
            now = clock(connection)
            limits = insertion(connection, RATE_LIMITS).values(key=key, full_at=now + interval)
            # A bucket that takes longer to refill than an empty one is of before the clock was set back.
            is_refilling = RATE_LIMITS.c.full_at.between(now, now + 60.0)
            full_at = case((is_refilling, RATE_LIMITS.c.full_at), else_=now) + interval
            take = limits.on_conflict_do_update(
                index_elements=["key"], set_={"full_at": full_at}, where=full_at <= now + 60.0
            ).returning(RATE_LIMITS.c.full_at)
            allowed = connection.scalar(take)
            connection.commit()
            if allowed is not None:
                return 0.0
            wait = RATE_LIMITS.c.full_at + interval - 60.0 - now
            # Never 0: that it is allowed by now does not count it.
            return max(1e-3, connection.scalar(select(wait).where(RATE_LIMITS.c.key == key)) or 0.0)

    def announce(self, replica: str, models: Sequence[str]) -> dict[str, frozenset[str]]:
        """Record that a replica runs and which models it has; returns those of each replica that runs.

        Raises: StoreUnavailable at once where nothing can be recorded.
        """
        with self._write(synced=False, probe=True) as connection:
            now = clock(connection)
            row = {"seen": now, "models": list(models)}
            record = insertion(connection, REPLICAS).values(id=replica, **row)
            connection.execute(record.on_conflict_do_update(index_elements=["id"], set_=row))
            is_known = REPLICAS.c.seen.between(now - FORGOTTEN_SECONDS, now + LIVE_SECONDS)
            connection.execute(REPLICAS.delete().where(~is_known))
            live = select(REPLICAS.c.id, REPLICAS.c.models).where(_is_live(now))
            return {str(name): frozenset(loaded) for name, loaded in connection.execute(live)}

    def give_up(self) -> None:
        """Let all that waits for PostgreSQL's answer fail, and refuse what comes, until `announce` succeeds.

        For a server that hangs; one that is away refuses by itself.
        """
        self._given_up = True
        self._engine.dispose()  # idle connections, which the next operation would ask
        if self._sockets is not None:
            self._sockets.shut_down()

    def leave(self, replica: str) -> None:
        """Record that a replica has ended."""
        with self._write() as connection:
            connection.execute(REPLICAS.delete().where(REPLICAS.c.id == replica))

    def loaded_models(self) -> set[str]:
        """The models that running replicas have."""
        with self._read() as connection:
            live = select(REPLICAS.c.models).where(_is_live(clock(connection)))
            return {name for names in connection.scalars(live) for name in names}

    @through_restarts
    def answering_model(self, conversation: str, owner: str) -> str | None:
        """`NAME/VERSION` of the model that gave the last answer of a conversation; None where none is on record."""
        answered = (
            select(REQUESTS.c.model)
            .join(ANSWERS, ANSWERS.c.request_id == REQUESTS.c.id)
            .where(ANSWERS.c.conversation == conversation, REQUESTS.c.owner == owner)
            .order_by(ANSWERS.c.created.desc())
            .limit(1)
        )
        with self._read() as connection:
            model: str | None = connection.scalar(answered)
            return model


def live_replicas(home: Path) -> list[str]:
    """`HOST-PROCESS-ID` of the replicas that run on a state folder's store, whose schema stays as it is.

    Empty where it cannot be read: nobody can run on it then.
    """
    engine, file = open_engine(database_url(home), busy_seconds=5.0)
    if file is not None and not file.exists():  # opening it would create it
        return []
    try:
        with engine.connect() as connection:
            if not inspect(connection).has_table(REPLICAS.name):  # an earlier schema
                return []
            return sorted(connection.scalars(select(REPLICAS.c.id).where(_is_live(clock(connection)))))
    except SQLAlchemyError:
        return []
    finally:
        engine.dispose()


def _is_live(now: ColumnElement[float]) -> ColumnElement[bool]:
    """Whether a replica counts; one that was seen in the future was seen before the clock was set back."""
    return REPLICAS.c.seen.between(now - LIVE_SECONDS, now + LIVE_SECONDS)
