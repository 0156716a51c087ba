"""MLflow's own database in the state folder: its address, its move along with the folder, its migration."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlparse

from components.config.params import InputError
from components.tracking.mlflow_requests import SETTINGS

EXPERIMENT = "loopwright"
DATABASE = "mlflow.db"
"""In the folder `mlflow` of the state folder."""
LOCK_SECONDS = 120.0
"""Longest wait for a process that makes or changes the tables."""
_ARTIFACT_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("trace_tags", "value"),
)
"""Columns of MLflow's tables with absolute addresses of artifacts."""


def database_uri(home: Path) -> str:
    """MLflow's address of the state folder's database."""
    return f"sqlite:///{home / 'mlflow' / DATABASE}"


def artifact_location(home: Path) -> str:
    """The address of the artifacts in the state folder's database; empty where MLflow has not made its tables yet."""
    database = home / "mlflow" / DATABASE
    if not database.is_file():
        return ""
    with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", timeout=LOCK_SECONDS, uri=True)) as tables:
        try:
            row = tables.execute("SELECT artifact_location FROM experiments WHERE name = ?", [EXPERIMENT]).fetchone()
        except sqlite3.OperationalError:
            return ""
    return row[0] if row else ""


def relocate(home: Path) -> None:
    """Correct the artifact addresses in the state folder's database after the folder was moved, copied or restored.

    MLflow stores them absolute, reads and writes where they point, and has no call that changes those of a run.
    """
    database, artifacts = home / "mlflow" / DATABASE, home / "mlflow" / "artifacts"
    stored, current = artifact_location(home), artifacts.as_uri()
    before = Path(unquote(urlparse(stored).path))
    if not stored or stored == current or (before.exists() and artifacts.exists() and before.samefile(artifacts)):
        return
    with closing(sqlite3.connect(database, timeout=LOCK_SECONDS)) as tables, tables:
        # Of a copied state folder, earlier versions wrote artifacts into the original.
        for (run_id,) in tables.execute("SELECT run_uuid FROM runs").fetchall():
            if (before / run_id).is_dir() and not (artifacts / run_id).exists():
                shutil.copytree(before / run_id, artifacts / run_id)
        for table, column in _ARTIFACT_COLUMNS:
            tables.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column} || '/', 1, ?) = ?",
                [current, len(stored) + 1, len(stored) + 1, f"{stored}/"],
            )
        # MLflow's own default experiment lies where the first command was run.
        default = "experiment_id = 0 AND artifact_location LIKE '%/mlruns/0'"
        tables.execute(f"UPDATE experiments SET artifact_location = ? WHERE {default}", [f"{current}/0"])
        moved = [str(home), str(before.parents[1])]
        tables.execute("UPDATE tags SET value = ? WHERE key = 'home' AND value = ?", moved)


def upgrade_database(home: Path) -> None:
    """Migrate the state folder's database to the schema of the installed MLflow, if there is one.

    Raises: InputError with MLflow's reason.
    """
    database = home / "mlflow" / DATABASE
    if not database.is_file():
        return
    # MLflow has no call for it beside its command.
    command = [sys.executable, "-m", "mlflow", "db", "upgrade", database_uri(home)]
    done = subprocess.run(command, env={**os.environ, **SETTINGS}, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise InputError(f"{database}: MLflow cannot migrate it: {reason[:300]}")
