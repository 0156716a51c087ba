"""Each row of docs/conventions.md: the tools' own commands do in a checkout what their users expect.

A row is run in a shell in a released project; it must exit with 0 and print the code spans of its last column. A
command that needs more than that (a server, another checkout) has a function in `CHECKS`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from flows.orchestration.prefect_server import client_settings, prefect_api
from tests.conftest import Project, Released
from tests.convention_servers import SERVERS
from tests.pages import ROOT, SPAN

pytestmark = [pytest.mark.platform, pytest.mark.timeout(900)]

TOOLS = ("DVC", "Prefect", "MLflow", "BentoML")
"""Those that must have rows."""
ROLES = ("AUTHOR", "COMMITTER")


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    tool: str
    command: str
    prints: tuple[str, ...]


def read_rows() -> list[Row]:
    """The rows of the page, in its order."""
    lines = (ROOT / "docs/conventions.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return [Row(tool, command.strip("`"), tuple(SPAN.findall(prints))) for tool, command, _, prints in cells[1:]]


ROWS = read_rows()


@dataclass(frozen=True)
class Checkout:
    """A released project whose results are committed, and the shell in it."""

    project: Project
    addresses: dict[str, str]
    """Variables that name its servers."""

    def shell(self, command: str, root: Path | None = None) -> str:
        """Output of a command that must succeed, run in `root` or the project."""
        root = root or self.project.root
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        ended = subprocess.run(
            ["/bin/sh", "-c", command],
            cwd=root,
            # The sources of the checkout, as its own editable install has them.
            env={**self.project.environment, **self.addresses, "PATH": path, "PYTHONPATH": str(root)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert ended.returncode == 0, f"{command}: exit {ended.returncode}\n{ended.stdout}"
        return ended.stdout


@pytest.fixture(scope="module")
def checkout(released: Released, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    """A copy of the released project, so that other tests find theirs as it was, and a Prefect server."""
    root = tmp_path_factory.mktemp("conventions") / "project"
    shutil.copytree(released.project.root, root, symlinks=True)
    project = Project(root)
    with pytest.MonkeyPatch.context() as patch:
        for name in set(os.environ) - set(project.environment):
            patch.delenv(name)
        with prefect_api(project.home) as api:
            # Prefect's client refuses the address of the project's dead proxy, whatever it connects to.
            proxies = {"ALL_PROXY": "", "NO_PROXY": "127.0.0.1"}
            addresses = {**client_settings(project.home, api.wait()), **proxies, "COLUMNS": "300"}
            addresses |= {f"GIT_{role}_{what}": "t@example.com" for role in ROLES for what in ("NAME", "EMAIL")}
            checkout = Checkout(project, addresses)
            checkout.shell("git add --all && git commit --quiet --message Results")
            yield checkout


Check = Callable[[Checkout, str], str]
CHECKS: dict[str, Check] = {**SERVERS}
"""By command: runs it its own way and returns its output."""


def check(command: str) -> Callable[[Check], Check]:
    """Registers a function that runs the row of `command`."""

    def register(function: Check) -> Check:
        CHECKS[command] = function
        return function

    return register


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.command)
def test_a_command_does_what_its_users_expect(row: Row, checkout: Checkout) -> None:
    output = CHECKS.get(row.command, Checkout.shell)(checkout, row.command)
    missing = [text for text in row.prints if text not in re.sub(r"\s+", " ", output)]
    assert not missing, output


@check("dvc pull --allow-missing")
def pull(checkout: Checkout, command: str) -> str:
    """In a clone on a machine that has the remote and nothing else."""
    clone = checkout.project.root.parent / "clone"
    checkout.shell(f"git clone --quiet . {clone}")
    assert not (clone / "data/models").exists()
    checkout.shell(f"dvc remote modify --local local url {checkout.project.home}/dvc-remote && {command}", clone)
    assert "\n0 of " in checkout.shell("loopwright run --dry-run", clone)
    return checkout.shell("dvc status dvc.yaml", clone)


@check("prefect deploy --all")
def deploy(checkout: Checkout, command: str) -> str:
    """Behind the work pools, which Prefect wants to exist."""
    for name in ("cpu", "gpu"):
        checkout.shell(f"prefect work-pool create {name} --type process --base-job-template deploy/work-pool.json")
    return checkout.shell(command)


def test_every_tool_has_rows_and_every_check_a_row() -> None:
    assert {row.tool for row in ROWS} == set(TOOLS)
    assert all(row.prints for row in ROWS)
    assert not set(CHECKS) - {row.command for row in ROWS}
