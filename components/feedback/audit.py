"""The audit log: who did what to which model, key or person's records, and when.

A change of the store and its row are one transaction. Rows are only ever added.
"""

from __future__ import annotations

import time
from typing import Any, Literal, get_args

from sqlalchemy import Connection, select

from components.feedback.database import Database
from components.feedback.tables import AUDIT
from components.runtime.process import os_user

Action = Literal[
    "promote", "rollback", "moved", "revoke", "key create", "key revoke", "key rotate", "export-user", "erase-user"
]
ACTIONS: tuple[Action, ...] = get_args(Action)
OBJECT_CHARACTERS = 256


class Audit(Database):
    """The part of the store that holds the audit log."""

    def add_audit(self, action: Action, target: str, detail: str | None = None, actor: str = "") -> None:
        """Record an action on a model version, a key, a vote or a person; by default of this process's account."""
        with self._write() as connection:
            self._add_audit(connection, action, target, detail, actor)

    def audit_rows(self, action: Action | None = None) -> list[dict[str, Any]]:
        """Rows of the log, oldest first: `id, created` (Unix time)`, actor, action, object, detail`."""
        statement = select(AUDIT).order_by(AUDIT.c.id)
        return self._rows(statement if action is None else statement.where(AUDIT.c.action == action))

    def _add_audit(
        self, connection: Connection, action: Action, target: str, detail: str | None = None, actor: str = ""
    ) -> None:
        row = {"created": time.time(), "actor": actor or os_user(), "action": action, "detail": detail}
        connection.execute(AUDIT.insert(), {**row, "object": target[:OBJECT_CHARACTERS]})
