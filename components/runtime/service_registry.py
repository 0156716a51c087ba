"""Where the running platform answers: `loopwright up` writes its addresses, every other command reads them."""

from __future__ import annotations

import json
import os
from pathlib import Path

from components.runtime.process import alive, holder

LOCK = "up"
FILE = "services.json"


def running(home: Path) -> dict[str, str]:
    """Address of each service of the `up` that runs on this state folder; empty when none does."""
    try:
        written = json.loads((home / FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    # The lock falls with its process; the number in the file alone could by now be another program's.
    if not alive(written["pid"]) or holder(home, LOCK) != written["pid"]:
        return {}
    addresses: dict[str, str] = written["addresses"]
    return addresses


def publish(home: Path, addresses: dict[str, str]) -> None:
    """Let the other commands find the services of this process."""
    scratch = home / f"{FILE}.new"
    scratch.write_text(json.dumps({"pid": os.getpid(), "addresses": addresses}), encoding="utf-8")
    scratch.replace(home / FILE)


def withdraw(home: Path) -> None:
    """The services end."""
    (home / FILE).unlink(missing_ok=True)
