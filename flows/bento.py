"""A registered model as a Bento that serves itself: built with the code and the weights, and tried over HTTP."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import chdir
from pathlib import Path

from components.config.params import InputError, load_params
from components.config.paths import Paths
from components.runtime.process import ask_to_die_with_parent
from components.runtime.service_registry import answers
from components.tracking.registry import Registry
from flows.orchestration.prefect_server import free_port, stop
from flows.release_targets import SmokeProbe

_SECONDS_TO_SERVE = 180.0
_IN_A_BENTO = (
    "/components/",
    "/examples/",
    "/serving/",
    "/loopwright/__init__.py",
    "/params.yaml",
    "/dvc.yaml",
    "/requirements.lock",
)


def package(paths: Paths, wanted: str) -> str:
    """Build the Bento of a registered version, weights included, and return its tag; an older build is replaced.

    Raises: InputError when another model's tag would be the same, for BentoML writes tags in small letters.
    """
    registry = Registry(paths.home)
    version = registry.resolve(wanted)
    name = version.name.lower()
    if twins := [other for other in registry.names() if other.lower() == name and other != version.name]:
        raise InputError(
            f"{version}: BentoML tells no capitals apart, and there is {twins[0]} too; import it under another name"
        )
    os.environ.update(_bento_environment(paths.home))
    import bentoml

    tag = f"{name}:v{version.version}"
    for store in (bentoml.bentos, bentoml.models):
        if any(str(kept.tag) == tag for kept in store.list()):
            store.delete(tag)
    facts = {"name": version.name, "version": version.version, "run_id": version.run_id}
    with bentoml.models.create(tag, metadata={**facts, "tags": version.tags, "metrics": version.metrics}) as weights:
        shutil.copytree(version.folder, weights.path, dirs_exist_ok=True)
    # BentoML takes paths relative to the current folder only.
    with chdir(paths.root):
        bento = bentoml.build(
            "serving.service:endpoint",
            name=name,
            version=f"v{version.version}",
            labels={"model": str(version), "run_id": version.run_id},
            include=[*_IN_A_BENTO, f"/{load_params(paths.params).project_path}"],
            python={"requirements_txt": "requirements.lock", "lock_packages": False},
            models=[tag],
            args={"weights": tag},
        )
    return str(bento.tag)


def smoke(paths: Paths, tag: str, asking: SmokeProbe, question: str) -> str:
    """Serve a built Bento on a free port, ask it a question over HTTP, and return the answer.

    Raises: RuntimeError with the server's log when it does not answer.
    """
    import httpx

    address = f"http://127.0.0.1:{(port := free_port())}"
    log = paths.home / "logs" / "smoke.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    # A state folder of its own: this question is no customer's.
    with tempfile.TemporaryDirectory() as scratch, log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "bentoml", "serve", tag, "--host", "127.0.0.1", "--port", str(port)],
            env={**os.environ, **_bento_environment(paths.home), "LOOPWRIGHT_HOME": scratch, "LOOPWRIGHT_API_KEYS": ""},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=ask_to_die_with_parent,
        )
        try:
            _wait_until_ready(f"{address}/readyz", process, log)
            asked = asking.body(question)
            reply = httpx.post(f"{address}{asking.path}", json=asked, timeout=120).raise_for_status().json()
        finally:
            stop(process)
    return asking.answer(reply)


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _SECONDS_TO_SERVE
    while process.poll() is None and time.monotonic() < deadline:
        if answers(url):
            return
        time.sleep(0.2)
    raise RuntimeError(f"the served Bento was not ready; {log} ends:\n{log.read_text(errors='replace')[-2000:]}")


def _bento_environment(home: Path) -> dict[str, str]:
    (home / "bento").mkdir(parents=True, exist_ok=True)
    return {"BENTOML_HOME": str(home / "bento"), "BENTOML_DO_NOT_TRACK": "true"}


def has_bento(home: Path, tag: str) -> bool:
    name, _, version = tag.partition(":")
    return bool(version) and (home / "bento" / "bentos" / name / version / "bento.yaml").exists()
