"""Backups: what was acknowledged before is there after, damage is noticed, and an upgrade has a way back.

LOOPWRIGHT_BACKUP_ITEMS sets how many answers and votes are acknowledged before the backup under load.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec
import pytest
from sqlalchemy import create_engine
from sqlalchemy.engine import make_url
from typer.testing import CliRunner

from components.config.loop_settings import FeedbackConfig
from components.config.params import InputError, load_params
from components.config.paths import Paths
from components.feedback.ingest import ingest
from components.feedback.store import AnswerRecord, Store
from components.runtime.process import file_lock
from components.runtime.stage import digest
from components.tracking.registry import ModelVersion, Registry
from flows.backup import MANIFEST, MLFLOW, backup, restore, upgrade, verify
from flows.orchestration.dvc_repo import version_data
from loopwright.cli import app
from serving.models.replica import Replica
from serving.models.state import Serving
from tests.conftest import command_output
from tests.pages import ROOT

Register = Callable[..., ModelVersion]
CONFIG = FeedbackConfig(max_items=10_000, max_items_per_user=10_000, improve_after=5)
ITEMS = int(os.environ.get("LOOPWRIGHT_BACKUP_ITEMS", "300"))
ANSWER = AnswerRecord("42", "stop", 5, 1, 0.1)
TRACE = """
import json, sys
from pathlib import Path
from components.feedback.lineage import lineage, registry_metadata
from components.feedback.store import Store

home = Path(sys.argv[1])
store = Store.of(home)
print(json.dumps([lineage(store, name, registry_metadata(home)) for name in sys.argv[2:]], sort_keys=True))
"""


@pytest.fixture
def paths(home: Path, registry: Registry, registered: Register, monkeypatch: pytest.MonkeyPatch) -> Paths:
    """A project with a champion, an ingested vote, and DVC's version of it."""
    monkeypatch.setenv("LOOPWRIGHT_HOME", str(home))
    monkeypatch.delenv("LOOPWRIGHT_DATABASE_URL", raising=False)
    paths = Paths(home.parent)
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, paths.root)
    registry.promote(registered(0.5, git_commit="c0ffee"))
    with closing(Store.of(home)) as store:
        exchange(store, "first")
        ingest(store, paths.feedback, CONFIG, lambda rows: {})
    version_data(paths.root, paths.feedback)
    return paths


def exchange(store: Store, name: str) -> str:
    """An answer and a vote on it, acknowledged when this returns."""
    body = {"messages": [{"role": "user", "content": f"What is {name}?"}]}
    store.add_exchange(f"chatcmpl-{name}", "agent/1", body, time.time(), ANSWER, [])
    store.add_feedback(f"chatcmpl-{name}", "down", f"It is {name}.", user="user:a")
    return f"chatcmpl-{name}"


def traces(home: Path, names: list[str]) -> str:
    """Lineages, read by a process of its own: MLflow goes on reading a database that was deleted."""
    return subprocess.run(
        [sys.executable, "-c", TRACE, str(home), *names], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout


def lose(paths: Paths) -> None:
    for folder in (paths.home, paths.root / ".dvc" / "cache", paths.feedback):
        shutil.rmtree(folder)


def test_nothing_acknowledged_before_a_backup_under_load_is_lost(paths: Paths, tmp_path: Path) -> None:
    store, stopped, acknowledged = Store.of(paths.home), threading.Event(), list[str]()

    def write(writer: int) -> None:
        number = 0
        while not stopped.is_set():
            acknowledged.append(exchange(store, f"{writer}-{number}"))
            number += 1

    writers = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for writer in writers:
        writer.start()
    while len(acknowledged) < ITEMS:
        assert all(writer.is_alive() for writer in writers)
        time.sleep(0.01)
    before = list(acknowledged)
    result = backup(paths, str(tmp_path / "backup"))
    assert len(acknowledged) > len(before), "writing went on"
    stopped.set()
    for writer in writers:
        writer.join()
    store.close()
    chosen = [*before[:: len(before) // 20], "chatcmpl-first"]
    traced, versioned = traces(paths.home, chosen), digest(paths.feedback)
    objects = digest(paths.root / ".dvc" / "cache" / "files")

    lose(paths)
    assert restore(paths, str(tmp_path / "backup")) == result == verify(str(tmp_path / "backup"))
    with closing(Store.of(paths.home)) as store:
        assert all(len(store.completion(name)["feedback"]) == 1 for name in before)
        assert store.counts()["requests"] >= len(before) + 1
    assert traces(paths.home, chosen) == traced
    assert json.loads(traced)[0]["version"]["tags"]["git_commit"] == "c0ffee"
    assert (digest(paths.feedback), digest(paths.root / ".dvc" / "cache" / "files")) == (versioned, objects)


def test_damage_is_found_and_replaces_nothing(paths: Paths, tmp_path: Path) -> None:
    address = tmp_path / "backup"
    backup(paths, str(address))
    with pytest.raises(InputError, match="is not empty; name a new folder"):
        backup(paths, str(address))
    before = digest(paths.home / "mlflow" / "artifacts")
    (damaged,) = (address / "home/mlflow/artifacts").rglob("config.json")
    damaged.write_text("{}")
    with pytest.raises(InputError, match=r"1 files are damaged: home/mlflow/artifacts/.*config.json differs"):
        verify(str(address))
    with pytest.raises(InputError, match="is damaged; nothing was restored"):
        restore(paths, str(address), force=True)
    assert digest(paths.home / "mlflow" / "artifacts") == before
    (address / MANIFEST).unlink()
    with pytest.raises(InputError, match=r"no manifest.json, so no complete backup"):
        verify(str(address))


def test_state_is_replaced_by_force_alone_and_while_nothing_runs(paths: Paths, tmp_path: Path) -> None:
    address = str(tmp_path / "backup")
    backup(paths, address)
    with closing(Store.of(paths.home)) as store:
        later = exchange(store, "later")
        with pytest.raises(InputError, match=r'\.db: is there already, with other content; .* --force"'):
            restore(paths, address)
        with file_lock(paths.home, "up"), pytest.raises(InputError, match="up: already running"):
            restore(paths, address, force=True)
        assert store.completion(later)
    restore(paths, address, force=True)
    with closing(Store.of(paths.home)) as store:
        assert store.counts()["requests"] == 1


@pytest.mark.parametrize("moves", [0, 4])
def test_state_of_a_restoration_that_was_killed_is_not_used(
    paths: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    address = str(tmp_path / "backup")
    backup(paths, address)
    with closing(Store.of(paths.home)) as store:
        exchange(store, "later")
    left, move = iter(range(moves)), shutil.move

    def killed(*places: Path) -> None:
        next(left)
        move(*places)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "move", killed)
        with pytest.raises(StopIteration):
            restore(paths, address, force=True)
    remedy = f'the restoration of {address} is not done, .*; run "loopwright restore {address} --force"'
    for words in (("up",), ("serve",), ("run",), ("improve",), ("backup", str(tmp_path / "another"))):
        code, _, errors = command_output(paths.root, dict(os.environ), *words)
        assert (code, errors.count("\n")) == (1, 1)
        assert re.search(remedy, errors)
    with pytest.raises(InputError, match=remedy):
        Serving.open(paths.home, load_params(paths.params).serve, "agent@champion")
    restore(paths, address)  # what is there is no state that a --force would have to give up
    assert command_output(paths.root, dict(os.environ), "feedback", "stats")[0] == 0
    with closing(Store.of(paths.home)) as store:
        assert store.counts()["requests"] == 1


def test_neither_an_upgrade_nor_a_restoration_goes_on_under_an_endpoint(paths: Paths, tmp_path: Path) -> None:
    address = str(tmp_path / "backup")
    backup(paths, address)
    with closing(Store.of(paths.home)) as store:
        replica = Replica(store, list)
        replica.start()
        for change in (lambda: upgrade(paths, print), lambda: restore(paths, address, force=True)):
            with pytest.raises(InputError, match=rf"serve: {replica.id} \(host and process\) still answers; stop it"):
                change()
        replica.close()
    restore(paths, address, force=True)


def test_a_clone_takes_a_backup_whose_dvc_lock_differs_from_that_of_git(paths: Paths, tmp_path: Path) -> None:
    lock = paths.root / "dvc.lock"
    lock.write_text("schema: '2.0'\nstages: {}\n")
    address = str(tmp_path / "backup")
    backup(paths, address)
    committed = lock.read_text()
    lock.write_text("schema: '2.0'\n")
    git = ["git", "-C", str(paths.root), "-c", "user.name=t", "-c", "user.email=t@example.com"]
    for words in (["init", "--quiet"], ["add", "dvc.lock"], ["commit", "--quiet", "--message", "Clone"]):
        subprocess.run([*git, *words], check=True)
    lose(paths)
    restore(paths, address)
    assert lock.read_text() == committed
    lock.write_text("schema: '2.0' # edited\n")
    with pytest.raises(InputError, match=r"dvc\.lock: is there already"):
        restore(paths, address)


def test_an_object_store_holds_a_backup_too(paths: Paths) -> None:
    backup(paths, "memory://bucket/backup")
    assert fsspec.filesystem("memory").exists(f"/bucket/backup/{MLFLOW}")
    lose(paths)
    restore(paths, "memory://bucket/backup")
    assert verify("memory://bucket/backup").files > 5


@pytest.mark.servers
def test_a_postgresql_database_comes_back(
    paths: Paths, tmp_path: Path, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, name = make_url(postgres).set(drivername="postgresql+psycopg"), f"backup_{uuid.uuid4().hex[:12]}"
    owner = create_engine(url, isolation_level="AUTOCOMMIT")
    with owner.connect() as connection:
        connection.exec_driver_sql(f'CREATE DATABASE "{name}"')
        monkeypatch.setenv("LOOPWRIGHT_DATABASE_URL", url.set(database=name).render_as_string(hide_password=False))
        try:
            with closing(Store.of(paths.home)) as store:
                kept = exchange(store, "kept")
            backup(paths, str(tmp_path / "backup"))
            with closing(Store.of(paths.home)) as store:
                exchange(store, "later")
            with pytest.raises(InputError, match="is there already, with other content"):
                restore(paths, str(tmp_path / "backup"))
            restore(paths, str(tmp_path / "backup"), force=True)
            with closing(Store.of(paths.home)) as store:
                assert (store.counts()["requests"], len(store.completion(kept)["feedback"])) == (1, 1)
                exchange(store, "after")
        finally:
            connection.exec_driver_sql(f'DROP DATABASE "{name}" WITH (FORCE)')
    owner.dispose()


def test_a_missing_library_is_named(paths: Paths) -> None:
    if find_spec("gcsfs") is not None:
        pytest.skip("gcsfs is installed")
    with pytest.raises(InputError, match=r"gs://bucket/backup: .*install gcsfs"):
        backup(paths, "gs://bucket/backup")


def test_an_upgrade_that_fails_returns_to_the_databases_before(paths: Paths) -> None:
    file = paths.home / "feedback.db"
    with closing(sqlite3.connect(file)) as tables, tables:
        # As an earlier version left it, but for a column that its migration does not expect.
        tables.execute("UPDATE alembic_version SET version_num = '0003'")
        before = list(tables.iterdump())
    with pytest.raises(InputError, match=r"already exists; .*the databases are as before"):
        upgrade(paths, print)
    with closing(sqlite3.connect(file)) as tables:
        assert list(tables.iterdump()) == before


def test_an_upgrade_migrates_and_leaves_a_way_back(paths: Paths) -> None:
    folder = upgrade(paths, print)
    assert verify(folder).files == 2


def test_the_commands_say_what_they_did(paths: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(paths.root)
    address = str(tmp_path / "backup")

    def run(*words: str) -> Any:
        done = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    written = run("backup", address)
    assert written["files"] > 5
    assert run("verify", address) == written
    lose(paths)
    assert run("restore", address) == written
    pruned = run("prune", "--dry-run")
    assert pruned["dry_run"]
    assert [each["kind"] for each in pruned["removed"]] == [
        "versions",
        "runs",
        "traces",
        "Bentos",
        "data",
        "logs",
        "backups",
    ]
    assert sum(each["count"] for each in pruned["removed"]) == 0
