"""The services of `loopwright up`: how each is started, and when it counts as healthy."""

from __future__ import annotations

import io
import os
import sqlite3
import sys
from collections.abc import Mapping
from configparser import ConfigParser
from contextlib import closing
from functools import partial
from pathlib import Path

from components.config.params import load_params
from components.config.paths import Paths, find_root
from components.runtime.files import write_text
from components.runtime.process import alive
from components.runtime.service_registry import AUTH_FILE, answers, lives
from components.runtime.supervisor import STOP_SECONDS, Service
from components.tracking.mlflow_database import DATABASE, database_uri, relocate
from components.tracking.mlflow_requests import authorization
from flows.orchestration.prefect_server import auth_string, client_settings, server_settings

HEALTH_FILE = "worker.ready"
MLFLOW_FOLDER = "mlflow"
"""In the project: settings of MLflow's server, whoever starts it."""
MLFLOW_AUTH_FILE = "mlflow-auth"
"""In the state folder: what MLflow's page and clients sign in with, `admin:PASSWORD`."""


def platform(home: Path, ports: Mapping[str, int], deploy: bool) -> list[Service]:
    """MLflow, Prefect, worker and endpoint; what MLFLOW_TRACKING_URI or PREFECT_API_URL names is not started."""
    mlflow = os.environ.get("MLFLOW_TRACKING_URI") or f"http://127.0.0.1:{ports['mlflow']}"
    prefect = os.environ.get("PREFECT_API_URL") or f"http://127.0.0.1:{ports['prefect']}/api"
    services = []
    if "PREFECT_API_URL" not in os.environ:
        services.append(_prefect(home, ports["prefect"], prefect))
    if "MLFLOW_TRACKING_URI" not in os.environ:
        services.append(_mlflow(home, ports["mlflow"], mlflow))
    services.append(_worker(home, prefect, deploy))
    services.append(_endpoint(home, ports["endpoint"]))
    return services


def _prefect(home: Path, port: int, url: str) -> Service:
    command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    health = f"{url}/health"
    return Service(
        "prefect",
        _python(*command),
        url,
        partial(answers, health, 1.0),
        hint=f"  (sign in with the line in {home / AUTH_FILE})",
        environment=server_settings(home, port),
        lives=partial(lives, health),
    )


def _mlflow(home: Path, port: int, url: str) -> Service:
    folder = home / "mlflow"
    folder.mkdir(parents=True, exist_ok=True)
    relocate(home)
    command = ["mlflow", "--env-file", str(find_root() / MLFLOW_FOLDER / "server.env"), "server"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", database_uri(home)]
    # The same files, under the same address, as for commands that run beside the server.
    command += ["--default-artifact-root", (folder / "artifacts").as_uri(), "--no-serve-artifacts"]
    # A page of another site that was rebound to this machine by DNS names another host.
    names = [f"{host}:{port}" for host in ("127.0.0.1", "localhost")]
    command += ["--app-name", "basic-auth"]
    command += ["--allowed-hosts", ",".join(names)]
    command += ["--cors-allowed-origins", ",".join(f"http://{name}" for name in names)]
    # MLflow reads these as it is imported, before its file of settings.
    environment = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1", "GIT_PYTHON_REFRESH": "quiet"}
    health = f"{url}/health"
    return Service(
        "mlflow",
        _python(*command),
        url,
        partial(answers, health, 1.0),
        hint=f"  (sign in with the line in {home / MLFLOW_AUTH_FILE})",
        environment={**environment, **_mlflow_users(home)},
        lives=partial(lives, health),
    )


def _mlflow_users(home: Path) -> Mapping[str, str]:
    """Environment of MLflow's basic authentication: `admin` has the state folder's password, and may add users.

    MLflow reads the password when it makes its database of users.
    """
    users, settings = home / "mlflow" / "users.db", home / "mlflow" / "basic_auth.ini"
    if not (home / MLFLOW_AUTH_FILE).exists():
        users.unlink(missing_ok=True)
    user, _, password = auth_string(home, MLFLOW_AUTH_FILE).partition(":")
    parser = ConfigParser(interpolation=None)
    parser.read(find_root() / MLFLOW_FOLDER / "auth.ini", encoding="utf-8")
    parser["mlflow"]["database_uri"] = f"sqlite:///{users}".replace("%", "%%")
    with io.StringIO() as text:
        parser.write(text)
        write_text(settings, text.getvalue())
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(settings),
        "MLFLOW_AUTH_ADMIN_USERNAME": user,
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": password,
    }


def _worker(home: Path, prefect: str, deploy: bool) -> Service:
    ready = home / HEALTH_FILE
    # The worker does so at each start; until then a process id from before a reboot may be another program's.
    ready.unlink(missing_ok=True)

    def is_healthy() -> bool:
        """Whether the worker that wrote its process id there still runs; a killed worker leaves the file."""
        return ready.exists() and alive(int(ready.read_text(encoding="utf-8") or "0"))

    command = _python("flows.orchestration.worker", *([] if deploy else ["--no-deploy"]))
    return Service("worker", command, "", is_healthy, environment=client_settings(home, prefect))


def _endpoint(home: Path, port: int) -> Service:
    url = f"http://127.0.0.1:{port}"
    serve = load_params(Paths(find_root()).params).serve
    return Service(
        "endpoint",
        _python("loopwright", "serve", "--port", str(port)),
        url,
        partial(answers, f"{url}/readyz", 1.0),
        lives=partial(lives, f"{url}/livez"),
        hint=f"  (champions, runs and feedback: {url}/registry)",
        may_start=lambda: has_champion(home),
        waits_for='a champion; "loopwright run" makes one',
        stop_seconds=serve.notice_seconds + serve.drain_seconds + STOP_SECONDS,
    )


def has_champion(home: Path, model: str = "agent") -> bool:
    """Whether a model has a champion; without importing MLflow, and before its server has started."""
    if server := os.environ.get("MLFLOW_TRACKING_URI", ""):
        path = f"api/2.0/mlflow/registered-models/alias?name={model}&alias=champion"
        return not server.startswith("http") or answers(f"{server}/{path}", 1.0, authorization())
    try:
        with closing(sqlite3.connect(f"{(home / 'mlflow' / DATABASE).as_uri()}?mode=ro", uri=True)) as tables:
            query = "SELECT 1 FROM registered_model_aliases WHERE name = ? AND alias = 'champion'"
            return tables.execute(query, [model]).fetchone() is not None
    except sqlite3.Error:
        return False


def _python(*words: str) -> list[str]:
    return [sys.executable, "-m", *words]
