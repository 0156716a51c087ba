"""`loopwright up` and `deploy`: run the platform's services, and register its scheduled flows with Prefect."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from components.config.params import InputError
from components.config.paths import Paths, find_root
from loopwright.output import Json, print_json, print_table, say

if TYPE_CHECKING:
    from components.runtime.supervisor import SupervisedService, Supervisor

_TICK_SECONDS = 0.2
Port = Annotated[int, typer.Option(min=1, max=65535)]


def up(
    endpoint_port: Port = 3000,
    prefect_port: Port = 4200,
    mlflow_port: Port = 5000,
    deploy: Annotated[bool, typer.Option(help="Register the scheduled deployments.")] = True,
    as_json: Json = False,
) -> None:
    """Start MLflow, Prefect, a worker and the endpoint; supervise them until Ctrl-C; a second one ends all at once."""
    paths = Paths(find_root())
    os.chdir(paths.root)
    os.environ["LOOPWRIGHT_HOME"] = str(paths.home)
    paths.home.mkdir(parents=True, exist_ok=True)
    stop_requested = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop_requested.set())
    ports = {"endpoint": endpoint_port, "prefect": prefect_port, "mlflow": mlflow_port}

    from components.runtime.process import file_lock
    from components.runtime.service_registry import LOCK, publish, unregister
    from components.runtime.supervisor import Supervisor
    from flows.orchestration.services import platform

    with file_lock(paths.home, LOCK):
        _check_ports(ports)
        for folder in ("prefect", "logs"):
            (paths.home / folder).mkdir(exist_ok=True)
        services = platform(paths.home, ports, deploy)
        addresses = {service.name: service.address for service in services if service.address}
        states: dict[str, str] = {}

        def report_change(entry: SupervisedService) -> None:
            states[entry.service.name] = _describe(entry)
            say(f"{entry.service.name:<9} {states[entry.service.name]}")
            with suppress(InputError):  # a full disk: `status` then shows the state before
                publish(paths.home, addresses, states)

        supervisor = Supervisor(services, paths.home / "logs", paths.root, report_change)
        publish(paths.home, addresses)
        try:
            _supervise(supervisor, stop_requested, as_json)
        finally:
            started = time.monotonic()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                supervisor.stop()  # the endpoint finishes its answers
            except KeyboardInterrupt:
                supervisor.stop(0)
            unregister(paths.home)
            say(f"stopped in {time.monotonic() - started:.1f} s")


def deploy(as_json: Json = False) -> None:
    """Register the deployments of prefect.yaml on the server of `up`, or the one PREFECT_API_URL names."""
    paths = Paths(find_root())
    from components.runtime.service_registry import running
    from flows.orchestration.prefect_server import Api, client_settings

    url = os.environ.get("PREFECT_API_URL") or running(paths.home).get("prefect")
    if url is None:
        raise InputError('PREFECT_API_URL: not set, and no platform runs; start "loopwright up", which deploys itself')
    (paths.home / "prefect").mkdir(parents=True, exist_ok=True)
    for variable, value in client_settings(paths.home, url).items():
        os.environ.setdefault(variable, value)
    Api(url, paths.home / "logs" / "prefect.log", None, None).wait()
    from flows.orchestration.deploy import register

    rows = register(paths.root)
    if as_json:
        print_json({"server": url, "deployments": rows})
    else:
        print_table(("deployment", "pool", "cron", "event"), [tuple(row.values()) for row in rows])


def _supervise(supervisor: Supervisor, stop_requested: threading.Event, as_json: bool) -> None:
    """Supervise the services until a stop is requested; report once when all that can run are healthy."""
    started, reported = time.monotonic(), False
    while not stop_requested.is_set():
        supervisor.tick()
        waiting = [entry for entry in supervisor.supervised if entry.state != "healthy"]
        # Only the endpoint may wait for longer: for a champion.
        ready = all(entry.service.name == "endpoint" and entry.reported_waiting for entry in waiting)
        if ready and not reported:
            reported = True
            seconds = time.monotonic() - started
            if as_json:
                print_json(_report(supervisor, seconds))
                sys.stdout.flush()
            say(f"up in {seconds:.1f} s; Ctrl-C stops everything")
        stop_requested.wait(_TICK_SECONDS)


def _report(supervisor: Supervisor, seconds: float) -> dict[str, Any]:
    rows = [
        {
            "name": entry.service.name,
            "state": entry.state,
            "address": entry.service.address or None,
            "pid": entry.process.pid if entry.process else None,
            "log": str(entry.log),
        }
        for entry in supervisor.supervised
    ]
    return {"services": rows, "seconds": round(seconds, 1), "pid": os.getpid()}


def _describe(entry: SupervisedService) -> str:
    """A service's state in a line."""
    pause = f"restarts in {max(0.0, entry.next_start - time.monotonic()):.0f} s; see {entry.log}"
    details = {
        "healthy": f"healthy  {entry.service.address.removesuffix('/api')}{entry.service.hint}".rstrip(),
        "hung": f"not responding; killed; see {entry.log}",
        "waiting": f"waits for {entry.service.waits_for}",
        "backing off": f"exited; {pause}",
        "crash loop": f"crash loop: {entry.crashes} quick exits in a row; {pause}",
    }
    return details.get(entry.state, entry.state)


def _check_ports(ports: dict[str, int]) -> None:
    variables = {"prefect": "PREFECT_API_URL", "mlflow": "MLFLOW_TRACKING_URI"}
    for name, port in ports.items():
        if variables.get(name, "") in os.environ:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                option = f"--{name}-port"
                raise InputError(
                    f"{option}: {port}: {error.strerror}; stop what listens there or choose another"
                ) from None
