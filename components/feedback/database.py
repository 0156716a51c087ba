"""The database of the store: SQLite in the state folder or what LOOPWRIGHT_DATABASE_URL names, and its schema.

Alembic migrates what an older version left behind, in one transaction; a database that is up to date is opened
without importing it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError

from components.config import InputError

HEAD = "0002"
"""The newest migration."""
BUSY_SECONDS = 30.0
"""How long a write waits for another process's write."""
_MIGRATIONS = Path(__file__).with_name("migrations")
_ADVISORY_LOCK = 0x100B


class StoreUnavailable(Exception):
    """The database is locked by someone, or gone; nothing of the write was kept."""


class Database:
    """One database, opened and at the newest schema."""

    def __init__(self, url: str, busy_seconds: float = BUSY_SECONDS) -> None:
        """Open the database and bring its schema up to date.

        Raises: InputError when the address cannot be used.
        """
        self._engine = _open(url, busy_seconds)
        try:
            with self._write() as connection:
                _migrate(connection)
        except StoreUnavailable as error:
            raise InputError(f"{shown(url)}: cannot be opened: {error}; check LOOPWRIGHT_DATABASE_URL") from error

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        """One transaction: all of it is on disk when the block has ended, or nothing.

        Raises: StoreUnavailable.
        """
        try:
            with self._engine.begin() as connection:
                if self._engine.dialect.name == "postgresql":
                    # Numbers are given out before the commit: a later one could be seen before an earlier one.
                    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
                yield connection
        except OperationalError as error:
            raise StoreUnavailable(_said(error)) from error

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        try:
            with self._engine.connect().execution_options(loopwright_read=True) as connection:
                yield connection
        except OperationalError as error:
            raise StoreUnavailable(_said(error)) from error


def database_url(home: Path) -> str:
    """Address of the database: `LOOPWRIGHT_DATABASE_URL`, else SQLite in the state folder."""
    return os.environ.get("LOOPWRIGHT_DATABASE_URL") or f"sqlite:///{home / 'feedback.db'}"


def shown(url: str) -> str:
    """The address without its password."""
    try:
        address: URL = make_url(url)
    except ArgumentError:
        return url
    return address.render_as_string(hide_password=True)


def _open(url: str, busy_seconds: float) -> Engine:
    try:
        address = make_url(url)
        engine = create_engine(address)
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
        raise InputError(
            f"LOOPWRIGHT_DATABASE_URL: {shown(url)!r} cannot be used ({error}); write it as sqlite:///FILE or"
            " postgresql+psycopg://USER@HOST/NAME (with the extra postgres installed)"
        ) from error
    if address.get_backend_name() == "sqlite":
        _prepare_sqlite(engine, busy_seconds)
    return engine


def _prepare_sqlite(engine: Engine, busy_seconds: float) -> None:
    """Durable commits, readers beside one writer, and writers that queue instead of failing."""

    @event.listens_for(engine, "connect")
    def connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # transactions begin below, not in the driver
        for pragma in (
            f"busy_timeout={round(busy_seconds * 1000)}",
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


def _migrate(connection: Connection) -> None:
    """Bring the schema to `HEAD`; whoever opens it meanwhile waits for this transaction."""
    tables = set(inspect(connection).get_table_names())
    at = connection.scalar(text("SELECT version_num FROM alembic_version")) if "alembic_version" in tables else None
    if at == HEAD:
        return
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.attributes["connection"] = connection
    if at is None and "requests" in tables:
        command.stamp(config, "0001")  # made before there were migrations
    command.upgrade(config, "head")


def _said(error: DBAPIError) -> str:
    return " ".join(str(error.orig).split())
