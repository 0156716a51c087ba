"""A packaged agent: built, served by its own code, answering from the weights that it carries."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from components.runtime.process import start, stop
from components.runtime.service_registry import wait_for
from flows import bento

pytestmark = pytest.mark.platform

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def packable(project: Any) -> Any:
    """The project, with the code that goes into its Bentos and a short time limit of heads."""
    params = (project.root / "params.yaml").read_text()
    short = params.replace("follow_seconds: 0.1", "follow_seconds: 0.1, header_seconds: 1.0")
    (project.root / "params.yaml").write_text(short)
    for name in ("components", "serving", "loopwright"):
        shutil.copytree(ROOT / name, project.root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("bentofile.yaml", "requirements-serve.lock"):
        shutil.copyfile(ROOT / name, project.root / name)
    yield project
    for name in ("components", "serving", "loopwright"):
        shutil.rmtree(project.root / name)
    (project.root / "params.yaml").write_text(params)


def test_packaged_agent_answers_from_its_own_weights(packable: Any) -> None:
    code, out, err = packable.run("package", "agent/1", "--json")
    assert code == 0, err
    tag = json.loads(out)["tag"]
    assert tag == "agent:v1"
    source = packable.home / "bento" / "bentos" / "agent" / "v1" / "src"
    assert sorted(path.name for path in source.iterdir() if path.is_dir()) == ["components", "loopwright", "serving"]

    process, url = packable.serve("--bento", tag)
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(model="agent", messages=[{"role": "user", "content": "What is 6*7?"}])
    assert (answer.model, answer.choices[0].message.content) == ("agent/1", "That is 42.")
    version = httpx.get(f"{url}/v1/lineage/{answer.id}").json()["version"]
    assert (version["version"], version["tags"]["git_commit"], version["metrics"]) == ("1", "c0ffee", {"score": 0.5})
    # The Bento's server writes to the same record that `trace` reads.
    code, out, _ = packable.run("trace", answer.id)
    assert code == 0
    assert "That is 42." in out
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_bentoml_serve_has_the_limits_of_connections_and_writes_for_its_user_alone(
    packable: Any, tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "bentoml", "serve", "agent:v1", "--host", "127.0.0.1", "--port", str(port)]
    environment = {"BENTOML_HOME": str(packable.home / "bento"), "BENTOML_DO_NOT_TRACK": "true"}
    environment["LOOPWRIGHT_HOME"] = str(state := tmp_path / "state")
    with (packable.home / "bentoml.log").open("wb") as log:
        mask = os.umask(0o022)
        process = start(command, log, environment)
        os.umask(mask)
        try:
            assert wait_for(f"http://127.0.0.1:{port}/readyz", 120, process)
            with socket.create_connection(("127.0.0.1", port), timeout=20) as slow:
                slow.sendall(b"GET /livez HTTP/1.1\r\nHost")
                assert slow.recv(65536).startswith(b"HTTP/1.1 408")
            assert (state / "feedback.db").is_file()
            assert not [path for path in state.rglob("*") if path.stat().st_mode & 0o077]
        finally:
            stop(process)


KILLED = """
import os, sys
from pathlib import Path
from components.config.paths import Paths
from flows import bento

bento.write_text = lambda *_: os._exit(9)
bento.package(Paths(Path(sys.argv[1])), "agent/1")
"""


def test_a_build_that_is_killed_leaves_no_secret_and_does_not_count(packable: Any) -> None:
    params = packable.root / "params.yaml"
    text = params.read_text()
    server = "mcp_servers: [{name: shop, command: shop, env: {TOKEN: planted-token}}]"
    params.write_text(text.replace("follow_seconds: 0.1", f"follow_seconds: 0.1, {server}"))
    try:  # in a process of its own: BentoML opens its stores once in each
        killed = subprocess.run([sys.executable, "-c", KILLED, packable.root], cwd=ROOT, check=False)
    finally:
        params.write_text(text)
    assert killed.returncode == 9
    files = [path for path in (packable.home / "bento").rglob("*") if path.is_file()]
    assert "serving" in {path.parent.name for path in files}
    assert not [path for path in files if b"planted-token" in path.read_bytes()]
    assert not bento.has_bento(packable.home, "agent:v1")
