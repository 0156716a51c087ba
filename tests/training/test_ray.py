"""The Ray launcher, on clusters of this machine: a stage as a job, with its signals, restarts and refusals."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

from components.config.paths import Paths
from components.runtime.params_file import write_params
from components.runtime.process import RUN_PID
from flows.orchestration.prefect_server import free_port
from tests.training.test_distributed import SOURCE, ranks_of
from tests.training.test_distributed import start as start_stage

HAS_RAY = find_spec("ray") is not None
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(not HAS_RAY, reason="the extra cluster is not installed"),
    pytest.mark.timeout(900),
]

HEAD = """
import ray, subprocess, sys
head = ray.init("local", num_cpus=2, include_dashboard=True, object_store_memory=2**27)
client = "--address", head.address_info["gcs_address"], "--host", "127.0.0.1", "--port", sys.argv[1], "--mode", "legacy"
with subprocess.Popen([sys.executable, "-m", "ray.util.client.server", *client]) as server:
    print(head.dashboard_url, flush=True)
    sys.stdin.read()
    server.terminate()
"""
CLIENT_PORT = free_port()
RUN = f"""
import os, subprocess, sys
os.environ["{RUN_PID}"] = str(os.getpid())
subprocess.run(sys.argv[1:])
"""
STEPS = 60


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The dashboard's address of a cluster with two CPUs and a token."""
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text("ab" * 32)
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        environment = os.environ | {"RAY_AUTH_MODE": "token"}
        with subprocess.Popen([sys.executable, "-c", HEAD, str(CLIENT_PORT)], env=environment, **pipes) as head:
            assert head.stdout is not None
            yield head.stdout.readline().strip()
            head.communicate()


@pytest.fixture
def ray_project(project: Paths, tiny_settings: dict[str, Any]) -> Paths:
    """A project whose trainings run on two processes of a Ray of their own."""
    shutil.copytree(SOURCE / "components", project.root / "components", ignore=shutil.ignore_patterns("__pycache__"))
    settings = {"run.launcher": "ray", "run.processes": 2, "pretrain.decoder.max_steps": STEPS}
    write_params(project.params, tiny_settings | settings, echo=lambda _: None)
    return project


@pytest.fixture
def project_on_ray(ray_project: Paths, cluster: str) -> Paths:
    """A project whose trainings run on two processes of the cluster."""
    write_params(ray_project.params, {"run.address": cluster}, echo=lambda _: None)
    return ray_project


def losses(project: Paths) -> list[float]:
    lines = (project.metrics / "pretrain@decoder_loss.csv").read_text().splitlines()[1:]
    return [float(line.split(",")[-1]) for line in lines]


def start(root: Path, *before: str) -> subprocess.Popen[str]:
    path = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH")]))
    return start_stage("pretrain@decoder", root, *before, PYTHONPATH=path)


def read_until(stage: subprocess.Popen[str], part: str) -> list[str]:
    assert stage.stdout is not None
    lines = []
    for line in stage.stdout:
        lines.append(line)
        if part in line:
            return lines
    assert stage.stderr is not None
    raise AssertionError(f"{part!r} is not in {lines}\n{stage.stderr.read()}")


def test_without_an_address_a_stage_has_a_ray_of_its_own(ray_project: Paths) -> None:
    """Before there is the cluster of the other tests: a machine has room for one Ray that takes jobs.

    SIGTERM to all its processes, as `loopwright run` sends it, ends it behind a checkpoint.
    """
    root = ray_project.root
    with start(root) as stage:
        read_until(stage, f" 5/{STEPS} ")
        members = psutil.Process(stage.pid).children(recursive=True)
        for process in (*members, psutil.Process(stage.pid)):
            process.terminate()
        output, errors = stage.communicate()
    assert stage.returncode == 128 + signal.SIGTERM, output + errors
    assert not psutil.wait_procs(members, 60)[1]
    with start(root) as stage:
        output, errors = stage.communicate()
    assert stage.returncode == 0, output + errors
    assert output.count("resumed at step") == 1


def test_a_killed_rank_and_a_killed_launcher_end_no_job(project_on_ray: Paths) -> None:
    """The ranks start again from their last checkpoint; the launcher of the same inputs follows the same job."""
    root = project_on_ray.root
    with start(root) as stage:
        read_until(stage, f" 5/{STEPS} ")
        stage.kill()
    with start(root) as stage:
        read_until(stage, "follows the running Ray job pretrain-decoder-")
        read_until(stage, f" 8/{STEPS} ")
        ranks_of(root)[1].kill()
        read_until(stage, "resumed at step")
        ranks_of(root)[1].terminate()  # a machine is taken away
        output, errors = stage.communicate()
    assert stage.returncode == 0, output + errors
    for killed in ("1 of 2 ended with signal 9", "0 of 2 ended with signal 15"):
        restart = f"pretrain@decoder: process {killed}; 2 start again from the last checkpoint"
        assert errors.count(restart) == 1, errors
    assert output.count("stopped at step") == output.count("resumed at step") == 1, output
    assert output.count(f" {STEPS}/{STEPS} ") == 1
    broken = losses(project_on_ray)
    report = json.loads((root / "var/stages/pretrain@decoder.json").read_text())
    assert report["exit_code"] == 0
    shutil.rmtree(root / "var/checkpoints")
    with start(root) as stage:
        output, errors = stage.communicate()
    assert stage.returncode == 0, output + errors
    assert losses(project_on_ray) == broken


def test_a_cancellation_ends_the_job_and_the_death_of_its_run_does_not(project_on_ray: Paths) -> None:
    """Both reach the launcher as SIGTERM; the next launcher follows the job."""
    root = project_on_ray.root
    write_params(project_on_ray.params, {"pretrain.decoder.max_steps": 10 * STEPS}, echo=lambda _: None)
    with start(root, sys.executable, "-c", RUN) as run:
        read_until(run, " 5/")
        launchers = psutil.Process(run.pid).children()
        run.kill()
        assert not psutil.wait_procs(launchers, 60)[1]
    assert len(ranks_of(root)) == 2
    with start(root) as stage:
        read_until(stage, "follows the running Ray job pretrain-decoder-")
        stage.terminate()
        output, errors = stage.communicate()
    assert stage.returncode == 128 + signal.SIGTERM, output + errors
    assert output.count("stopped at step") == 1, output + errors
    assert not ranks_of(root)
    step = int(output.partition("stopped at step ")[2].partition(";")[0])
    with start(root) as stage:
        read_until(stage, f"resumed at step {step}\n")
        stage.terminate()
        output, errors = stage.communicate()
    assert stage.returncode == 128 + signal.SIGTERM, output + errors


def test_the_address_that_takes_shards_takes_trainings_too(project_on_ray: Paths) -> None:
    settings = {"run.address": f"ray://127.0.0.1:{CLIENT_PORT}", "pretrain.decoder.max_steps": 4}
    write_params(project_on_ray.params, settings, echo=lambda _: None)
    with start(project_on_ray.root) as stage:
        output, errors = stage.communicate()
    assert (stage.returncode, output.count(" 4/4 ")) == (0, 1), output + errors


def test_what_a_cluster_cannot_do_is_refused_in_one_line(project_on_ray: Paths, cluster: str) -> None:
    refusals = {
        "run.processes": (3, "params.yaml: run.processes: 3: the Ray cluster has 2 CPUs; set it to 2"),
        "pretrain.decoder.global_batch_size": (
            1,
            "params.yaml: pretrain.decoder.global_batch_size: 1 rows leave some of 2 processes without any; set it to a"
            " multiple of 2",
        ),
    }
    text = project_on_ray.params.read_text()
    write_params(project_on_ray.params, {"run.address": "127.0.0.1:9"}, echo=lambda _: None)
    with start(project_on_ray.root) as stage:
        _, errors = stage.communicate()
    assert stage.returncode == 1
    assert re.fullmatch(
        r"params.yaml: run.address: http://127.0.0.1:9: no Ray dashboard answers .*; start .*\n", errors
    )
    project_on_ray.params.write_text(text)
    for parameter, (value, refusal) in refusals.items():
        settings = {parameter: value} | ({"pretrain.decoder.micro_batch_size": 1} if "batch" in parameter else {})
        write_params(project_on_ray.params, settings, echo=lambda _: None)
        with start(project_on_ray.root) as stage:
            output, errors = stage.communicate()
        assert (stage.returncode, errors.splitlines()) == (1, [refusal]), output + errors
        report = json.loads((project_on_ray.root / "var/stages/pretrain@decoder.json").read_text())
        assert (report["exit_code"], report["message"]) == (1, refusal)
        project_on_ray.params.write_text(text)
