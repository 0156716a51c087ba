"""How long the platform takes to start, and what it takes idle: `python -m benchmarks.startup`, in a released project.

`loopwright up` until all its services are healthy, on free ports; their memory (PSS, shared pages by share) after
`--idle` seconds without a request. Then the project's newest Bento of the agent, exported and imported into a store of
its own in another folder, from `bentoml serve` to the first answer.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from components.config.paths import find_root
from components.runtime.service_registry import wait_for
from flows.bento import bento_environment
from flows.orchestration.prefect_server import free_port

SECONDS = 300.0
QUESTION = {"messages": [{"role": "user", "content": "Hello"}]}


@contextmanager
def started(command: list[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process that gets a SIGINT at the end, as from a person, and is waited for."""
    with subprocess.Popen([sys.executable, "-m", *command], **options) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGINT)


def platform(idle: float) -> dict[str, Any]:
    ports = [word for name in ("endpoint", "prefect", "mlflow") for word in (f"--{name}-port", str(free_port()))]
    begun = time.monotonic()
    with started(["loopwright", "up", "--json", *ports], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline(), "not all services got healthy"
        seconds = round(time.monotonic() - begun, 1)
        time.sleep(idle)
        top = psutil.Process(process.pid)
        memory = sum(each.memory_full_info().pss for each in (top, *top.children(recursive=True)))
    return {"up_seconds": seconds, "idle_mib": round(memory / 2**20)}


def bento(root: Path) -> dict[str, Any]:
    home = Path(os.environ.get("LOOPWRIGHT_HOME", root / "var")).resolve()
    with tempfile.TemporaryDirectory() as scratch:
        file = f"{scratch}/agent.bento"
        bentoml = [sys.executable, "-m", "bentoml"]
        own = bento_environment(Path(scratch)) | {"LOOPWRIGHT_HOME": f"{scratch}/state"}
        for store, words in ((bento_environment(home), ["export", "agent:latest", file]), (own, ["import", file])):
            subprocess.run([*bentoml, *words], env=os.environ | store, check=True)
        port = free_port()
        address = f"http://127.0.0.1:{port}"
        words = ["bentoml", "serve", "agent:latest", "--host", "127.0.0.1", "--port", str(port)]
        begun = time.monotonic()
        with started(words, cwd=scratch, env=os.environ | own) as process:
            assert wait_for(f"{address}/readyz", SECONDS, process), "the Bento does not get ready"
            response = httpx.post(f"{address}/v1/chat/completions", json=QUESTION, timeout=60).raise_for_status()
            seconds = time.monotonic() - begun
    return {"bento_seconds": round(seconds, 1), "answer": response.json()["choices"][0]["message"]["content"]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    parser.add_argument("--idle", type=float, default=20.0, help="seconds before memory is read")
    arguments = parser.parse_args()
    print(json.dumps(platform(arguments.idle)), flush=True)
    print(json.dumps(bento(find_root())), flush=True)


if __name__ == "__main__":
    main()
