"""What a running tool may use: files and the network only where it says so, held by Python's audit events.

It stops a tool that does more than it declared, whoever talked the model into it. It is no jail for hostile code:
native code raises no events, and threads that a tool starts are not watched.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

Permission = Literal["files", "network"]

PROCESSES = ("subprocess.", "os.system", "os.fork", "os.exec", "os.posix_spawn", "os.spawn", "pty.", "ctypes.dlopen")
"""Events of what may then do anything."""
FILES = ("open", "os.", "shutil.", "sqlite3.connect", "glob.", "tempfile.", "mmap.")
NETWORK = ("socket.",)


class _Running(threading.local):
    permissions: frozenset[Permission] | None = None
    """What the tool that runs in this thread may use; None while none runs."""


_running = _Running()


@contextmanager
def restricted_to(permissions: frozenset[Permission]) -> Iterator[None]:
    """What the block does in this thread raises PermissionError where it uses anything else."""
    _watch()
    before, _running.permissions = _running.permissions, permissions
    try:
        yield
    finally:
        _running.permissions = before


@cache
def _watch() -> None:
    """Once for the process: an audit hook cannot be taken away again."""
    sys.addaudithook(_heard)


def _heard(event: str, _arguments: tuple[Any, ...]) -> None:
    allowed = _running.permissions
    if allowed is None:
        return
    for permission in sorted(_needed(event) - allowed):
        raise PermissionError(f"the tool has no permission for {permission} ({event})")


@cache
def _needed(event: str) -> frozenset[Permission]:
    if event.startswith(PROCESSES):
        return frozenset({"files", "network"})
    if event.startswith(FILES):
        return frozenset({"files"})
    return frozenset({"network"} if event.startswith(NETWORK) else ())
