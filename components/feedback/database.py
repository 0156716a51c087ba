"""One database behind the store: SQLite in the state folder or PostgreSQL by address, at today's schema.

A write has reached the disk when it returns. Any number of threads and processes may use one database.
Opening one that is at today's schema imports no Alembic, so that a server starts quickly.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, cast

from sqlalchemy import JSON, Connection, Engine, Table, create_engine, event, inspect, text
from sqlalchemy.dialects import sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DatabaseError,
    DataError,
    IntegrityError,
    InterfaceError,
    NoSuchModuleError,
    ProgrammingError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout

from components.config.params import InputError
from components.config.paths import disk_trouble

BUSY_SECONDS = 30.0
"""How long a write waits for another process's write, where nobody says otherwise."""
HEAD = "0003"
"""The newest revision in migrations/."""
FIRST = "0001"
"""The revision that a database made before Alembic is at."""
_MIGRATIONS = Path(__file__).with_name("migrations")
_LOCK = 0x6C6F6F70
"""PostgreSQL's advisory lock: votes are numbered in the order in which they commit, migrations run one at a time."""


class StoreUnavailable(InputError):
    """The database is locked, or gone; nothing of what was asked of it has happened."""


def database_url(home: Path) -> str:
    """Address of the database: `LOOPWRIGHT_DATABASE_URL`, else SQLite in the state folder."""
    return os.environ.get("LOOPWRIGHT_DATABASE_URL") or f"sqlite:///{home / 'feedback.db'}"


def has_store(home: Path) -> bool:
    """Whether a store was opened here before; asking creates none."""
    return (home / "feedback.db").exists() or bool(os.environ.get("LOOPWRIGHT_DATABASE_URL"))


class Database:
    """Connections to one database, each in a transaction."""

    def __init__(self, url: str, busy_seconds: float = BUSY_SECONDS) -> None:
        """Open the database and bring it to today's schema.

        Raises: InputError when the address cannot be used, StoreUnavailable when the database cannot be opened.
        """
        self.address = shown(url)
        self._engine, self._file = _open(url, busy_seconds)
        self._reopening = threading.Lock()
        self._inode: int | None = None
        self._writers: list[sqlite3.Connection] = []
        """SQLite's, between two inserts."""
        with self._told("cannot be opened", "check LOOPWRIGHT_DATABASE_URL"):
            self._prepare()

    def close(self) -> None:
        self._drop_writers()
        self._engine.dispose()

    @contextmanager
    def _write(self, synced: bool = True) -> Iterator[Connection]:
        """A transaction that is on disk when the block ends, or never was.

        Not `synced`, SQLite leaves it to the next synced one to reach the disk with it: the death of this process loses
        nothing, a power cut may lose it. (PostgreSQL syncs the commits of many at once by itself.)
        """
        with self._told("cannot be written", "send it again; nothing of it was kept"):
            self._look()
            options = {} if synced else {"loopwright_unsynced": True}
            with self._engine.connect().execution_options(**options) as connection, connection.begin():
                yield connection

    def _insert(self, *rows: tuple[Table, dict[str, Any]]) -> None:
        """Write rows in a transaction that is on disk when this returns.

        It is what every answer waits for: for SQLite past SQLAlchemy's statements, which take longer than SQLite does.
        """
        if self._file is None:
            with self._write() as connection:
                for table, row in rows:
                    connection.execute(table.insert(), row)
            return
        with self._told("cannot be written", "send it again; nothing of it was kept"):
            self._look()
            writers = self._writers
            try:
                writer = writers.pop()
            except IndexError:
                writer = self._writer()
            try:
                writer.execute("BEGIN IMMEDIATE")
                for table, row in rows:
                    writer.execute(*_plain_insert(table, row))
                writer.execute("COMMIT")
            except BaseException:
                writer.close()  # which takes back what was not committed
                raise
            if writers is self._writers:
                writers.append(writer)
            else:  # of a file that is no longer this database's
                writer.close()

    def _writer(self) -> sqlite3.Connection:
        """A connection that `_insert` keeps for itself: the pool's hand-over takes as long as the rows."""
        pooled = self._engine.raw_connection()
        writer = cast(sqlite3.Connection, pooled.dbapi_connection)
        pooled.detach()
        writer.execute("PRAGMA synchronous=FULL")
        return writer

    def _drop_writers(self) -> None:
        idle, self._writers = self._writers, []
        with suppress(IndexError):  # an insert may be taking one of them at this moment: each has one owner
            while True:
                idle.pop().close()

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        with self._told("cannot be read", "try again"):
            self._look()
            with self._engine.connect().execution_options(loopwright_read=True) as connection:
                yield connection

    @property
    def _is_postgres(self) -> bool:
        return self._engine.dialect.name == "postgresql"

    def _in_turn(self, connection: Connection) -> None:
        """From here to the end of the transaction, no other one that asks for this goes on."""
        if self._is_postgres:  # SQLite has one writer anyway
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")

    @contextmanager
    def _told(self, what: str, remedy: str) -> Iterator[None]:
        try:
            yield
        except (IntegrityError, DataError, ProgrammingError, sqlite3.IntegrityError, sqlite3.ProgrammingError):
            raise  # of what was asked, not of the database
        except (DatabaseError, InterfaceError, PoolTimeout, sqlite3.Error) as error:
            if helps := disk_trouble(error).rpartition("; ")[2]:
                remedy = f"{helps}, then {remedy}" if what == "cannot be written" else helps
            raise StoreUnavailable(f"{self.address}: {what}: {_line(error)}; {remedy}") from error

    def _prepare(self) -> None:
        with self._engine.connect().execution_options(loopwright_read=True) as connection:
            found = _revision(connection)
        if found != HEAD:
            with self._engine.begin() as connection:
                self._in_turn(connection)
                _upgrade(connection, self.address)
        if self._file is not None:
            self._inode = self._file.stat().st_ino

    def _look(self) -> None:
        """SQLite would go on writing to a file that was deleted; one put in its place is opened anew."""
        if self._file is None:
            return
        try:
            inode = self._file.stat().st_ino
        except OSError as error:
            raise StoreUnavailable(f"{self.address}: gone: {error.strerror}; put the file back") from None
        if inode != self._inode:
            with self._reopening:
                if inode != self._inode:
                    self._drop_writers()
                    self._engine.dispose()
                    self._prepare()


def shown(url: str) -> str:
    """The address without its password."""
    try:
        address: URL = make_url(url)
    except ArgumentError:
        return url
    return address.render_as_string(hide_password=True)


def _line(error: Exception) -> str:
    return " ".join(str(getattr(error, "orig", None) or error).split())[:200]


def _open(url: str, busy_seconds: float) -> tuple[Engine, Path | None]:
    """The engine, and the file of an SQLite database."""
    try:
        address = make_url(url)
        if address.drivername in ("postgresql", "postgres"):
            address = address.set(drivername="postgresql+psycopg")
        if address.get_backend_name() == "postgresql":
            waits = f"-c lock_timeout={max(1, round(busy_seconds * 1000))}"
            connect = {"connect_timeout": max(2, round(busy_seconds)), "options": waits}
            engine = create_engine(address, connect_args=connect, pool_pre_ping=True, pool_timeout=busy_seconds)
        else:
            engine = create_engine(address)
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
        raise InputError(
            f"LOOPWRIGHT_DATABASE_URL: {shown(url)!r} cannot be used ({error}); write it as sqlite:///FILE, or as "
            'postgresql://USER:PASSWORD@HOST/NAME with "pip install loopwright[postgres]"'
        ) from error
    if address.get_backend_name() != "sqlite":
        return engine, None
    _prepare_sqlite(engine, busy_seconds)
    in_memory = address.database in (None, "", ":memory:")
    return engine, None if in_memory else Path(str(address.database))


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
            "cache_size=-65536",  # KiB; behind a long history, ingestion touches more pages than the default holds
        ):
            connection.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that reads first and then writes cannot wait for another writer; it must start as a writer.
        options = connection.get_execution_options()
        if options.get("loopwright_read"):
            connection.exec_driver_sql("BEGIN")
            return
        level = "NORMAL" if options.get("loopwright_unsynced") else "FULL"
        if connection.info.get("synchronous", "FULL") != level:
            connection.exec_driver_sql(f"PRAGMA synchronous={level}")
            connection.info["synchronous"] = level
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _plain_insert(table: Table, row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """SQLite's statement for a row of a table, and the values as its driver takes them."""
    statement, documents = _statement(table)
    return statement, {**row, **{name: json.dumps(row[name]) for name in documents}}


@cache
def _statement(table: Table) -> tuple[str, list[str]]:
    """How a row of a table is inserted, and which of its columns hold JSON."""
    written = str(table.insert().compile(dialect=sqlite.dialect(paramstyle="named")))
    documents = [column.name for column in table.c if isinstance(column.type, JSON)]
    return written, documents


def _revision(connection: Connection) -> str | None:
    """Of the schema; None when Alembic never saw this database."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    found = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return None if found is None else str(found)


def _upgrade(connection: Connection, address: str) -> None:
    """Run the migrations that are missing, all in the transaction that goes on."""
    found = _revision(connection)
    if found == HEAD:  # another process was quicker
        return
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if found is not None and found not in known:
        raise InputError(
            f"{address}: its schema {found} is newer than this version of Loopwright knows ({HEAD}); "
            "update Loopwright, or name another database"
        )
    if found is None and inspect(connection).has_table("requests"):
        command.stamp(config, FIRST)
    command.upgrade(config, HEAD)
