"""Planted secrets reach nothing that leaves the process: responses, registry, logs, Bentos, databases."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from pathlib import Path

import httpx
import pytest

from components.config.paths import Paths
from components.tracking.registry import Registry
from flows.release import register
from tests.pages import ROOT
from tests.serving.conftest import Project

pytestmark = pytest.mark.platform

MARK = "s3cr3t"
PARAMS = f"""
run:
  address: http://user:{MARK}-ray@127.0.0.1:8265
serve:
  follow_seconds: 0.1
  backend_url: http://user:{MARK}-backend-url@127.0.0.1:9/v1
  backend_model: agent
  mcp_servers:
  - name: shop
    command: /nonexistent/server
    args: [--token, {MARK}-mcp-argument, --header, "Authorization: Bearer {MARK}-mcp-authorization", -p, {MARK}-mcp-p,
           --auth={MARK}-mcp-auth, "https://{MARK}-mcp-user@127.0.0.1/{MARK}-mcp-long-path?x={MARK}-mcp-x"]
    env: {{TOKEN: {MARK}-mcp-env}}
  - name: web
    url: http://user:{MARK}-mcp-password@127.0.0.1:9/{MARK}-mcp-part-of-the-path/mcp?profile={MARK}-mcp-query
    headers: {{Authorization: Bearer {MARK}-mcp-header}}
"""
ENVIRONMENT = {
    "LOOPWRIGHT_API_KEYS": f"{MARK}-api-key",
    "LOOPWRIGHT_BACKEND_KEY": f"{MARK}-backend-key",
    "AWS_SECRET_ACCESS_KEY": f"{MARK}-aws-secret",
    "HF_TOKEN": f"{MARK}-hf-token",
    "PREFECT_API_AUTH_STRING": f"admin:{MARK}-prefect",
    "MLFLOW_TRACKING_PASSWORD": f"{MARK}-mlflow-password",
}
"""With the password of DVC's remote, and those of addresses below, more than ten."""


@pytest.fixture(scope="module")
def planted(agent_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project of one registered agent, whose configuration and environment are full of secrets."""
    project = Project(tmp_path_factory.mktemp("planted"))
    for name in ("components", "serving", "loopwright"):
        shutil.copytree(ROOT / name, project.root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("bentofile.yaml", "dvc.yaml", "requirements-serve.lock"):
        shutil.copyfile(ROOT / name, project.root / name)
    written = (ROOT / "params.yaml").read_text(encoding="utf-8").replace("run: {}\n", "").replace("serve: {}\n", PARAMS)
    (project.root / "params.yaml").write_text(written, encoding="utf-8")
    (project.root / ".dvc").mkdir()
    remote = f"['remote \"far\"']\n    url = webdavs://user:{MARK}-dvc-url@example.org/dvc\n    password = {MARK}-dvc\n"
    (project.root / ".dvc" / "config.local").write_text(remote)
    folder = project.root / "data" / "models" / "agent"
    shutil.copytree(agent_folder, folder)
    outs = [{"path": "data/models/agent", "md5": "made.dir"}]
    (project.root / "dvc.lock").write_text(json.dumps({"stages": {"tune": {"cmd": "x", "outs": outs}}}))
    registry = Registry(project.home)
    registry.promote(register(registry, Paths(project.root), "agent", folder, {"score": 0.5}, {}, "flow run"))
    return project


def leaks(text: str) -> list[str]:
    return sorted({word for word in text.replace('"', " ").split() if MARK in word})


def leaking_files(folder: Path) -> list[str]:
    """Files below a folder with a planted secret in them, the project's own configuration left out."""
    found = subprocess.run(["grep", "-rlaF", MARK, str(folder)], capture_output=True, text=True, check=False)
    return found.stdout.split()


def test_registry_and_bento_hold_no_secret(planted: Project) -> None:
    code, out, err = planted.run("package", "agent/1", "--json", **ENVIRONMENT)
    assert code == 0, err
    assert "serve.mcp_servers.shop.env.TOKEN" in err
    assert "run.address" in err
    assert leaks(out + err) == []
    source = planted.home / "bento" / "bentos" / "agent" / "v1" / "src"
    assert "TOKEN: $TOKEN" in (source / "params.yaml").read_text()
    assert leaking_files(planted.home) == []


def test_responses_and_logs_hold_no_secret(planted: Project) -> None:
    process, url = planted.serve(**ENVIRONMENT)
    try:
        key = {"Authorization": f"Bearer {ENVIRONMENT['LOOPWRIGHT_API_KEYS']}"}
        with httpx.Client(base_url=url, headers=key, timeout=60) as client:
            question = {"model": "agent", "messages": [{"role": "user", "content": "What is 6*7?"}]}
            answer = client.post("/v1/chat/completions", json=question)
            completion_id = answer.json()["id"]
            vote = client.post("/v1/feedback", json={"completion_id": completion_id, "rating": "up"})
            paths = ("/v1/models", f"/v1/lineage/{completion_id}", "/v1/feedback", "/metrics", "/openapi.json", "/nope")
            responses = [answer, vote, *map(client.get, paths), httpx.get(f"{url}/v1/models")]
        assert [response.status_code for response in responses] == [200, 202, 200, 200, 200, 200, 200, 404, 401]
        texts = [f"{response.text}\n{dict(response.headers)}" for response in responses]
    finally:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    code, traced, _ = planted.run("trace", completion_id, **ENVIRONMENT)
    assert code == 0
    assert leaks("\n".join([*texts, out, err, traced])) == []
    log = (planted.home / "logs" / "serve.log").read_text(encoding="utf-8")
    assert "serve.mcp_servers: web" in log
    assert "serve.mcp_servers.shop.env.TOKEN: a literal value in params.yaml" in log
    assert leaking_files(planted.home) == []


ADDRESSES: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "database": (("feedback", "stats"), {"LOOPWRIGHT_DATABASE_URL": f"postgresql://u:{MARK}-db@127.0.0.1:9/x"}),
    "mlflow": (("registry", "list"), {"MLFLOW_TRACKING_URI": f"http://u:{MARK}-mlflow@127.0.0.1:9"}),
    "prefect": (("deploy",), {"PREFECT_API_URL": f"http://u:{MARK}-prefect@127.0.0.1:9/api"}),
}


@pytest.mark.parametrize("name", ADDRESSES)
def test_a_store_that_is_away_is_reported_without_its_password(name: str, planted: Project) -> None:
    words, environment = ADDRESSES[name]
    code, out, err = planted.run(*words, **environment)
    assert code == 1
    assert next(iter(environment)) in out + err
    assert leaks(out + err) == []
    assert leaking_files(planted.home) == []
