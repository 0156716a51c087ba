"""Prefect's API during a run: the server that PREFECT_API_URL names, or a local server.

Not Prefect's ephemeral server, which starts slower, outlives its time-out and locks its database.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import UUID

from components.config.params import InputError
from components.config.secrets import hidden
from components.feedback.leases import LeaseHolder
from components.feedback.store import Store, is_shared, leased_in
from components.runtime.files import replace_file
from components.runtime.process import file_lock, host_id, lock_owner, start, stop
from components.runtime.service_registry import AUTH_FILE, AUTH_STRING, LOOPBACK, running, wait_for

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

_SECONDS_TO_START = 180.0
_SECONDS_TO_ANSWER = 10.0
_PATIENCE = 60.0
"""Longest answer of a busy server, seconds; also Prefect's own for each request of its clients."""
_LEASE = "flow-run "
"""Begin of the name of a flow run's lease."""
_BEGIN_SECONDS = 300.0
"""Longest time from a flow run's last state to its lease: its worker starts a process, which imports Prefect."""
_PAGE = 200
"""Flow runs that Prefect lists in one answer."""
_SETTINGS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    # A stage's output is printed by the flow, once; Prefect's own loggers write to its API.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
}


@dataclass(frozen=True)
class Api:
    """The address of Prefect's API; `process` of a local server that we started."""

    url: str
    log: Path
    process: subprocess.Popen[bytes] | None
    auth: str | None
    """What its clients sign in with; None: what PREFECT_API_AUTH_STRING says, if anything."""

    def wait(self, seconds: float = _SECONDS_TO_ANSWER) -> str:
        """Return the address once the server is healthy.

        Raises: InputError when the named server does not answer, RuntimeError when the local server does not.
        """
        allowed = _SECONDS_TO_START if self.process else seconds
        if wait_for(f"{self.url}/health", allowed, self.process, _PATIENCE):
            return self.url
        if self.process is None:
            raise InputError(
                f"PREFECT_API_URL: {hidden(self.url)}: no answer; start that server, or unset the variable"
            )
        raise RuntimeError(f"Prefect's server did not start; see {self.log}")

    @property
    def client(self) -> dict[Any, Any]:
        """Prefect's settings with which its clients reach this server."""
        from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL

        return {PREFECT_API_URL: self.url, **({PREFECT_API_AUTH_STRING: self.auth} if self.auth else {})}


def settings(home: Path) -> Mapping[str, str]:
    """Environment for Prefect: its data in the state folder, no telemetry, few logs."""
    return {"PREFECT_HOME": str(home / "prefect"), **_SETTINGS}


def server_settings(home: Path, port: int) -> Mapping[str, str]:
    """Environment for a server of ours: it answers who has the state folder's secret, and no page of another site.

    Prefect checks no Host header: a page that was rebound to this machine by DNS has no secret.
    """
    return {
        **settings(home),
        "PREFECT_SERVER_API_AUTH_STRING": auth_string(home),
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://127.0.0.1:{port},http://localhost:{port}",
    }


def client_settings(home: Path, url: str) -> Mapping[str, str]:
    """Environment for Prefect's clients: a server on this machine gets the state folder's secret.

    `PREFECT_API_AUTH_STRING` of the environment takes precedence.
    """
    is_named = "PREFECT_API_AUTH_STRING" in os.environ or urlsplit(url).hostname not in LOOPBACK
    return {**settings(home), "PREFECT_API_URL": url, **({} if is_named else {AUTH_STRING: auth_string(home)})}


def auth_string(home: Path, name: str = AUTH_FILE) -> str:
    """The secret of this state folder's servers of a kind, `admin:PASSWORD`; made at the first call."""
    path = home / name
    if not path.exists():
        with file_lock(home, name, patience=10.0):
            if not path.exists():
                line = f"admin:{secrets.token_urlsafe(24)}\n".encode()
                replace_file(path, lambda file: file.write(line), mode=0o600)
    return path.read_text(encoding="utf-8").strip()


@contextmanager
def prefect_api(home: Path) -> Iterator[Api]:
    """The API that PREFECT_API_URL or a running `up` names; else that of a local server, started for the block."""
    (home / "prefect").mkdir(parents=True, exist_ok=True)
    (home / "logs").mkdir(exist_ok=True)
    for variable, value in settings(home).items():
        os.environ.setdefault(variable, value)
    log = home / "logs" / "prefect-server.log"
    url = os.environ.get("PREFECT_API_URL") or running(home).get("prefect")
    if url:
        yield Api(url, log, None, client_settings(home, url).get(AUTH_STRING))
        return
    with log.open("wb") as file:
        port = free_port()
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
        process = start(command, file, server_settings(home, port))
    try:
        yield Api(f"http://127.0.0.1:{port}/api", log, process, auth_string(home))
    finally:
        stop(process)


@contextmanager
def heartbeat(home: Path, flow_run: str) -> Iterator[None]:
    """Hold a lock during the block that shows that this flow run's process lives; it is released with the process.

    Other hosts see a lease in the database that they share.
    """
    with file_lock(home / "flows", flow_run), leased_in(home, f"{_LEASE}{flow_run}"):
        try:
            yield
        finally:
            (home / "flows" / f"{flow_run}.lock").unlink(missing_ok=True)


def home_tag(home: Path) -> str:
    """The tag of the state folder, for servers with the runs of several."""
    return f"home:{home}"


def mark_crashed_runs(home: Path, own_server: bool) -> None:
    """Mark flow runs of this state folder as crashed whose process was killed, by their missing heartbeat.

    On the folder's own server these include runs with the path from before the folder was moved or copied. Where hosts
    share a database, a run is another host's until its lease there has expired, or, without one, for `_BEGIN_SECONDS`.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.client.schemas.objects import StateType
    from prefect.states import Crashed

    holders: dict[str, LeaseHolder] | None = None
    if is_shared(home):
        with closing(Store.of(home)) as store:
            holders = {holder.name.removeprefix(_LEASE): holder for holder in store.lease_holders(_LEASE)}
    unended = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
    running = FlowRunFilter.model_validate({"state": {"type": {"any_": unended}}})
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=running):
            homes = [Path(tag.removeprefix("home:")) for tag in run.tags if tag.startswith("home:")]
            is_own = home in homes or (own_server and homes)
            if is_own and holders is not None and _may_live_elsewhere(run, holders.get(str(run.id)), host_id(home)):
                continue
            if is_own and not any(lock_owner(folder / "flows", str(run.id)) for folder in (home, *homes)):
                client.set_flow_run_state(run.id, Crashed(message="its process was killed"), force=True)


def _may_live_elsewhere(run: FlowRun, holder: LeaseHolder | None, host: str) -> bool:
    """Whether a flow run may be one that another host begins or executes."""
    if holder is not None:
        return holder.is_held and holder.host != host
    since = run.state.timestamp if run.state else run.created
    return since is not None and (datetime.now(UTC) - since).total_seconds() < _BEGIN_SECONDS


def prune_flow_runs(url: str, home: Path, newest: int, dry_run: bool) -> list[str]:
    """Delete this state folder's ended flow runs but the newest of each flow; returns their names."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.client.schemas.objects import TERMINAL_STATES
    from prefect.client.schemas.sorting import FlowRunSort
    from prefect.settings import temporary_settings

    api = Api(url, home / "logs" / "prefect-server.log", None, client_settings(home, url).get(AUTH_STRING))
    states, tag = [state.value for state in TERMINAL_STATES], {"all_": [home_tag(home)]}
    ended = FlowRunFilter.model_validate({"state": {"type": {"any_": states}}, "tags": tag})
    seen: dict[UUID, int] = {}
    old = []
    with temporary_settings(api.client), get_client(sync_client=True) as client:
        offset = 0
        while page := client.read_flow_runs(
            flow_run_filter=ended, sort=FlowRunSort.START_TIME_DESC, limit=_PAGE, offset=offset
        ):
            for run in page:
                seen[run.flow_id] = seen.get(run.flow_id, 0) + 1
                old += [run] if seen[run.flow_id] > newest else []
            offset += len(page)
        for run in old if not dry_run else ():
            client.delete_flow_run(run.id)
    return [run.name for run in old]


def send_logs() -> None:
    """Send the last log lines to Prefect before its server stops."""
    from prefect.logging.handlers import APILogHandler

    APILogHandler().flush()


def free_port() -> int:
    """A free TCP port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
