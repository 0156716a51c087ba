"""Rows of docs/conventions.md whose command is a server: started as a user does, asked, and stopped."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx

from components.runtime.service_registry import wait_for
from flows.orchestration.prefect_server import free_port


@contextmanager
def served(checkout: Any, command: str, root: Path, ready: str, **environment: str) -> Iterator[str]:
    """The address of a server that a command starts on a free port, once it is ready."""
    address = f"http://127.0.0.1:{(port := free_port())}"
    log = root / "server.log"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {**checkout.project.environment, "PATH": path, "PYTHONPATH": str(root), **environment}
    with log.open("wb") as file:
        process = subprocess.Popen(
            ["/bin/sh", "-c", f"{command.replace('&& ', '&& exec ')} --port {port}"],
            cwd=root,
            env=variables,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        assert wait_for(f"{address}{ready}", 180, process), log.read_text()
        yield address
    finally:
        process.terminate()
        process.wait(60)


def ask(address: str) -> str:
    """The model that answers a chat, and its answer."""
    body = {"model": "agent", "messages": [{"role": "user", "content": "What does json.dumps do?"}], "max_tokens": 8}
    response = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=120, trust_env=False)
    return response.raise_for_status().text


def mlflow_server(checkout: Any, command: str) -> str:
    with served(checkout, command, checkout.project.root, "/health") as address:
        models = httpx.get(f"{address}/api/2.0/mlflow/registered-models/get?name=agent", timeout=60, trust_env=False)
        return models.raise_for_status().text


def bentoml_serve(checkout: Any, command: str) -> str:
    with served(checkout, command, checkout.project.root, "/readyz") as address:
        return ask(address)


def bentoml_build_with_weights(checkout: Any, command: str) -> str:
    """Exported, moved to a folder without the project, and served there with another database."""
    tag = checkout.shell(command).strip().rpartition("__tag__:")[2]
    elsewhere = checkout.project.root.parent / "elsewhere"
    elsewhere.mkdir()
    checkout.shell(f'eval "$(loopwright env)" && bentoml export {tag} {elsewhere}/agent.bento')
    store = {"BENTOML_HOME": str(elsewhere / "bento"), "BENTOML_DO_NOT_TRACK": "true"}
    checkout.shell(f"BENTOML_HOME={store['BENTOML_HOME']} bentoml import {elsewhere}/agent.bento", elsewhere)
    database = elsewhere / "other.db"
    own = {**store, "LOOPWRIGHT_DATABASE_URL": f"sqlite:///{database}", "LOOPWRIGHT_HOME": str(elsewhere / "state")}
    with served(checkout, f"true && bentoml serve {tag}", elsewhere, "/readyz", **own) as address:
        answer = ask(address)
    with closing(sqlite3.connect(database)) as tables:
        assert tables.execute("SELECT model FROM requests").fetchall() == [("agent/1",)]
    return answer


SERVERS = {
    'eval "$(loopwright env)" && mlflow --env-file mlflow/server.env server': mlflow_server,
    'eval "$(loopwright env)" && bentoml serve': bentoml_serve,
    'eval "$(loopwright env)" && bentoml build --arg weights=agent:v1 --output tag': bentoml_build_with_weights,
}
"""By command: runs the row in a checkout and returns what its server answered."""
