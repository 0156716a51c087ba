"""Stopping without dropping anyone: say "not ready", finish what runs, then let the server stop."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType

from serving.models.state import Serving

NOTICE_SECONDS = 1.0
"""Between saying "not ready" and closing the door, for whoever routes requests here to notice."""
PATIENCE_SECONDS = 60.0
"""Longest wait for running answers."""


def drain_on_signals(serving: Serving) -> None:
    """Put draining before what the server does on SIGTERM and SIGINT; a second signal stops at once."""
    if threading.current_thread() is not threading.main_thread():
        return  # signals belong to whoever owns the process
    for number in (signal.SIGTERM, signal.SIGINT):
        _before(serving, number)


def _before(serving: Serving, number: signal.Signals) -> None:
    stop = signal.getsignal(number)
    if not callable(stop):
        return

    def drain(received: int, frame: FrameType | None) -> None:
        if serving.draining:
            stop(received, frame)
            return
        serving.draining = True
        notice = NOTICE_SECONDS if received == signal.SIGTERM else 0.0
        threading.Thread(target=wait_then_stop, args=(notice,), name="drain", daemon=True).start()

    def wait_then_stop(notice: float) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        time.sleep(notice)
        while serving.busy and time.monotonic() < deadline:
            time.sleep(0.02)
        stop(number, None)

    signal.signal(number, drain)
