"""Faults that really happen, and the alert of each: `python -m benchmarks.alerts [--quiet MINUTES]`.

Each fault happens to an endpoint of its own, with a tiny random model, a registry, a database, some requests, and a
Prometheus that scrapes it and evaluates `deploy/alerts.yaml` every five seconds. Prints after how many seconds the
fault's alert fires, and which others do within two minutes. With `--quiet`, nothing happens instead for as long: the
schedules succeed, a request comes every ten seconds, and no alert may fire. Needs Prometheus, the server programs of
PostgreSQL and the extra `postgres`, and root for the faults of disk and memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.postgres_server import PostgresServer
from benchmarks.replicas import Endpoint
from benchmarks.slow_clients import make_model
from components.feedback.store import record_success
from components.runtime.service_registry import wait_for
from flows.orchestration.prefect_server import free_port

ROOT = Path(__file__).parent.parent
SECONDS = 5
"""Between scrapes, and between evaluations of the rules."""
HEALTHY_SECONDS = 30.0
"""Before a fault, so that its series are known."""
LIMIT_SECONDS = 120.0
"""Time within which a fault's alert has to fire."""
RESTART_SECONDS = 5.0
"""RestartSec of deploy/systemd."""
SCHEDULES = ("ingest", "monitor", "pipeline", "improve")
CGROUPS = Path("/sys/fs/cgroup")
_registering = threading.Lock()


@dataclass
class Site:
    """An endpoint with its state folder, and the Prometheus that watches it."""

    folder: Path
    stack: ExitStack
    """What ends with it, the last first."""
    database: PostgresServer | None
    wrapper: Sequence[str] = ()
    """Words before the endpoint's command."""
    key: str = ""
    over: threading.Event = field(default_factory=threading.Event)
    statuses: Counter[int] = field(default_factory=Counter)
    """Of the responses; 0: none."""

    def __post_init__(self) -> None:
        self.home = self.folder / "var"
        self.database_url = self.database.url if self.database else f"sqlite:///{self.home / 'feedback.db'}"
        self._client = httpx.Client(timeout=60, trust_env=False, limits=httpx.Limits(max_connections=None))

    @property
    def postgres(self) -> PostgresServer:
        assert self.database is not None
        return self.database

    def start(self) -> None:
        self.endpoint = Endpoint(self.folder, self.database_url, self.wrapper)
        self.stack.callback(self.endpoint.stop, signal.SIGKILL)  # which ends one that hangs, too
        self.endpoint.wait()
        self.address = f"http://127.0.0.1:{self.endpoint.port}"
        self._prometheus = self.stack.enter_context(prometheus(self.endpoint.port, self.folder))

    def post(self, path: str, body: Mapping[str, Any], key: str = "") -> Any:
        """The response's document; None without a response."""
        headers = {"Authorization": f"Bearer {key or self.key}"} if key or self.key else {}
        try:
            response = self._client.post(f"{self.address}{path}", json=body, headers=headers)
        except httpx.HTTPError:
            self.statuses[0] += 1
            return None
        self.statuses[response.status_code] += 1
        return response.json()

    def chat(self, tokens: int = 4, key: str = "") -> Any:
        messages = [{"role": "user", "content": "Hello"}]
        return self.post("/v1/chat/completions", {"messages": messages, "max_tokens": tokens}, key)

    def repeat(self, pause: float, action: Callable[[], Any], threads: int = 1) -> None:
        """Call it on threads of its own until the trial is over."""

        def run() -> None:
            while not self.over.wait(pause):
                action()

        for _ in range(threads):
            threading.Thread(target=run, daemon=True).start()

    def query(self, expression: str) -> dict[str, float]:
        """The values of Prometheus' instant query, by their label `alertname`."""
        response = httpx.get(f"{self._prometheus}/api/v1/query", params={"query": expression}, trust_env=False)
        rows = response.raise_for_status().json()["data"]["result"]
        return {row["metric"].get("alertname", ""): float(row["value"][1]) for row in rows}

    def firing(self) -> Counter[str]:
        """How many alerts of each name fire now."""
        response = httpx.get(f"{self._prometheus}/api/v1/alerts", trust_env=False)
        alerts = response.raise_for_status().json()["data"]["alerts"]
        return Counter(alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing")

    def fired(self) -> list[str]:
        """The alerts that have fired since the start."""
        return sorted(self.query('count by (alertname) (count_over_time(ALERTS{alertstate="firing"}[1d]))'))


@contextmanager
def prometheus(port: int, folder: Path) -> Iterator[str]:
    """The address of a Prometheus that scrapes an endpoint and evaluates the rules of `deploy/`."""
    every = f"{SECONDS}s"
    configuration = {
        "global": {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every},
        "rule_files": [str(ROOT / "deploy" / "alerts.yaml")],
        "scrape_configs": [{"job_name": "loopwright", "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}],
    }
    own = f"127.0.0.1:{free_port()}"
    (folder / "prometheus.yml").write_text(json.dumps(configuration), encoding="utf-8")  # JSON is YAML
    files = ["--config.file=prometheus.yml", "--storage.tsdb.path=prometheus"]  # Debian's default is one for all
    with (folder / "prometheus.log").open("wb") as log:
        command = ["prometheus", *files, f"--web.listen-address={own}"]
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        if not wait_for(f"http://{own}/-/ready", 60.0):
            raise RuntimeError(f"Prometheus does not start: {(folder / 'prometheus.log').read_text()}")
        yield f"http://{own}"
    finally:
        process.kill()
        process.wait()


def register(site: Site, folder: Path) -> Any:
    """A new version of `agent`."""
    from components.tracking.registry import Registry

    with _registering:
        return Registry(site.home).register(folder, "agent", {}, {}, None)


def lose_model(site: Site) -> None:
    """The champion's files are gone when the endpoint starts again, and its supervisor starts it on and on."""
    from components.tracking.registry import Registry

    shutil.rmtree(Registry(site.home).resolve("agent@champion").stored)
    site.endpoint.process.kill()

    def start_again() -> None:
        while not site.over.wait(0.2):
            if site.endpoint.process.poll() is not None and not site.over.wait(RESTART_SECONDS):
                site.endpoint.restart(signal.SIGKILL)

    thread = threading.Thread(target=start_again)
    thread.start()
    site.stack.callback(thread.join)
    site.stack.callback(site.over.set)


def freeze_database(site: Site) -> None:
    """PostgreSQL's machine hangs: connections are accepted, nothing is answered, and people vote on."""
    site.stack.callback(site.postgres.resume)
    site.postgres.suspend()
    vote = {"completion_id": "chatcmpl-1", "rating": "up"}
    site.repeat(1.0, lambda: site.post("/v1/feedback", vote), 50)


def lose_table(site: Site) -> None:
    """Somebody has restored a part of the database."""
    import psycopg

    with psycopg.connect(site.database_url) as connection:
        connection.execute("ALTER TABLE answers RENAME TO answers_before")


def clients(count: int, pause: float) -> Callable[[Site], None]:
    """So many clients ask for long answers on and on."""
    return lambda site: site.repeat(pause, lambda: site.chat(200), count)


def create_key(site: Site) -> None:
    from components.feedback.store import Store

    with closing(Store(site.database_url)) as store:
        _, site.key = store.create_key("clients", ["predict"], 10**6)


def guess_keys(site: Site) -> None:
    site.repeat(0.2, lambda: site.chat(key="guess"))


def promote_broken(site: Site) -> None:
    """A version whose weights were damaged on disk is promoted on MLflow's page, which does not check them."""
    from components.tracking.registry import Registry

    registry = Registry(site.home)
    broken = max(registry.versions("agent"), key=lambda version: version.version)
    with (broken.stored / "model.safetensors").open("r+b") as weights:
        weights.truncate(100)
    registry.client.set_registered_model_alias("agent", "champion", str(broken.version))


def age_vote(site: Site) -> None:
    """The worker that ingests votes has been away for two hours."""
    answer = site.chat()
    site.post("/v1/feedback", {"completion_id": answer["id"], "rating": "up"})
    with closing(sqlite3.connect(site.home / "feedback.db")) as connection, connection:
        connection.execute("UPDATE feedback SET created = created - 7200")


def age_successes(*flows: str) -> Callable[[Site], None]:
    """These flows last succeeded nine days ago."""

    def inject(site: Site) -> None:
        with closing(sqlite3.connect(site.home / "feedback.db")) as connection, connection:
            for flow in flows:
                connection.execute("UPDATE schedules SET succeeded = succeeded - 777600 WHERE flow = ?", (flow,))

    return inject


def mount_disk(site: Site) -> None:
    """Put the state folder on a small disk of its own."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "loopwright", str(site.home)], check=True)
    site.stack.callback(subprocess.run, ["umount", "--lazy", str(site.home)], check=True)


def fill_disk(site: Site) -> None:
    """Until a twentieth is free."""
    disk = shutil.disk_usage(site.home)
    (site.home / "other").write_bytes(bytes(disk.free - disk.total // 20))


def cgroup(site: Site) -> tuple[Path, Path]:
    """The control group of a site's endpoint, and that which all are in (version 1 of control groups, or 2)."""
    above = CGROUPS / "memory" if (CGROUPS / "memory").is_dir() else CGROUPS
    return above / f"loopwright-{site.folder.parent.name}", above


def limit_memory(site: Site) -> None:
    """Run the endpoint in a control group which it sees as the only one, as a container's process does."""
    group, above = cgroup(site)
    group.mkdir()
    site.stack.callback(group.rmdir)
    script = 'echo $$ > "$1/cgroup.procs" && mount --bind "$1" "$2" && shift 2 && exec "$@"'
    site.wrapper = ["unshare", "--mount", "sh", "-c", script, "sh", str(group), str(above)]


def take_memory(site: Site) -> None:
    """The endpoint has 95 % of its container's memory."""
    group, above = cgroup(site)
    limit = group / ("memory.max" if above == CGROUPS else "memory.limit_in_bytes")
    limit.write_text(str(round(psutil.Process(site.endpoint.process.pid).memory_info().rss / 0.95)))


@dataclass(frozen=True)
class Fault:
    alert: str
    """Of `deploy/alerts.yaml`."""
    what: str
    inject: Callable[[Site], None]
    prepare: Callable[[Site], None] = lambda site: None
    """Called before the endpoint starts."""
    serve: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the endpoint."""
    on_postgres: bool = False
    alerts: int = 1
    """How many have to fire."""


ONE_SLOT = {"max_running": 1, "max_waiting": 256}
FAULTS = [
    Fault("EndpointDown", "kill the endpoint", lambda site: site.endpoint.process.kill()),
    Fault("EndpointDown", "stop its process", lambda site: site.endpoint.process.send_signal(signal.SIGSTOP)),
    Fault("EndpointNotReady", "lose the champion's files, crash loop", lose_model),
    Fault("StoreUnavailable", "stop PostgreSQL", lambda site: site.postgres.stop(), on_postgres=True),
    Fault("StoreUnavailable", "PostgreSQL hangs", freeze_database, on_postgres=True),
    Fault("ServerErrors", "lose a table", lose_table, on_postgres=True),
    Fault("SlowFirstText", "100 clients with one slot", clients(100, 0.0), serve=ONE_SLOT),
    Fault("QueueFull", "12 clients with one slot, 8 waiting", clients(12, 0.1), serve={**ONE_SLOT, "max_waiting": 8}),
    Fault("KeysRefused", "a wrong key 5 times a second", guess_keys, create_key),
    Fault("VersionRefused", "promote a damaged version", promote_broken),
    Fault("IngestLate", "a vote of two hours ago", age_vote),
    Fault("ScheduleLate", "no schedule succeeds", age_successes(*SCHEDULES), alerts=len(SCHEDULES)),
    Fault("BackupLate", "no backup succeeds", age_successes("backup")),
    Fault("DiskLow", "fill the disk to 95 %", fill_disk, mount_disk),
    Fault("MemoryLow", "95 % of the container's memory", take_memory, limit_memory),
]
NEEDS_ROOT = ("DiskLow", "MemoryLow")


@contextmanager
def healthy(fault: Fault, model: Path, folder: Path) -> Iterator[Site]:
    """A site to which a fault is to happen."""
    from components.runtime.params_file import write_params
    from components.tracking.registry import Registry

    folder.mkdir()
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, folder)
    settings = {f"serve.{key}": value for key, value in fault.serve.items()}
    write_params(folder / "params.yaml", settings, lambda line: None)
    with ExitStack() as stack:
        site = Site(folder, stack, PostgresServer() if fault.on_postgres else None)
        if fault.on_postgres:
            stack.callback(site.postgres.close)
        site.home.mkdir()
        fault.prepare(site)
        champion = register(site, model)
        if fault.alert == "VersionRefused":
            register(site, model)
        Registry(site.home).promote(champion)
        for flow in (*SCHEDULES, "backup"):
            record_success(site.home, flow)
        site.start()
        stack.callback(site.over.set)
        yield site


def trial(fault: Fault, model: Path, folder: Path) -> dict[str, Any]:
    """Let a fault happen; `seconds` is null where its alert does not fire in time."""
    row: dict[str, Any] = {"alert": fault.alert, "fault": fault.what}
    if fault.alert in NEEDS_ROOT and os.geteuid():
        return {**row, "seconds": "needs root"}
    row["seconds"] = None
    with healthy(fault, model, folder) as site:
        site.repeat(2.0, site.chat)
        time.sleep(HEALTHY_SECONDS)
        before, began = site.fired(), time.monotonic()
        fault.inject(site)
        while (elapsed := time.monotonic() - began) <= LIMIT_SECONDS:
            if row["seconds"] is None and site.firing()[fault.alert] >= fault.alerts:
                row["seconds"] = round(elapsed, 1)
            time.sleep(1.0)
        others = [alert for alert in site.fired() if alert != fault.alert]
    return {**row, "others": others, "before": before, "statuses": dict(site.statuses)}


def result(fault: Fault, model: Path, folder: Path) -> dict[str, Any]:
    """That of a trial, or the error which ended it."""
    try:
        return trial(fault, model, folder)
    except Exception as error:  # noqa: BLE001 - the other faults happen all the same
        return {"alert": fault.alert, "fault": fault.what, "seconds": None, "error": repr(error)}


def quiet(minutes: float, model: Path, folder: Path) -> dict[str, Any]:
    """Let nothing happen."""
    with healthy(Fault("", "", lambda site: None), model, folder) as site:
        site.repeat(10.0, site.chat)
        site.repeat(900.0, lambda: record_success(site.home, "ingest"))
        time.sleep(minutes * 60)
        scrapes = site.query("sum(count_over_time(up[1d]))")[""]
        failed = scrapes - site.query("sum(sum_over_time(up[1d]))")[""]
        fired = site.fired()
    scraped = {"scrapes": int(scrapes), "failed scrapes": int(failed)}
    return {"quiet minutes": minutes, "alerts": fired, "statuses": dict(site.statuses), **scraped}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.alerts", description=__doc__)
    parser.add_argument("--quiet", type=float, metavar="MINUTES", help="let no fault happen for so long")
    parser.add_argument("--alert", action="append", help="only the faults of this alert; repeatable")
    parser.add_argument("--jobs", type=int, default=4, help="faults at once")
    arguments = parser.parse_args()
    chosen = [fault for fault in FAULTS if not arguments.alert or fault.alert in arguments.alert]
    with tempfile.TemporaryDirectory(prefix="alerts-", ignore_cleanup_errors=True) as scratch:
        model = make_model(Path(scratch))
        if arguments.quiet:
            print(json.dumps(row := quiet(arguments.quiet, model, Path(scratch) / "quiet")), flush=True)
            sys.exit(bool(row["alerts"]))
        folders = [Path(scratch) / str(number) for number in range(len(chosen))]
        with ThreadPoolExecutor(arguments.jobs) as pool:
            trials = [pool.submit(result, fault, model, folder) for fault, folder in zip(chosen, folders, strict=True)]
            for done in as_completed(trials):
                print(json.dumps(done.result()), flush=True)
        sys.exit(any(done.result()["seconds"] is None or done.result().get("before") for done in trials))


if __name__ == "__main__":
    main()
