"""A PostgreSQL server for tests and benchmarks, made from the installed programs; as root it runs as `postgres`."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from flows.orchestration.prefect_server import free_port

ACCOUNT = "postgres"


def programs() -> Path | None:
    """The folder with initdb and pg_ctl; None where PostgreSQL's server is not installed."""
    if initdb := shutil.which("initdb"):
        return Path(initdb).parent
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=None, key=lambda path: int(path.parent.name))


class PostgresServer:
    """A server with one empty database, on a port of its own, until it is closed."""

    def __init__(self) -> None:
        folder = programs()
        if folder is None:
            raise RuntimeError("initdb: not found; install PostgreSQL's server (apt-get install postgresql)")
        self._programs, self._data = folder, Path(tempfile.mkdtemp(prefix="postgres-"))
        self._account: dict[str, Any] = {}
        if os.geteuid() == 0:
            self._account = {"user": ACCOUNT, "group": ACCOUNT, "extra_groups": []}
            shutil.chown(self._data, ACCOUNT, ACCOUNT)
        self.port = free_port()
        self.url = f"postgresql://loopwright@127.0.0.1:{self.port}/postgres"
        self._run("initdb", "--pgdata", str(self._data), "--username", "loopwright", "--auth", "trust")
        with (self._data / "postgresql.conf").open("a") as settings:
            settings.write(f"port = {self.port}\nunix_socket_directories = '{self._data}'\nmax_connections = 200\n")
        self.start()

    def start(self) -> None:
        self._run("pg_ctl", "start", "--wait", "--pgdata", str(self._data), "--log", str(self._data / "log"))

    def stop(self, mode: str = "fast") -> None:
        self._run("pg_ctl", "stop", "--wait", "--pgdata", str(self._data), "--mode", mode)

    def close(self) -> None:
        with suppress(subprocess.CalledProcessError):  # stopped already
            self.stop("immediate")
        shutil.rmtree(self._data)

    def _run(self, program: str, *words: str) -> None:
        command = [str(self._programs / program), *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=self._data, **self._account)
