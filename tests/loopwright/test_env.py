"""`loopwright env`: what a shell has after `eval "$(loopwright env)"`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from components.runtime.process import file_lock
from components.runtime.service_registry import AUTH_FILE, LOCK, publish
from components.tracking.mlflow_client import connect
from components.tracking.mlflow_database import EXPERIMENT, database_uri
from loopwright.env import EXPORTED, forget_exports

ROOT = Path(__file__).parents[2]
PASSWORD = "admin:open-sesame"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project in a folder whose name a shell would split."""
    project = tmp_path / "my project"
    (project / "var").mkdir(parents=True)
    for name in ("dvc.yaml", "params.yaml"):
        (project / name).write_bytes((ROOT / name).read_bytes())
    return project


def shell(root: Path, script: str, **environment: str) -> str:
    """Output of a shell in the project, with `loopwright` on the PATH."""
    foreign = ("LOOPWRIGHT_", "PREFECT_", "MLFLOW_", "BENTOML_", "DVC_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    alias = f'loopwright() {{ "{sys.executable}" -m loopwright "$@"; }}\n'
    variables = {**inherited, "PYTHONPATH": str(ROOT), **environment}
    ended = subprocess.run(["/bin/sh", "-ec", alias + script], cwd=root, env=variables, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_a_shell_sees_the_stores_and_reads_the_password_itself(root: Path) -> None:
    home = root / "var"
    (home / AUTH_FILE).write_text(f"{PASSWORD}\n")
    with file_lock(home, LOCK):
        publish(home, {"prefect": "http://127.0.0.1:4999/api"})
        assert "open-sesame" not in shell(root, "loopwright env; loopwright env --json")
        names = f"$MLFLOW_TRACKING_URI|$BENTOML_HOME|$PREFECT_API_URL|$PREFECT_API_AUTH_STRING|${EXPORTED}"
        seen = shell(root, f'eval "$(loopwright env)"; echo "{names}"')
    assert seen.strip().split("|") == [
        database_uri(home),
        str(home / "bento"),
        "http://127.0.0.1:4999/api",
        PASSWORD,
        "MLFLOW_TRACKING_URI,PREFECT_API_URL",
    ]


def test_what_the_environment_names_stays(root: Path) -> None:
    server = "https://mlflow.example.org"
    exported = json.loads(shell(root, "loopwright env --json", MLFLOW_TRACKING_URI=server))["variables"]
    assert "MLFLOW_TRACKING_URI" not in exported
    assert EXPORTED not in exported, "there is nothing that our own commands must forget"


def test_our_own_commands_forget_the_exported_addresses_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.org")
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:4999/api")
    monkeypatch.setenv(EXPORTED, "PREFECT_API_URL")
    forget_exports()
    assert os.environ["MLFLOW_TRACKING_URI"] == "https://mlflow.example.org"
    assert "PREFECT_API_URL" not in os.environ


def test_the_exported_address_of_a_new_database_keeps_artifacts_in_the_state_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's own default for an SQLite address is `./mlruns`."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database_uri(tmp_path))
    (tmp_path / "mlflow").mkdir()
    experiment = connect(tmp_path).get_experiment_by_name(EXPERIMENT)
    assert experiment.artifact_location == (tmp_path / "mlflow" / "artifacts").as_uri()
