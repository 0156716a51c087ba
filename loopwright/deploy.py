"""`loopwright deploy`: register the scheduled deployments with Prefect."""

from __future__ import annotations

import os

from components.config.params import InputError
from components.config.paths import Paths, find_root
from loopwright.output import Json, print_json, print_table


def deploy(as_json: Json = False) -> None:
    """Register pipeline, ingest, improve and monitor on the server of `up`, or the one PREFECT_API_URL names."""
    paths = Paths(find_root())
    from components.runtime.service_registry import running
    from flows.orchestration.prefect_server import Api, settings

    url = os.environ.get("PREFECT_API_URL") or running(paths.home).get("prefect")
    if url is None:
        raise InputError('PREFECT_API_URL: not set, and no platform runs; start "loopwright up", which deploys itself')
    for variable, value in {**settings(paths.home), "PREFECT_API_URL": url}.items():
        os.environ.setdefault(variable, value)
    (paths.home / "prefect").mkdir(parents=True, exist_ok=True)
    Api(url, paths.home / "logs" / "prefect.log", None).wait()
    from flows.deployments import register

    rows = register(paths.root)
    if as_json:
        print_json({"server": url, "deployments": rows})
    else:
        print_table(("deployment", "cron", "event"), [tuple(row.values()) for row in rows])
