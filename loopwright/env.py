"""`loopwright env`: the exports under which the tools' own commands see this project's stores."""

from __future__ import annotations

import os
from pathlib import Path
from shlex import quote

from components.config.paths import Paths, find_root
from loopwright.output import Json, print_json

EXPORTED = "LOOPWRIGHT_ENV"
"""Names of the addresses that `env` exported: our own commands find the stores without them."""


def env(as_json: Json = False) -> None:
    """Print exports under which bare `mlflow`, `prefect`, `bentoml` and `dvc` see this project's stores.

    `eval "$(loopwright env)"` sets them. What the environment sets stays; passwords are read from their files by the
    shell, and not printed.
    """
    from components.runtime.service_registry import AUTH_FILE, AUTH_STRING, running

    home = Paths(find_root()).home
    values = _stores(home)
    files = {}
    if (url := running(home).get("prefect")) and "PREFECT_API_URL" not in os.environ:
        values["PREFECT_API_URL"] = url
        files[AUTH_STRING] = home / AUTH_FILE
    values = {name: value for name, value in values.items() if name not in os.environ}
    addresses = [name for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL") if name in values]
    if addresses:
        values[EXPORTED] = ",".join(addresses)
    if as_json:
        print_json({"variables": values, "files": {name: str(path) for name, path in files.items()}})
        return
    for name, value in values.items():
        print(f"export {name}={quote(value)}")
    for name, path in files.items():
        print(f'export {name}="$(cat {quote(str(path))})"')


def _stores(home: Path) -> dict[str, str]:
    """Addresses of the state folder's stores, by the variable in which each tool takes them."""
    from components.tracking.mlflow_database import database_uri
    from flows.bento import bento_environment
    from flows.orchestration.prefect_server import settings

    return {
        "LOOPWRIGHT_HOME": str(home),
        "MLFLOW_TRACKING_URI": database_uri(home),
        # What `mlflow server` and `mlflow ui` take.
        "MLFLOW_BACKEND_STORE_URI": database_uri(home),
        "MLFLOW_DEFAULT_ARTIFACT_ROOT": (home / "mlflow" / "artifacts").as_uri(),
        "MLFLOW_SERVE_ARTIFACTS": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        **bento_environment(home),
        "PREFECT_HOME": settings(home)["PREFECT_HOME"],
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DVC_NO_ANALYTICS": "true",
    }


def forget_exports() -> None:
    """Remove the addresses that `env` exported, for our own commands: they would read as those of other servers."""
    for name in os.environ.pop(EXPORTED, "").split(","):
        os.environ.pop(name, None)
