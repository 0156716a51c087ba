"""Addresses of the running platform's services: `loopwright up` writes them, every other command reads them.

Requests to this machine bypass the proxies that the environment names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from components.runtime.files import write_text
from components.runtime.process import alive, lock_owner

LOCK = "up"
FILE = "services.json"
LOOPBACK = ("localhost", "127.0.0.1", "::1", "0.0.0.0")
AUTH_FILE = "prefect-auth"
"""In the state folder: what Prefect's page and clients sign in with, `admin:PASSWORD`."""
AUTH_STRING = "PREFECT_API_AUTH_STRING"
"""Environment variable with it, for a server that is not of this state folder."""
SERVED = "served"
"""Folder of the state folder with a lock for each version that a server was started with, `NAME@VERSION-PID.NUMBER`."""
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")


def running(home: Path) -> dict[str, str]:
    """Address of each service of the `up` that runs on this state folder; empty when none does."""
    return _published(home, "addresses")


def service_states(home: Path) -> dict[str, str]:
    """State of each service of that `up`, in words; empty when none runs."""
    return _published(home, "states")


def _published(home: Path, field: str) -> dict[str, str]:
    try:
        entry = json.loads((home / FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    # The lock is released with its process; the process id in the file alone may be another program's by now.
    if not alive(entry["pid"]) or lock_owner(home, LOCK) != entry["pid"]:
        return {}
    values: dict[str, str] = entry.get(field, {})
    return values


def publish(home: Path, addresses: dict[str, str], states: dict[str, str] | None = None) -> None:
    """Write the addresses of this process's services, and their states, where other commands read them."""
    write_text(home / FILE, json.dumps({"pid": os.getpid(), "addresses": addresses, "states": states or {}}))


def unregister(home: Path) -> None:
    """Remove the addresses that `publish` wrote."""
    (home / FILE).unlink(missing_ok=True)


def wait_for(url: str, seconds: float, process: subprocess.Popen[bytes] | None = None, patience: float = 2.0) -> bool:
    """Wait until a GET of the address is answered with 200; False after `seconds`, or when `process` has ended.

    A server that is there but busy has `patience` seconds for each answer, also past `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not answers(url, patience):
        if time.monotonic() > deadline or (process is not None and process.poll() is not None):
            return False
        time.sleep(0.1)
    return True


def answers(url: str, seconds: float = 2.0, headers: Mapping[str, str] | None = None) -> bool:
    """Whether a GET of the address is answered with 200."""
    return _status(url, seconds, headers) == 200


def lives(url: str, seconds: float = 2.0) -> bool:
    """Whether a GET of the address gets any response."""
    return _status(url, seconds) != 0


def _status(url: str, seconds: float, headers: Mapping[str, str] | None = None) -> int:
    """HTTP status of a GET; 0 where nothing answers."""
    import httpx

    try:
        # Loading certificates takes thirty times as long as the response.
        return httpx.get(url, headers=headers, timeout=seconds, verify=url.startswith("https:")).status_code
    except (httpx.HTTPError, httpx.InvalidURL):
        return 0


def bypass_proxies_for_loopback() -> None:
    """Let this process and its children bypass proxies for loopback addresses.

    HTTP clients read `NO_PROXY`. httpx, as in Prefect's client, raises where it cannot parse one of these variables:
    such a proxy is removed with a message, such a `NO_PROXY` entry (an IPv6 network) without.
    """
    proxies = [name for name, value in os.environ.items() if name.lower() in _PROXIES and value.strip()]
    if not proxies:
        return
    import httpx

    for name in proxies:
        url = os.environ[name].strip().replace("socks://", "socks5://")  # as desktop environments write it
        os.environ[name] = url
        try:
            httpx.Proxy(url if "://" in url else f"http://{url}")
        except (ValueError, httpx.InvalidURL) as error:
            del os.environ[name]
            supported = "http, https, socks5 and socks5h are supported"
            print(f"{name}: {url}: {error}; ignored; {supported}", file=sys.stderr, flush=True)
    value = ",".join(os.environ.get(name, "") for name in ("no_proxy", "NO_PROXY"))
    hosts = [host.strip().removeprefix("[").removesuffix("]") for host in value.split(",")]
    parsed = [host for host in hosts if host and _is_parsed(host)]
    no_proxy = "*" if "*" in hosts else ",".join(dict.fromkeys([*parsed, *LOOPBACK]))
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = no_proxy


def _is_parsed(host: str) -> bool:
    import httpx

    try:
        httpx.URL(f"all://[{host}]" if host.count(":") > 1 else f"all://*{host}")
    except httpx.InvalidURL:
        return False
    return True
