"""A database of any earlier version becomes today's, and one that is locked or gone says so and keeps nothing."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine

from components.config.params import InputError
from components.feedback import database
from components.feedback.store import AnswerRecord, Store, StoreUnavailable, UnknownCompletion
from components.feedback.tables import METADATA

MIGRATIONS = Path(database.__file__).with_name("migrations")
BEFORE_ALEMBIC = """
CREATE TABLE requests (id VARCHAR(64) NOT NULL, created FLOAT NOT NULL, model VARCHAR(256) NOT NULL, body JSON NOT NULL,
  PRIMARY KEY (id));
CREATE INDEX ix_requests_created ON requests (created);
CREATE TABLE answers (request_id VARCHAR(64) NOT NULL, created FLOAT NOT NULL, content TEXT NOT NULL,
  steps JSON NOT NULL, tool_calls JSON NOT NULL, finish_reason VARCHAR(32) NOT NULL, prompt_tokens INTEGER NOT NULL,
  completion_tokens INTEGER NOT NULL, seconds FLOAT NOT NULL, PRIMARY KEY (request_id),
  FOREIGN KEY(request_id) REFERENCES requests (id));
CREATE TABLE feedback (sequence INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, id VARCHAR(64) NOT NULL,
  completion_id VARCHAR(64) NOT NULL, created FLOAT NOT NULL, rating VARCHAR(8) NOT NULL, correction TEXT, comment TEXT,
  idempotency_key VARCHAR(256), replaced_by VARCHAR(64), UNIQUE (id),
  FOREIGN KEY(completion_id) REFERENCES requests (id), UNIQUE (idempotency_key));
CREATE INDEX ix_feedback_completion_id ON feedback (completion_id);
INSERT INTO requests VALUES ('c1', 1.0, 'agent/1', '{"messages": []}');
INSERT INTO answers VALUES ('c1', 2.0, 'yes', '[]', '[]', 'stop', 1, 1, 0.5);
INSERT INTO feedback VALUES (7, 'fb-1', 'c1', 3.0, 'up', NULL, NULL, 'k', NULL);
"""


REVISION_4 = """
INSERT INTO requests VALUES ('c1', 1.0, 'agent/1', '{"messages": []}');
INSERT INTO answers VALUES ('c1', 2.0, 'yes', '[]', '[]', 'stop', 1, 1, 0.5);
INSERT INTO feedback VALUES (7, 'fb-1', 'c1', 3.0, 'up', NULL, NULL, 'k', NULL, 'local');
INSERT INTO partitions VALUES ('items-7-7', 7, 7, 4.0, 1, 0, 'd', NULL);
INSERT INTO outcomes VALUES ('fb-1', 7, 'items-7-7', 'accepted', NULL, 'local', 3.0, 'c');
INSERT INTO revocations VALUES ('fb-1', 5.0, NULL);
INSERT INTO api_keys VALUES ('key-1', 'web', 'd1', 'predict', NULL, 6.0, NULL);
INSERT INTO api_keys VALUES ('key-2', 'votes', 'd2', 'feedback', NULL, 7.0, NULL);
"""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store.of(tmp_path, busy_seconds=0.2)
    store.add_request("c1", "agent/1", {"messages": []})
    yield store
    store.close()


def write_old(home: Path) -> None:
    home.mkdir(exist_ok=True)
    with closing(sqlite3.connect(home / "feedback.db")) as connection:
        connection.executescript(BEFORE_ALEMBIC)


def test_a_database_made_before_alembic_is_upgraded_with_its_rows(tmp_path: Path) -> None:
    write_old(tmp_path)
    store = Store.of(tmp_path)
    found = store.completion("c1")
    assert found["answer"]["content"] == "yes"
    assert [(vote["id"], vote["sequence"], vote["voice"]) for vote in found["feedback"]] == [("fb-1", 7, "")]
    assert store.add_feedback("c1", "down", idempotency_key="k") == "fb-1"
    assert store.fresh() == 1
    store.add_feedback("c1", "down", user="user:a")
    assert store.behind_watermark(9)[-1]["sequence"] == 8
    store.close()


def test_a_database_of_revision_4_gets_owners_and_keeps_what_refers_to_its_votes(tmp_path: Path) -> None:
    database_file = tmp_path / "feedback.db"
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    engine = create_engine(f"sqlite:///{database_file}")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0004")
    engine.dispose()
    with closing(sqlite3.connect(database_file)) as connection:
        connection.executescript(REVISION_4)
    store = Store.of(tmp_path)
    assert store.withdrawn() == {"fb-1": "revoked"}
    assert store.completion("c1")["owner"] == ""
    with pytest.raises(UnknownCompletion):
        store.completion("c1", viewer="web")
    assert store.add_feedback("c1", "down", idempotency_key="k") == "fb-1"
    assert store.add_feedback("c1", "down", idempotency_key="k", owner="web") != "fb-1"
    assert store.behind_watermark(9)[-1]["sequence"] == 8
    listed = store.keys()
    assert [(key["name"], key["owner"], key["scopes"]) for key in listed] == [
        ("web", "web", ["predict", "tools"]),
        ("votes", "votes", ["feedback"]),
    ]
    with closing(sqlite3.connect(database_file)) as connection:
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        connection.execute("PRAGMA foreign_keys=ON")
        with pytest.raises(sqlite3.IntegrityError):
            connection.execute("DELETE FROM feedback WHERE id = 'fb-1'")
    store.close()


@pytest.mark.parametrize("old", [False, True], ids=["new", "made before Alembic"])
def test_the_migrations_lead_to_the_tables_of_the_code(tmp_path: Path, old: bool) -> None:
    if old:
        write_old(tmp_path)
    store = Store.of(tmp_path)
    with store._engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), METADATA)
    store.close()
    # SQLite's constraints of uniqueness have no names to compare by.
    assert [change for change in differences if "constraint" not in change[0]] == []
    assert ScriptDirectory(str(MIGRATIONS)).get_current_head() == database.HEAD


def test_processes_that_open_an_old_database_at_once_upgrade_it_once(tmp_path: Path) -> None:
    write_old(tmp_path)
    code = "import sys, pathlib; from components.feedback.store import Store; Store.of(pathlib.Path(sys.argv[1]))"
    opened = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(3)]
    assert [process.wait() for process in opened] == [0] * 3
    with closing(sqlite3.connect(tmp_path / "feedback.db")) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [(database.HEAD,)]


def test_an_open_at_todays_schema_imports_no_alembic(store: Store, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from components.feedback.store import Store; "
        "Store.of(Path(sys.argv[1])).add_feedback('c1', 'up'); sys.exit('alembic' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0


def test_a_database_of_a_later_version_is_refused(tmp_path: Path) -> None:
    Store.of(tmp_path).close()
    with closing(sqlite3.connect(tmp_path / "feedback.db")) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(InputError, match=r"its schema 9999 is newer than .* knows \(0007\); update Loopwright"):
        Store.of(tmp_path)


def test_a_locked_database_says_so_and_keeps_nothing(store: Store, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "feedback.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable, match="cannot be written: database is locked; send it again"):
            store.add_feedback("c1", "up", correction="Better.")
        with pytest.raises(StoreUnavailable):
            store.add_answer("c1", AnswerRecord("yes", "stop", 1, 1, 0.1))
        assert store.counts() == {"requests": 1, "answers": 0, "feedback": 0}
        other.execute("ROLLBACK")
    store.add_feedback("c1", "up")
    assert store.counts()["feedback"] == 1


def test_a_database_that_was_taken_away_takes_no_votes(store: Store, tmp_path: Path) -> None:
    store.add_feedback("c1", "up")
    store._engine.dispose()  # closes the write-ahead log into the file
    (tmp_path / "feedback.db").rename(tmp_path / "aside.db")
    with pytest.raises(StoreUnavailable, match="missing: No such file or directory; restore the file"):
        store.add_feedback("c1", "down")
    with pytest.raises(StoreUnavailable):
        store.completion("c1")
    assert not (tmp_path / "feedback.db").exists()
    (tmp_path / "copy.db").write_bytes((tmp_path / "aside.db").read_bytes())
    (tmp_path / "copy.db").rename(tmp_path / "feedback.db")
    store.add_feedback("c1", "down")
    assert [vote["rating"] for vote in store.completion("c1")["feedback"]] == ["up", "down"]


def test_a_file_that_is_no_database_says_so(tmp_path: Path) -> None:
    (tmp_path / "feedback.db").write_bytes(b"not a database" * 100)
    with pytest.raises(StoreUnavailable, match="cannot be opened: file is not a database; check"):
        Store.of(tmp_path)


def test_text_with_a_nul_character_is_refused(store: Store) -> None:
    with pytest.raises(InputError, match="correction: contains a NUL character; send text without it"):
        store.add_feedback("c1", "down", "a\0b")
    store.add_answer("c1", AnswerRecord("a\0b", "stop", 1, 1, 0.1))
    assert store.completion("c1")["answer"]["content"] == "a\N{REPLACEMENT CHARACTER}b"


def test_a_revocation_tells_whether_it_is_new(store: Store) -> None:
    vote = store.add_feedback("c1", "up")
    assert [store.revoke(vote, "poison"), store.revoke(vote)] == [True, False]
    assert [found["status"] for found in store.votes(1)] == ["revoked"]
