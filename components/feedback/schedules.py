"""Which flows are scheduled, and when each last succeeded: on whichever host it ran, every endpoint reports it."""

from __future__ import annotations

import time
from collections.abc import Collection

from sqlalchemy import func

from components.feedback.database import Database, insertion
from components.feedback.tables import SCHEDULES


class Schedules(Database):
    """The part of the store that knows of the schedules; times are in seconds since the epoch."""

    def record_success(self, flow: str) -> None:
        """Remember that a flow, or a backup, has succeeded now."""
        now = time.time()
        with self._write() as connection:
            row = insertion(connection, SCHEDULES).values(flow=flow, succeeded=now)
            connection.execute(row.on_conflict_do_update(index_elements=["flow"], set_={"succeeded": now}))

    def record_schedules(self, flows: Collection[str]) -> None:
        """Remember since when these flows, and no others, are scheduled: what never succeeds is late as well."""
        now = time.time()
        with self._write() as connection:
            connection.execute(SCHEDULES.update().where(SCHEDULES.c.flow.not_in(flows)).values(scheduled=None))
            for flow in flows:
                row = insertion(connection, SCHEDULES).values(flow=flow, scheduled=now)
                since = func.coalesce(SCHEDULES.c.scheduled, now)
                connection.execute(row.on_conflict_do_update(index_elements=["flow"], set_={"scheduled": since}))

    def schedules(self) -> dict[str, float]:
        """Time since which each flow is scheduled."""
        return self._times("scheduled")

    def successes(self) -> dict[str, float]:
        """Time of the last success of each flow."""
        return self._times("succeeded")

    def _times(self, column: str) -> dict[str, float]:
        return {row["flow"]: row[column] for row in self._rows(SCHEDULES.select()) if row[column] is not None}
