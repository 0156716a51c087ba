"""Two machines: network namespaces with a link between them, one rank in each, started by torchrun or by Ray."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from components.config.paths import Paths
from components.runtime.params_file import write_params
from components.tracking.mlflow_client import UPLOADER
from tests.training.test_distributed import SOURCE, ranks_of
from tests.training.test_ray import HAS_RAY, losses, read_until

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(bool(os.geteuid()) or not shutil.which("ip"), reason="only root makes network namespaces"),
    pytest.mark.timeout(900),
]

NAMES = ("loopwright-first", "loopwright-second")
ADDRESSES = ("10.78.0.1", "10.78.0.2")
LINK = "lw0"
RAY = Path(tempfile.gettempdir(), "ray")
"""Of each machine's own: Ray finds its node there. `ip netns exec` gives a process mounts of its own."""
STEPS = 60
STAGE = ("-m", "components.runtime.stage", "pretrain@decoder")
Start = Callable[..., subprocess.Popen[str]]


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def start() -> Iterator[Start]:
    """Start Python on one of two machines, in a project's folder, which both have; all of it ends with the test."""
    started: list[subprocess.Popen[str]] = []

    def start(machine: int, root: Path, *words: str) -> subprocess.Popen[str]:
        started.append(start_on(machine, root, *words))
        return started[-1]

    for name in NAMES:  # left by a test that was killed
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    with ExitStack() as stack:
        for name in NAMES:
            ip("netns", "add", name)
            stack.callback(ip, "netns", "delete", name)
            stack.callback(end_all, name)
        ip("link", "add", LINK, "netns", NAMES[0], "type", "veth", "peer", "name", LINK, "netns", NAMES[1])
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", LINK)
            for link in (LINK, "lo"):
                ip("-n", name, "link", "set", link, "up")
        yield start
    for process in started:
        process.communicate()


def end_all(name: str) -> None:
    """Kill the processes of a namespace."""
    processes = [psutil.Process(int(pid)) for pid in ip("netns", "pids", name).split() if psutil.pid_exists(int(pid))]
    for process in processes:
        process.kill()
    psutil.wait_procs(processes, 30)


def start_on(machine: int, root: Path, *words: str) -> subprocess.Popen[str]:
    """Start Python on a machine, whose folder of Ray's is its own."""
    path = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH")]))
    own = {UPLOADER: str(os.getpid()), "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    own |= {"GLOO_SOCKET_IFNAME": LINK, "RAY_USAGE_STATS_ENABLED": "0"}
    folder = root / f"ray-{machine}"
    folder.mkdir(exist_ok=True)
    RAY.mkdir(exist_ok=True)
    own_ray = ["sh", "-c", f'mount --bind "$0" {RAY} && exec "$@"', str(folder)]
    command = ["ip", "netns", "exec", NAMES[machine], *own_ray, sys.executable, *words]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=root, env=os.environ | own, **pipes)


@contextmanager
def ended(*processes: subprocess.Popen[str]) -> Iterator[None]:
    """Within the block these run; behind it they have ended with 0."""
    yield
    for process in processes:
        output, errors = process.communicate()
        assert process.returncode == 0, output + errors


@pytest.fixture
def shared(project: Paths, tiny_settings: dict[str, Any]) -> Paths:
    """A project in a folder that both machines have."""
    shutil.copytree(SOURCE / "components", project.root / "components", ignore=shutil.ignore_patterns("__pycache__"))
    write_params(project.params, tiny_settings | {"pretrain.decoder.max_steps": STEPS}, echo=lambda _: None)
    return project


def losses_of_one(start: Start, project: Paths) -> list[float]:
    """Losses of the same training as one process."""
    shutil.rmtree(project.root / "var/checkpoints", ignore_errors=True)
    write_params(project.params, {"run.launcher": "local", "run.processes": 1}, echo=lambda _: None)
    with ended(start(0, project.root, *STAGE)):
        pass
    return losses(project)


def test_ranks_of_torchrun_on_two_machines_learn_as_one_process(start: Start, shared: Paths) -> None:
    words = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    words += ["--master-addr", ADDRESSES[0], "--master-port", "29400"]
    with ended(*(start(number, shared.root, *words, "--node-rank", str(number), *STAGE) for number in (0, 1))):
        pass
    learned = losses(shared)
    assert len(learned) == STEPS
    assert learned == pytest.approx(losses_of_one(start, shared), abs=1e-4)


@pytest.mark.skipif(not HAS_RAY, reason="the extra cluster is not installed")
def test_a_run_on_ray_goes_on_without_a_rank_and_without_a_machine(start: Start, shared: Paths) -> None:
    """A killed rank starts again on its machine; without that machine the other one goes on alone."""
    root = shared.root
    address = f"http://{ADDRESSES[0]}:8265"
    write_params(
        shared.params, {"run.launcher": "ray", "run.processes": 2, "run.address": address}, echo=lambda _: None
    )
    node = ["-m", "ray.scripts.scripts", "start", "--block", "--num-cpus", "1", "--object-store-memory", str(2**27)]
    ports = ["--port", "6379", "--dashboard-host", ADDRESSES[0], "--include-dashboard", "true"]
    head = start(0, root, *node, "--head", "--node-ip-address", ADDRESSES[0], *ports)
    read_until(head, "Ray runtime started")
    second = start(1, root, *node, "--address", f"{ADDRESSES[0]}:6379", "--node-ip-address", ADDRESSES[1])
    read_until(second, "Ray runtime started")
    with ended(stage := start(0, root, *STAGE)):
        read_until(stage, f" 5/{STEPS} ")
        rank_on_second(root).kill()
        again = read_until(stage, f" 12/{STEPS} ")
        assert sum("resumed at step" in line for line in again) == 1
        raylets = [each for each in psutil.Process(second.pid).children(recursive=True) if each.name() == "raylet"]
        assert len(raylets) == 1
        raylets[0].kill()
        rest = read_until(stage, f" {STEPS}/{STEPS} ")
        assert sum("resumed at step" in line for line in rest) == 1
    learned = losses(shared)
    assert len(learned) == STEPS
    assert learned == pytest.approx(losses_of_one(start, shared), abs=1e-4)


def rank_on_second(root: Path) -> psutil.Process:
    """The one rank that runs on the second machine."""
    here = [process for process in ranks_of(root) if str(process.pid) in ip("netns", "pids", NAMES[1]).split()]
    assert len(here) == 1
    return here[0]
