"""Registers the deployments of prefect.yaml, and the work pools that they name, on a Prefect server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import yaml

from components.config.params import InputError
from components.config.paths import Paths, find_root
from components.feedback.store import Store
from flows.orchestration.prefect_server import home_tag

POOLS = ("cpu", "gpu")
"""The work pools; that of machines with a CUDA device is the second."""
JOB_TEMPLATE = Path(__file__).parents[2] / "deploy" / "work-pool.json"
"""The base job template of both. It works where its worker runs, so a moved or copied project does not work in its old
folder; and it has no variables: by Prefect's own template, a flow run names a command and an environment."""


def state_folder() -> dict[str, str]:
    """A build step of prefect.yaml: the tag by which flow runs of this state folder are known."""
    return {"tag": home_tag(Paths(find_root()).home)}


def has_cuda_device() -> bool:
    """Whether the driver shows a device; without importing torch."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def register(root: Path) -> list[dict[str, str]]:
    """Create the work pools and run `prefect deploy --all`, on the server that PREFECT_API_URL names.

    Raises: InputError with Prefect's own message.
    """
    deployments = read_deployments(root)
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectNotFound

    template = json.loads(JOB_TEMPLATE.read_text(encoding="utf-8"))
    with get_client(sync_client=True) as client:
        for name in POOLS:
            try:
                client.read_work_pool(name)
                client.update_work_pool(name, WorkPoolUpdate(base_job_template=template))
            except ObjectNotFound:
                client.create_work_pool(WorkPoolCreate(name=name, type="process", base_job_template=template))
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    ended = subprocess.run(
        command, cwd=root, env={**os.environ, "COLUMNS": "1000"}, capture_output=True, text=True, errors="replace"
    )
    if ended.returncode:
        lines = (ended.stdout + ended.stderr).strip().splitlines()
        raise InputError(f"prefect.yaml: {lines[-1].strip() if lines else 'prefect deploy failed'}; correct it there")
    scheduled = [_flow(deployment) for deployment in deployments if deployment.get("schedules")]
    with closing(Store.of(Paths(root).home)) as store:
        store.record_schedules(scheduled)
    return [
        {
            "deployment": f"{_flow(deployment)}/{deployment['name']}",
            "pool": deployment["work_pool"]["name"],
            "cron": ", ".join(schedule["cron"] for schedule in deployment.get("schedules", ()) if "cron" in schedule),
            "event": ", ".join(event for trigger in deployment.get("triggers", ()) for event in trigger["expect"]),
        }
        for deployment in deployments
    ]


def read_deployments(root: Path) -> list[dict[str, Any]]:
    """The deployments of prefect.yaml.

    Raises: InputError when it cannot be read.
    """
    try:
        declared = yaml.safe_load((root / "prefect.yaml").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("prefect.yaml: not found; restore it from git") from None
    except yaml.YAMLError as error:
        raise InputError(f"prefect.yaml: not valid YAML: {' '.join(str(error).split())}") from None
    return list(declared["deployments"])


def _flow(deployment: Mapping[str, Any]) -> str:
    """The name of a deployment's flow."""
    return str(deployment["entrypoint"].rpartition(".")[2])
