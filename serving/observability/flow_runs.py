"""What Prefect ran last for a state folder and what it runs next, by its REST API: the endpoint imports no Prefect."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from components.runtime.service_registry import AUTH_FILE, AUTH_STRING, LOOPBACK, running

RECENT = 8
"""Flow runs that are listed."""
_SCHEDULED = 200
"""Flow runs that one answer of Prefect's lists, and so up to which the next of each flow is looked for."""
_SECONDS = 3.0


def prefect_address(home: Path) -> str:
    """The address of Prefect's API that PREFECT_API_URL or the running `up` names; empty without either."""
    return os.environ.get("PREFECT_API_URL") or running(home).get("prefect", "")


def flow_runs(home: Path) -> dict[str, Any] | None:
    """Recent and scheduled runs of the state folder; None where no server answers.

    A run is `{"flow", "name", "state", "message", "time", "url"}`; `time` is when it ended, or is to start.
    """
    address = prefect_address(home)
    if not address:
        return None
    try:
        # Loading certificates takes thirty times as long as the response.
        with httpx.Client(
            base_url=address, auth=_auth(home, address), timeout=_SECONDS, verify=address[:6] == "https:"
        ) as api:
            return _listed(api, home, address.removesuffix("/api"))
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError):
        return None


def _listed(api: httpx.Client, home: Path, page: str) -> dict[str, Any]:
    client = str(uuid.uuid4())
    token = api.get("/csrf-token", params={"client": client})
    if token.is_success:  # a server of ours; another may not ask for one
        api.headers.update({"Prefect-Csrf-Token": token.json()["token"], "Prefect-Csrf-Client": client})
    flows = {flow["id"]: flow["name"] for flow in _post(api, "/flows/filter", {"limit": 200})}
    tags = {"tags": {"all_": [f"home:{home}"]}}

    def runs(types: list[str], sort: str, limit: int) -> list[dict[str, Any]]:
        chosen = {"flow_runs": {**tags, "state": {"type": {"any_": types}}}, "sort": sort, "limit": limit}
        return [_run(row, flows, page) for row in _post(api, "/flow_runs/filter", chosen)]

    ended = ["COMPLETED", "FAILED", "CRASHED", "CANCELLED", "RUNNING", "CANCELLING", "PENDING", "PAUSED"]
    scheduled = runs(["SCHEDULED"], "EXPECTED_START_TIME_ASC", _SCHEDULED)
    first = {run["flow"]: run for run in reversed(scheduled)}  # of each flow
    return {
        "recent": runs(ended, "START_TIME_DESC", RECENT),
        "scheduled": sorted(first.values(), key=lambda run: str(run["time"])),
    }


def _post(api: httpx.Client, path: str, body: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = api.post(path, json=body).raise_for_status().json()
    return rows


def _run(row: Mapping[str, Any], flows: Mapping[str, str], page: str) -> dict[str, Any]:
    state = row.get("state") or {}
    return {
        "flow": flows.get(row["flow_id"], "?"),
        "name": row["name"],
        "state": state.get("name") or row.get("state_name"),
        "message": (state.get("message") or "")[:300],
        "time": row.get("end_time") or row.get("start_time") or row.get("expected_start_time"),
        "url": f"{page}/runs/flow-run/{row['id']}",
    }


def _auth(home: Path, address: str) -> tuple[str, str] | None:
    """What the server is signed in to with: PREFECT_API_AUTH_STRING, or on this machine the state folder's secret."""
    secret = os.environ.get(AUTH_STRING, "")
    file = home / AUTH_FILE
    if not secret and urlsplit(address).hostname in LOOPBACK and file.is_file():
        secret = file.read_text(encoding="utf-8").strip()
    user, _, password = secret.partition(":")
    return (user, password) if secret else None
