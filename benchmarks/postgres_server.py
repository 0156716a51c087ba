"""A PostgreSQL server for tests and benchmarks, made from the installed programs; as root it runs as `postgres`."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil

from components.runtime.process import request_parent_death_signal
from flows.orchestration.prefect_server import free_port

ACCOUNT = "postgres"
USER, PASSWORD = "loopwright", "p@ss:word/of-tests"
"""In a URL the password has to be quoted."""
SECONDS_TO_START = 60.0


def programs() -> Path | None:
    """The folder with PostgreSQL's server programs; None where they are not installed."""
    if initdb := shutil.which("initdb"):
        return Path(initdb).resolve().parent
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=None, key=lambda path: int(path.parent.name))


class PostgresServer:
    """A server with a password and one empty database, on a port of its own, until it is closed.

    It does not wait for the disk: what it wrote outlives its own crash, not the machine's.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        folder = programs()
        if folder is None:
            raise RuntimeError("initdb: not found; install PostgreSQL's server (apt-get install postgresql)")
        self._programs, self._root = folder, Path(tempfile.mkdtemp(prefix="loopwright-postgres-"))
        self._data, password = self._root / "data", self._root / "password"
        password.write_text(PASSWORD)
        # It refuses to run as root.
        self._account: dict[str, Any] = {}
        if os.geteuid() == 0:
            self._account = {"user": ACCOUNT, "group": ACCOUNT, "extra_groups": []}
            for path in (password, self._root):
                shutil.chown(path, ACCOUNT, ACCOUNT)
        self._host, self._port = host, free_port()
        self.url = f"postgresql://{USER}:{quote(PASSWORD, safe='')}@{host}:{self._port}/postgres"
        sign_in = ["--username", USER, "--auth", "scram-sha-256", "--pwfile", str(password)]
        self._run("initdb", "--pgdata", str(self._data), "--encoding", "UTF8", "--no-sync", *sign_in)
        with (self._data / "pg_hba.conf").open("a") as clients:
            clients.write("host all all all scram-sha-256\n")
        self.start()

    def start(self) -> None:
        """Returns once it accepts connections."""
        options = {"listen_addresses": self._host, "port": self._port, "unix_socket_directories": "", "fsync": "off"}
        words = [
            word for name, value in {**options, "max_connections": 200}.items() for word in ("-c", f"{name}={value}")
        ]
        with (self._root / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(self._programs / "postgres"), "-D", str(self._data), *words],
                stdout=log,
                stderr=log,
                cwd=self._root,
                preexec_fn=request_parent_death_signal,
                **self._account,
            )
        deadline = time.monotonic() + SECONDS_TO_START
        while self._run("pg_isready", "--host", self._host, "--port", str(self._port), check=False):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL does not start: {(self._root / 'log').read_text()[-3000:]}")
            time.sleep(0.05)

    def stop(self, mode: str = "fast") -> None:
        """`fast` disconnects the clients and writes what is in memory; `immediate` is as a crash."""
        self._process.send_signal(signal.SIGINT if mode == "fast" else signal.SIGQUIT)
        self._process.wait(60)

    def suspend(self) -> None:
        """From now on connections are accepted and nothing is answered, as by a machine that hangs."""
        for process in self._processes():
            process.suspend()

    def resume(self) -> None:
        for process in self._processes():
            process.resume()

    def _processes(self) -> list[psutil.Process]:
        server = psutil.Process(self._process.pid)
        return [server, *server.children(recursive=True)]

    def close(self) -> None:
        self.stop("immediate")
        shutil.rmtree(self._root)

    def _run(self, program: str, *words: str, check: bool = True) -> int:
        command = [str(self._programs / program), *words]
        return subprocess.run(
            command, check=check, stdout=subprocess.DEVNULL, cwd=self._root, **self._account
        ).returncode
