"""A project or state folder that was moved, copied or restored goes on where it is, and leaves its original alone."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from dvc.config import Config

from components.config.params import InputError
from components.runtime.stage import digest
from components.tracking.mlflow_client import connect, create_run, end_killed_runs
from components.tracking.registry import ModelVersion, Registry
from flows.orchestration.dvc_repo import configure

SOURCE = Path(__file__).parents[1]
Register = Callable[..., ModelVersion]


@pytest.fixture
def copy(registry: Registry, registered: Register, tmp_path: Path) -> Registry:
    """A copy of a state folder that holds `agent/1`, under a name that has to be quoted in an address."""
    registry.promote(registered(0.5))
    return Registry(Path(shutil.copytree(registry.home, tmp_path / "copy ü #1 100%")))


def add(registry: Registry) -> ModelVersion:
    """Register the next version from a model folder."""
    return registry.register(registry.home / "agent", "agent", {"score": 0.7}, {}, None)


IN_THE_COPY = """
import sys
from pathlib import Path
from components.tracking.registry import Registry

registry = Registry(Path(sys.argv[1]))
for version in (
    registry.resolve("agent@champion"), registry.register(registry.home / "agent", "agent", {"score": 0.7}, {}, None)
):
    assert version.folder.is_relative_to(registry.home), version.folder
    registry.client.log_text(version.run_id, "why", "gate.md")
    assert sorted(file.path for file in registry.client.list_artifacts(version.run_id)) == ["agent", "gate.md"]
"""


def in_a_process(registry: Registry) -> None:
    """MLflow keeps in memory, by the run's id, where artifacts lie: within one process both folders would be one."""
    command = [sys.executable, "-c", IN_THE_COPY, str(registry.home)]
    ended = subprocess.run(command, cwd=SOURCE, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_a_copy_neither_reads_nor_writes_its_original(registry: Registry, copy: Registry) -> None:
    before = digest(registry.home)
    in_a_process(copy)
    assert digest(registry.home) == before
    assert registry.resolve("agent@champion").folder.is_relative_to(registry.home)


def test_a_moved_folder_goes_on(registry: Registry, copy: Registry) -> None:
    shutil.rmtree(registry.home)
    in_a_process(copy)
    with closing(sqlite3.connect(copy.home / "mlflow/mlflow.db")) as tables:
        assert not [line for line in tables.iterdump() if str(registry.home) in line]
    assert not registry.home.exists()


def test_what_a_copy_once_wrote_into_its_original_is_fetched(copy: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """As versions of this project did that trusted the stored addresses."""
    with monkeypatch.context() as before:
        before.setattr("components.tracking.mlflow_client.relocate", lambda home: None)
        version = add(copy)
        assert not version.folder.is_relative_to(copy.home)
    again = Registry(copy.home).resolve(str(version))
    assert again.folder.is_relative_to(copy.home)
    assert digest(again.folder) == digest(version.folder)


def test_another_path_to_the_same_folder_changes_nothing(
    registry: Registry, registered: Register, tmp_path: Path
) -> None:
    registered(0.5)
    (tmp_path / "link").symlink_to(registry.home)
    before = digest(registry.home / "mlflow/mlflow.db")
    connect(tmp_path / "link")
    assert digest(registry.home / "mlflow/mlflow.db") == before


def test_missing_files_of_a_version_are_one_line(copy: Registry) -> None:
    version = copy.resolve("agent@champion")
    shutil.rmtree(copy.home / "mlflow/artifacts")
    with pytest.raises(InputError, match=r"agent/1: .*: its files are missing; restore the state folder as a whole"):
        _ = version.folder


def test_a_run_that_was_going_on_when_the_folder_was_copied_is_ended_in_the_copy(home: Path, tmp_path: Path) -> None:
    run_id = create_run(connect(home), "pipeline", {"home": str(home)}, None, 0)
    copied = shutil.copytree(home, tmp_path / "a 'quoted\" copy")
    end_killed_runs(connect(copied), "pipeline", copied)
    states = [connect(folder).get_run(run_id).info.status for folder in (home, copied)]
    assert states == ["RUNNING", "KILLED"]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("LOOPWRIGHT_HOME", raising=False)
    monkeypatch.delenv("DVC_SITE_CACHE_DIR", raising=False)
    root = tmp_path / "projekt ü 項目 #1"
    (root / ".dvc").mkdir(parents=True)
    return root


def remote(root: Path) -> str:
    """Where DVC itself reads that the project's remote is."""
    return str(Config(str(root / ".dvc"))["remote"]["local"]["url"])


def test_dvc_in_a_copy_knows_nothing_of_the_original(project: Path, tmp_path: Path) -> None:
    (project / ".dvc/config.local").write_text(f"[core]\n    site_cache_dir = {project}/var/dvc\n", encoding="utf-8")
    configure(project)
    assert str(project) not in (project / ".dvc/config.local").read_text(encoding="utf-8")
    copied = shutil.copytree(project, tmp_path / "copy")
    assert remote(copied) == str(copied / "var/dvc-remote")


def test_dvc_finds_a_state_folder_outside_of_the_project(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("höme, #1", "zweites"):
        monkeypatch.setenv("LOOPWRIGHT_HOME", str(tmp_path / name))
        configure(project)
        assert remote(project) == str(tmp_path / name / "dvc-remote")


@pytest.mark.parametrize(("ready", "made_anew"), [("{here}\n", False), ("/elsewhere\n", True), ("", True)])
def test_make_rebuilds_an_environment_that_was_moved(tmp_path: Path, ready: str, made_anew: bool) -> None:
    here = tmp_path / "a 'b' $c"
    (here / ".venv/bin").mkdir(parents=True)
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(SOURCE / name, here)
    (here / ".venv/bin/loopwright").write_text("#!/elsewhere/.venv/bin/python\n")
    (here / ".venv/ready").write_text(ready.format(here=here))
    planned = subprocess.run(
        ["make", "-n", "setup"],
        cwd=here,
        env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")},  # `make test` sets them
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert planned.startswith("rm -rf .venv\n") == made_anew
