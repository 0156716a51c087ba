"""The command line as a whole: light, its exit codes, one JSON document."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loopwright.cli import COMMANDS, app
from loopwright.output import print_table

SOURCE = Path(__file__).parents[2]
HEAVY = (
    "torch",
    "mlflow",
    "prefect",
    "bentoml",
    "dvc",
    "pandas",
    "pyarrow",
    "great_expectations",
    "sqlalchemy",
    "httpx",
)


def loopwright(*words: str, cwd: Path = SOURCE) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "loopwright", *words], cwd=cwd, capture_output=True, text=True)


def test_help_lists_every_command_without_heavy_imports() -> None:
    program = (
        "import sys; from loopwright import cli\ntry:\n    cli.app(['--help'])\nexcept SystemExit: pass\n"
        f"print('heavy:', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], cwd=SOURCE, capture_output=True, text=True, check=True
    ).stdout
    assert said.endswith("heavy: []\n")
    for command in COMMANDS:
        assert f"\n  {command} " in said


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"])
    assert shown.exit_code == 0
    assert "Usage:" in shown.output


@pytest.mark.parametrize(
    "command", [name for name in COMMANDS if name not in ("data", "registry", "feedback", "keys", "audit")]
)
def test_every_command_takes_json(command: str) -> None:
    assert "--json" in CliRunner().invoke(app, [command, "--help"]).output


def test_usage_errors_end_with_2() -> None:
    assert loopwright("fly").returncode == 2
    assert loopwright("run", "--warp").returncode == 2
    assert loopwright("registry", "compare", "agent").returncode == 2


def test_wrong_input_ends_with_1_and_one_line(tmp_path: Path) -> None:
    ended = loopwright("status", cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == (
        f"{tmp_path}: no Loopwright project here or above (no dvc.yaml with params.yaml); run inside a clone\n"
    )


def test_with_json_wrong_input_is_one_document_too(tmp_path: Path) -> None:
    ended = loopwright("status", "--json", cwd=tmp_path)
    document = json.loads(ended.stdout)
    assert document["exit_code"] == ended.returncode == 1
    assert document["error"] == ended.stderr.strip()


def test_tables_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("stage", "seconds"), [("collect", 1.23456), ("tune", None)])
    assert capsys.readouterr().out == "stage    seconds\ncollect  1.235\ntune\n"
