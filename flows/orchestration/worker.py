"""The worker of `loopwright up`: waits for Prefect's server, registers the deployments, executes flow runs."""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from components.config.paths import Paths, find_root
from components.runtime.files import keep_private, write_text
from components.runtime.process import RUN_PID, end_with_parent
from components.runtime.service_registry import bypass_proxies_for_loopback, running
from flows.orchestration.prefect_server import Api, client_settings, mark_crashed_runs
from flows.orchestration.services import HEALTH_FILE

if TYPE_CHECKING:
    from prefect.workers.process import ProcessWorker


def main() -> None:
    """Run until a signal comes."""
    parser = argparse.ArgumentParser(prog="python -m flows.orchestration.worker", description=main.__doc__)
    parser.add_argument("--no-deploy", action="store_true")
    options = parser.parse_args()
    end_with_parent()
    bypass_proxies_for_loopback()
    root = find_root()
    os.chdir(root)  # where its flow runs start
    keep_private(Paths(root))
    home = Paths(root).home
    (home / HEALTH_FILE).unlink(missing_ok=True)
    for variable, value in client_settings(home, os.environ["PREFECT_API_URL"]).items():
        os.environ.setdefault(variable, value)
    # Flow runs end with the worker, also when it is killed while they still import, and with its own parent.
    os.environ[RUN_PID] = " ".join(str(pid) for pid in (os.getpid(), os.getppid()) if pid)
    from prefect.workers.process import ProcessWorker

    from flows.orchestration.deploy import POOLS, has_cuda_device, register

    url = Api(os.environ["PREFECT_API_URL"], home / "logs" / "prefect.log", None, None).wait(seconds=180)
    mark_crashed_runs(home, own_server=running(home).get("prefect") == url)
    if not options.no_deploy:
        register(root)
    pools = POOLS if has_cuda_device() else POOLS[:1]
    workers = [ProcessWorker(work_pool_name=pool, name=f"loopwright-{pool}") for pool in pools]
    asyncio.run(_work(workers, home / HEALTH_FILE))


async def _work(workers: Sequence[ProcessWorker], ready: Path) -> None:
    write_text(ready, str(os.getpid()))
    await asyncio.gather(*(worker.start() for worker in workers))


if __name__ == "__main__":
    main()
