"""`loopwright up` with everything it starts: healthy, restarted, refused twice, and gone without a trace."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from components.runtime.service_registry import running
from components.tracking.registry import Registry
from flows.orchestration.prefect_server import free_port
from tests.conftest import SOURCE, Project, Released, command_output

pytestmark = [pytest.mark.platform, pytest.mark.timeout(900)]

SECONDS_TO_START = 120.0
"""Twice what is promised on a free machine."""
SECONDS_TO_STOP = 10.0


@dataclass
class Up:
    project: Project
    process: subprocess.Popen[bytes]
    ports: list[str]
    out: Path
    told: Path

    def until(self, true: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert self.process.poll() is None, self.told.read_text()
            assert time.monotonic() < deadline, self.told.read_text()
            time.sleep(0.1)

    def endpoint(self) -> int:
        """Status of the endpoint's /readyz; 0 without an answer."""
        try:
            return httpx.get(f"{running(self.project.home)['endpoint']}/readyz", timeout=5).status_code
        except httpx.HTTPError:
            return 0


@pytest.fixture(scope="module")
def up(released: Released, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    folder = tmp_path_factory.mktemp("up")
    # A copy, so that other tests find theirs as it was.
    project = Project(shutil.copytree(released.project.root, folder / "project", symlinks=True))
    ports = [word for name in ("endpoint", "prefect", "mlflow") for word in (f"--{name}-port", str(free_port()))]
    with (folder / "out").open("wb") as out, (folder / "told").open("wb") as told:
        command = project.command("up", "--json", *ports)
        process = subprocess.Popen(command, cwd=project.root, env=project.environment, stdout=out, stderr=told)
    try:
        yield Up(project, process, ports, folder / "out", folder / "told")
    finally:
        process.terminate()
        process.wait(60)


def test_everything_becomes_healthy(up: Up) -> None:
    up.until(lambda: "up in " in up.told.read_text(), SECONDS_TO_START)
    told = json.loads(up.out.read_text())
    states = {service["name"]: service["state"] for service in told["services"]}
    assert states == dict.fromkeys(("prefect", "mlflow", "worker", "endpoint"), "healthy")
    account = (up.project.home / "mlflow-auth").read_text().strip().split(":")
    for service in told["services"]:
        assert Path(service["log"]).is_file()
        if service["address"]:
            auth = httpx.BasicAuth(*account) if service["name"] == "mlflow" else None
            address = service["address"].removesuffix("/api")
            assert httpx.get(address, auth=auth, timeout=30, follow_redirects=True).is_success
    assert up.endpoint() == 200
    assert up.project.ask("status")["scale"] == "smoke", "commands find their way beside it"


def test_a_killed_service_comes_back(up: Up) -> None:
    (pid,) = [row["pid"] for row in json.loads(up.out.read_text())["services"] if row["name"] == "endpoint"]
    psutil.Process(pid).kill()
    up.until(lambda: "endpoint  exited; restarts in " in up.told.read_text(), 10)
    up.until(lambda: up.endpoint() == 200, 60)
    assert not psutil.pid_exists(pid), "another process answers"


def test_a_second_one_is_refused_with_one_line(up: Up) -> None:
    second = up.project.loopwright("up", *up.ports)
    assert second.returncode == 1
    assert second.stderr == f"up: already running as process {up.process.pid}; wait for it, or stop it with kill\n"


def test_the_commands_of_the_runbook_run_beside_it(up: Up, tmp_path: Path) -> None:
    registry = Registry(up.project.home)
    first = registry.resolve("agent@champion")
    registry.promote(registry.register(first.stored, "agent", first.metrics, first.tags, None))
    replacements = {"http://127.0.0.1:3000": running(up.project.home)["endpoint"], "/backups": str(tmp_path)}
    replacements["agent 1 2"] = f"agent 1 {registry.resolve('agent@champion').version}"
    page = (SOURCE / "docs/runbook.md").read_text(encoding="utf-8")
    commands = [line for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    assert len(commands) > page.count("## ") == page.count("```sh")
    outputs = {command: run_command(up.project, command, replacements) for command in dict.fromkeys(commands)}
    assert outputs.pop("loopwright up").startswith("exit 1: up: already running as process ")
    assert not {command: output for command, output in outputs.items() if output.startswith("exit ")}


def run_command(project: Project, command: str, replacements: Mapping[str, str]) -> str:
    """What a command of the runbook prints, or `exit CODE: STDERR`."""
    for text, replacement in replacements.items():
        command = command.replace(text, replacement)
    tool, *words = shlex.split(command)
    if tool == "curl":
        return httpx.get(*words, timeout=30).raise_for_status().text
    assert tool == "loopwright"
    if words[0] in ("up", "run", "improve", "deploy", "backup"):
        ended = project.loopwright(*words)
        code, out, err = ended.returncode, ended.stdout, ended.stderr
    else:
        code, out, err = command_output(project.root, project.environment, *words)
    return f"exit {code}: {err}" if code else out


def test_it_ends_in_time_with_all_it_started(up: Up) -> None:
    members = psutil.Process(up.process.pid).children(recursive=True)
    assert len(members) >= 4
    started = time.monotonic()
    up.process.send_signal(signal.SIGTERM)
    assert up.process.wait(60) == 0
    assert time.monotonic() - started <= SECONDS_TO_STOP
    assert not [member for member in members if member.is_running() and member.status() != psutil.STATUS_ZOMBIE]
    assert running(up.project.home) == {}


def test_a_taken_port_is_refused_with_one_line(up: Up) -> None:
    with socket.create_server(("127.0.0.1", int(up.ports[1]))):
        refused = up.project.loopwright("up", *up.ports)
    assert refused.returncode == 1
    assert refused.stderr == (
        f"--endpoint-port: {up.ports[1]}: Address already in use; stop what listens there or choose another\n"
    )
