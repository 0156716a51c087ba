"""Servers that tests start: PostgreSQL, an S3 API, MLflow with accounts on both, Prefect; and a proxy with faults."""

from __future__ import annotations

import logging
import re
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import fsspec
import pytest
from sqlalchemy import create_engine
from sqlalchemy.engine import make_url

from benchmarks.postgres_server import PASSWORD, USER, PostgresServer, programs
from components.runtime.process import start, stop
from components.runtime.service_registry import wait_for
from flows.orchestration.prefect_server import free_port, settings

BUCKETS = ("mlflow", "dvc")
SECONDS_TO_START = 300.0


@contextmanager
def postgres_server(host: str = "127.0.0.1") -> Iterator[PostgresServer]:
    """A PostgreSQL server of the test's own."""
    if programs() is None:
        pytest.skip("PostgreSQL is not installed; apt-get install postgresql, or set LOOPWRIGHT_TEST_POSTGRES")
    pytest.importorskip("psycopg", reason='PostgreSQL\'s driver is not installed; pip install "loopwright[postgres]"')
    with closing(PostgresServer(host)) as server:
        yield server


def execute(address: str, statement: str) -> None:
    engine = create_engine(make_url(address).set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(statement)
    engine.dispose()


def new_database(address: str, name: str) -> str:
    """Create a database on the server of this address, and return its address."""
    execute(address, f"CREATE DATABASE {name}")
    return re.sub(r"/\w+$", f"/{name}", address)


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """An S3 API with the buckets `BUCKETS`; yields the environment variables by which clients find it and sign in."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line per request
    server = ThreadedMotoServer("127.0.0.1", free_port(), verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    keys = {"AWS_ACCESS_KEY_ID": USER, "AWS_SECRET_ACCESS_KEY": PASSWORD, "AWS_DEFAULT_REGION": "us-east-1"}
    client = boto3.client("s3", "us-east-1", endpoint_url=url, aws_access_key_id=USER, aws_secret_access_key=PASSWORD)
    for bucket in BUCKETS:
        client.create_bucket(Bucket=bucket)
    client.close()
    try:
        yield {**keys, "AWS_ENDPOINT_URL": url, "MLFLOW_S3_ENDPOINT_URL": url}
    finally:
        server.stop()
        with suppress(ImportError):  # clients are kept for a process: the next server has another address
            fsspec.get_filesystem_class("s3").clear_instance_cache()


@contextmanager
def mlflow_server(folder: Path, postgres: str, s3: Mapping[str, str], host: str = "127.0.0.1") -> Iterator[str]:
    """An MLflow server with accounts, on PostgreSQL and S3; yields its address."""
    driver = "postgresql+psycopg://"
    tables, accounts = (
        new_database(postgres, name).replace("postgresql://", driver) for name in ("mlflow", "mlflow_accounts")
    )
    # MLflow reads the file with interpolation: a percent sign is doubled.
    (folder / "accounts.ini").write_text(
        "[mlflow]\ndefault_permission = NO_PERMISSIONS\n"
        f"database_uri = {accounts.replace('%', '%%')}\nadmin_username = {USER}\n"
        f"admin_password = {PASSWORD}\n"
        "auth_cache_ttl_seconds = 60\n"  # else it computes a password hash for each of some 200 files of a version
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    port = free_port()  # of loopback; another address has it free as well
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    command += ["--allowed-hosts", f"{host}:*"]
    command += ["--backend-store-uri", tables, "--artifacts-destination", "s3://mlflow", "--app-name", "basic-auth"]
    environment = {
        **s3,
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "accounts.ini"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "a key of the tests",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    with running(command, folder / "mlflow.log", environment, f"http://{host}:{port}/health"):
        yield f"http://{host}:{port}"


@contextmanager
def prefect_server(folder: Path, postgres: str) -> Iterator[dict[str, str]]:
    """A Prefect server with a password, on PostgreSQL; yields the environment variables of its clients."""
    port = free_port()
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    (folder / "prefect").mkdir()
    database = new_database(postgres, "prefect").replace("postgresql://", "postgresql+asyncpg://")
    environment = {
        **settings(folder),
        "PREFECT_API_DATABASE_CONNECTION_URL": database,
        "PREFECT_SERVER_API_AUTH_STRING": f"{USER}:{PASSWORD}",
    }
    url = f"http://127.0.0.1:{port}/api"
    with running(command, folder / "prefect.log", environment, f"{url}/health"):
        yield {"PREFECT_API_URL": url, "PREFECT_API_AUTH_STRING": f"{USER}:{PASSWORD}"}


@contextmanager
def running(command: list[str], log: Path, environment: Mapping[str, str], health: str) -> Iterator[None]:
    with log.open("wb") as file:
        process = start(command, file, environment)
    try:
        assert wait_for(health, SECONDS_TO_START, process), log.read_text()[-3000:]
        yield
    finally:
        stop(process)


class FaultyProxy:
    """A TCP proxy before a server of this machine, which breaks connections where it is told to."""

    def __init__(self, address: str) -> None:
        self._target = int(address.rpartition(":")[2])
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.faults: list[tuple[bytes, int]] = []
        """Of the next request that contains these bytes, the response is cut after so many bytes."""
        self.holds: list[tuple[bytes, float]] = []
        """The next request that contains these bytes waits here for so many seconds."""
        self.requests: list[bytes] = []
        """First line of each request."""
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                left: list[int] = []
                threading.Thread(target=self._send, args=(client, server, left), daemon=True).start()
                threading.Thread(target=self._receive, args=(client, server, left), daemon=True).start()

    def _send(self, client: socket.socket, server: socket.socket, left: list[int]) -> None:
        with suppress(OSError):
            while data := client.recv(65536):
                line = data.partition(b"\r\n")[0]
                if line.endswith(b"HTTP/1.1"):
                    self.requests.append(line)
                fault = next((fault for fault in self.faults if fault[0] in data), None)
                if fault:
                    self.faults.remove(fault)
                    left.append(fault[1])
                hold = next((hold for hold in self.holds if hold[0] in data), None)
                if hold:
                    self.holds.remove(hold)
                    threading.Event().wait(hold[1])
                server.sendall(data)
        self._end(client, server)

    def _receive(self, client: socket.socket, server: socket.socket, left: list[int]) -> None:
        with suppress(OSError):
            while data := server.recv(65536):
                if left:
                    data, left[0] = data[: left[0]], left[0] - len(data)
                client.sendall(data)
                if left and left[0] <= 0:
                    break
        self._end(client, server)

    @staticmethod
    def _end(*ends: socket.socket) -> None:
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
