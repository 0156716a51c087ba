"""The feedback database: SQLite in the state folder, or PostgreSQL by address, migrated to the newest schema.

A write is on disk when it returns. Any number of threads and processes may use one database. Alembic is imported only
to migrate, so that a server starts quickly.
"""

from __future__ import annotations

import json
import os
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from sqlalchemy import (
    JSON,
    Connection,
    Engine,
    Select,
    Table,
    create_engine,
    event,
    inspect,
    text,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DatabaseError,
    DataError,
    DBAPIError,
    IntegrityError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
    ProgrammingError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout

from components.config.errors import Unavailable
from components.config.params import InputError
from components.config.paths import disk_trouble
from components.feedback.postgres import OpenSockets, connection_options

BUSY_SECONDS = 30.0
"""Default time that a write waits for another process's write."""
OUTAGE_SECONDS = 15.0
"""Time that an operation waits, from its beginning, for a PostgreSQL server that restarts or fails over."""
_STARTING_OR_STOPPING = ("57P01", "57P02", "57P03")
"""PostgreSQL's SQLSTATE: admin_shutdown, crash_shutdown, cannot_connect_now."""
HEAD = "0007"
"""The newest revision in migrations/."""
FIRST = "0001"
"""The revision of a database created before Alembic was used."""
_MIGRATIONS = Path(__file__).with_name("migrations")
_LOCK = 0x6C6F6F70
"""PostgreSQL's advisory lock: votes are numbered in commit order, migrations run one at a time."""


D = TypeVar("D", bound="Database")
P = ParamSpec("P")
R = TypeVar("R")


class StoreUnavailable(Unavailable):
    """The database is locked or missing; the operation had no effect."""


def through_restarts(operation: Callable[Concatenate[D, P], R]) -> Callable[Concatenate[D, P], R]:
    """Repeat a store's operation, which has to be idempotent, while PostgreSQL restarts.

    An outage that has lasted for `OUTAGE_SECONDS` fails at once, for it would hold every thread that asks.
    """

    @wraps(operation)
    def repeated(store: D, /, *arguments: P.args, **named: P.kwargs) -> R:
        while True:
            try:
                return operation(store, *arguments, **named)
            except StoreUnavailable as error:
                if not store.may_return(error.__cause__):
                    raise
            time.sleep(random.uniform(0.05, 0.25))  # not all threads and replicas at once

    return repeated


def database_url(home: Path) -> str:
    """Address of the database: `LOOPWRIGHT_DATABASE_URL`, else SQLite in the state folder."""
    return os.environ.get("LOOPWRIGHT_DATABASE_URL") or f"sqlite:///{home / 'feedback.db'}"


def has_store(home: Path) -> bool:
    """Whether a store exists; does not create one."""
    return (home / "feedback.db").exists() or bool(os.environ.get("LOOPWRIGHT_DATABASE_URL"))


class Database:
    """One database; every connection is in a transaction."""

    def __init__(self, url: str, busy_seconds: float = BUSY_SECONDS) -> None:
        """Open the database and migrate it to the newest schema.

        Raises: InputError when the address is unusable, StoreUnavailable when the database cannot be opened.
        """
        self.address = shown(url)
        self._engine, self._file = open_engine(url, busy_seconds)
        self._reopening = threading.Lock()
        self._inode: int | None = None
        self._writers: list[sqlite3.Connection] = []
        """Idle SQLite connections of `_insert`."""
        self._lost: float | None = None
        """By `time.monotonic()`: when the present outage began."""
        self._sockets = OpenSockets(self._engine) if self.is_shared else None
        self._given_up = False
        """Whether the server hangs (`Replicas.give_up`)."""
        with self._translated_errors("cannot be opened", "check LOOPWRIGHT_DATABASE_URL"):
            self._prepare()

    def close(self) -> None:
        self._drop_writers()
        self._engine.dispose()

    @property
    def is_shared(self) -> bool:
        """Whether other hosts may use it too."""
        return self._engine.dialect.name == "postgresql"

    def may_return(self, error: BaseException | None) -> bool:
        """Whether an error is that of a server that restarts, and began less than `OUTAGE_SECONDS` ago."""
        if not self.is_shared or not isinstance(error, DBAPIError):
            return False
        state = getattr(error.orig, "sqlstate", None)  # none where there was no connection
        is_refused = isinstance(error, OperationalError) and state in (None, *_STARTING_OR_STOPPING)
        if not error.connection_invalidated and not is_refused:
            return False
        if self._lost is None:
            self._lost = time.monotonic()
        return time.monotonic() - self._lost < OUTAGE_SECONDS

    @contextmanager
    def _write(self, synced: bool = True, probe: bool = False) -> Iterator[Connection]:
        """A transaction that is on disk when the block ends, or is rolled back.

        Without `synced`, SQLite syncs it with the next synced transaction: the end of this process loses nothing, a
        power failure may lose it. (PostgreSQL groups commits by itself.) A `probe` also asks one that was given up.
        """
        with self._translated_errors("cannot be written", "send it again; nothing was stored"):
            self._check(probe)
            options = {} if synced else {"loopwright_unsynced": True}
            with self._engine.connect().execution_options(**options) as connection, connection.begin():
                self._lost = None
                yield connection
            self._given_up = self._given_up and not probe

    def _insert(self, *rows: tuple[Table, dict[str, Any]]) -> None:
        """Write rows in a transaction that is on disk when this returns.

        Every answer waits for it: for SQLite it bypasses SQLAlchemy, whose statements take longer than SQLite.
        """
        if self._file is None:
            with self._write() as connection:
                for table, row in rows:
                    # A commit whose answer was lost is repeated (`through_restarts`).
                    connection.execute(insertion(connection, table).on_conflict_do_nothing(), row)
            return
        with self._translated_errors("cannot be written", "send it again; nothing was stored"):
            self._check()
            writers = self._writers
            try:
                writer = writers.pop()
            except IndexError:
                writer = self._writer()
            try:
                writer.execute("BEGIN IMMEDIATE")
                for table, row in rows:
                    statement, documents = _statement(table)
                    writer.execute(statement, {**row, **{name: json.dumps(row[name]) for name in documents}})
                writer.execute("COMMIT")
            except BaseException:
                writer.close()  # rolls back
                raise
            if writers is self._writers:
                writers.append(writer)
            else:  # of a file that has been replaced
                writer.close()

    def _writer(self) -> sqlite3.Connection:
        """A connection outside the pool, whose checkout takes as long as the inserts."""
        pooled = self._engine.raw_connection()
        writer = cast(sqlite3.Connection, pooled.dbapi_connection)
        pooled.detach()
        writer.execute("PRAGMA synchronous=FULL")
        return writer

    def _drop_writers(self) -> None:
        idle, self._writers = self._writers, []
        with suppress(IndexError):  # an insert may pop one concurrently: each has one owner
            while True:
                idle.pop().close()

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        with self._translated_errors("cannot be read", "try again"):
            self._check()
            with self._engine.connect().execution_options(loopwright_read=True) as connection:
                self._lost = None
                yield connection

    def _rows(self, statement: Select[Any]) -> list[dict[str, Any]]:
        with self._read() as connection:
            return [dict(row) for row in connection.execute(statement).mappings()]

    def _scalar(self, statement: Select[Any]) -> Any:
        """The first value of the first row; None without rows."""
        with self._read() as connection:
            return connection.scalar(statement)

    def _in_turn(self, connection: Connection) -> None:
        """Serialize this transaction, from here to its end, with others that call this."""
        if self._engine.dialect.name == "postgresql":  # SQLite has one writer anyway
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")

    @contextmanager
    def _translated_errors(self, what: str, remedy: str) -> Iterator[None]:
        try:
            yield
        except (IntegrityError, DataError, ProgrammingError, sqlite3.IntegrityError, sqlite3.ProgrammingError):
            raise  # an error of the statement, not of the database
        except (DatabaseError, InterfaceError, PoolTimeout, sqlite3.Error) as error:
            if helps := disk_trouble(error).rpartition("; ")[2]:
                remedy = f"{helps}, then {remedy}" if what == "cannot be written" else helps
            reason = " ".join(str(getattr(error, "orig", None) or error).split())[:200]
            raise StoreUnavailable(f"{self.address}: {what}: {reason}; {remedy}") from error

    def _prepare(self) -> None:
        with self._engine.connect().execution_options(loopwright_read=True) as connection:
            revision = _revision(connection)
        if revision != HEAD:
            with self._engine.connect() as connection, _without_foreign_keys(connection), connection.begin():
                self._in_turn(connection)
                _upgrade(connection, self.address)
        if self._file is not None:
            self._inode = self._file.stat().st_ino

    def _check(self, probe: bool = False) -> None:
        """Ask no server that was given up; reopen a replaced SQLite file: SQLite goes on writing to a deleted one."""
        if self._given_up and not probe:
            raise StoreUnavailable(f"{self.address}: the server does not answer; try again when it does")
        if self._file is None:
            return
        try:
            inode = self._file.stat().st_ino
        except OSError as error:
            raise StoreUnavailable(f"{self.address}: missing: {error.strerror}; restore the file") from None
        if inode != self._inode:
            with self._reopening:
                if inode != self._inode:
                    self._drop_writers()
                    self._engine.dispose()
                    self._prepare()


def insertion(connection: Connection, table: Table) -> postgresql.Insert | sqlite.Insert:
    """An insert of this database's dialect, which has `on_conflict_do_nothing` and `on_conflict_do_update`."""
    return postgresql.insert(table) if connection.dialect.name == "postgresql" else sqlite.insert(table)


def shown(url: str) -> str:
    """The address without its password."""
    try:
        address: URL = make_url(url)
    except ArgumentError:
        return url
    return address.render_as_string(hide_password=True)


def open_engine(url: str, busy_seconds: float) -> tuple[Engine, Path | None]:
    """The engine, and the file of an SQLite database.

    Raises: InputError when the address is unusable.
    """
    try:
        address = make_url(url)
        if address.drivername in ("postgresql", "postgres"):
            address = address.set(drivername="postgresql+psycopg")
        if address.get_backend_name() == "postgresql":
            options = connection_options(address, busy_seconds)
            engine = create_engine(address, connect_args=options, pool_pre_ping=True, pool_timeout=busy_seconds)
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
    """Durable commits, concurrent readers and one writer, and writers that wait instead of failing."""

    @event.listens_for(engine, "connect")
    def connect(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # the listener below begins transactions, not the driver
        for pragma in (
            f"busy_timeout={round(busy_seconds * 1000)}",
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
            "cache_size=-65536",  # KiB; ingestion from a large database touches more pages than the default caches
        ):
            connection.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that reads before it writes cannot wait for another writer; it has to begin as a writer.
        options = connection.get_execution_options()
        if options.get("loopwright_read"):
            connection.exec_driver_sql("BEGIN")
            return
        level = "NORMAL" if options.get("loopwright_unsynced") else "FULL"
        if connection.info.get("synchronous", "FULL") != level:
            connection.exec_driver_sql(f"PRAGMA synchronous={level}")
            connection.info["synchronous"] = level
        connection.exec_driver_sql("BEGIN IMMEDIATE")


@cache
def _statement(table: Table) -> tuple[str, list[str]]:
    """The insert statement of a table, and its JSON columns."""
    statement = str(table.insert().compile(dialect=sqlite.dialect(paramstyle="named")))
    documents = [column.name for column in table.c if isinstance(column.type, JSON)]
    return statement, documents


def _revision(connection: Connection) -> str | None:
    """The schema's revision; None for a database without Alembic."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    revision = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return None if revision is None else str(revision)


@contextmanager
def _without_foreign_keys(connection: Connection) -> Iterator[None]:
    """Let SQLite replace a table that others refer to (https://sqlite.org/lang_altertable.html, section 7)."""
    if connection.dialect.name != "sqlite":
        yield
        return
    driver = cast(sqlite3.Connection, connection.connection.driver_connection)
    driver.execute("PRAGMA foreign_keys=OFF")  # has no effect within a transaction
    try:
        yield
    finally:
        driver.execute("PRAGMA foreign_keys=ON")


def _upgrade(connection: Connection, address: str) -> None:
    """Run the missing migrations in the current transaction."""
    revision = _revision(connection)
    if revision == HEAD:  # another process has migrated it
        return
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if revision is not None and revision not in known:
        raise InputError(
            f"{address}: its schema {revision} is newer than this version of Loopwright knows ({HEAD}); "
            "update Loopwright, or name another database"
        )
    if revision is None and inspect(connection).has_table("requests"):
        command.stamp(config, FIRST)
    command.upgrade(config, HEAD)
