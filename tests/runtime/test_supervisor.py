"""A supervisor on real processes: restart after a death, giving up, ending children."""

import contextlib
import signal
import socket
import sys
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from components.runtime import supervisor as supervise
from components.runtime.process import file_lock, start, stop
from components.runtime.service_registry import LOCK, answers, lives, publish, service_states, wait_for
from components.runtime.supervisor import Service, SupervisedService, Supervisor, process_tree
from flows.orchestration.prefect_server import free_port


def until(supervisor: Supervisor, state: str) -> SupervisedService:
    deadline = time.monotonic() + 30
    while supervisor.supervised[0].state != state:
        assert time.monotonic() < deadline, supervisor.supervised[0].state
        supervisor.tick()
        time.sleep(0.01)
    return supervisor.supervised[0]


def keep(code: str, folder: Path) -> Supervisor:
    return Supervisor(
        [Service("x", [sys.executable, "-c", code], "", lambda: True)], folder, folder, lambda entry: None
    )


def test_a_killed_service_comes_back_and_stop_leaves_nobody(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).wait()"
    )
    supervisor = keep(code, tmp_path)
    first = until(supervisor, "healthy").process
    assert first is not None
    first.kill()
    until(supervisor, "backing off")
    second = until(supervisor, "healthy").process
    assert second is not None
    assert second.pid != first.pid
    members = process_tree(second.pid)
    supervisor.stop(1)
    assert not [member for member in members if member.is_running() and member.status() != psutil.STATUS_ZOMBIE]


def test_a_service_that_dies_at_once_again_and_again_is_a_crash_loop(tmp_path: Path) -> None:
    supervisor = keep("raise SystemExit(1)", tmp_path)
    for crashes in range(1, supervise.MAX_CRASHES + 1):
        supervisor.supervised[0].next_start = 0.0
        until(supervisor, "crash loop" if crashes == supervise.MAX_CRASHES else "backing off")
        supervisor.supervised[0].state = "waiting"
    assert supervisor.supervised[0].crashes == supervise.MAX_CRASHES


def test_a_service_comes_back_when_what_it_needs_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that is away for longer than five quick exits take, twice."""
    monkeypatch.setattr(supervise, "FIRST_PAUSE_SECONDS", 0.001)
    port, connected = free_port(), tmp_path / "connected"
    code = f"""
import pathlib, socket
database = socket.create_connection(("127.0.0.1", {port}))
pathlib.Path({str(connected)!r}).touch()
database.recv(1)
raise SystemExit("lost")
"""
    service = Service("x", [sys.executable, "-c", code], "", connected.exists)
    supervisor = Supervisor([service], tmp_path / "logs", tmp_path, lambda entry: None)
    for _ in range(2):
        entry = until(supervisor, "crash loop")
        assert entry.crashes >= supervise.MAX_CRASHES
        with socket.create_server(("127.0.0.1", port)) as database:
            until(supervisor, "healthy")
            database.accept()[0].close()
        connected.unlink()
    assert entry.log.read_text().count("loopwright up: exited with 1; restarts in 0 s") >= supervise.MAX_CRASHES
    supervisor.stop(5)


def test_each_service_has_its_own_time_to_end(tmp_path: Path) -> None:
    """One that ignores the signal is killed; another waits for that, and ends in order."""
    started, drained = tmp_path / "started", tmp_path / "drained"
    ignores = f"""
import pathlib, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path({str(started)!r}).touch()
time.sleep(60)
"""
    quick = Service("stubborn", [sys.executable, "-c", ignores], "", started.exists, stop_seconds=0.1)
    supervisor = Supervisor([quick], tmp_path, tmp_path, lambda entry: None)
    stubborn = until(supervisor, "healthy").process
    assert stubborn is not None
    started.unlink()
    drains = f"""
import pathlib, psutil, signal, sys, time
def end(*_):
    while psutil.pid_exists({stubborn.pid}) and psutil.Process({stubborn.pid}).status() != "zombie":
        time.sleep(0.01)
    pathlib.Path({str(drained)!r}).touch()
    sys.exit()
signal.signal(signal.SIGTERM, end)
pathlib.Path({str(started)!r}).touch()
time.sleep(60)
"""
    slow = Service("drains", [sys.executable, "-c", drains], "", started.exists, stop_seconds=30)
    supervisor.supervised.insert(0, SupervisedService(slow, tmp_path / "drains.log"))
    until(supervisor, "healthy")
    supervisor.stop()
    assert drained.exists()


def test_the_pauses_grow_to_five_minutes(tmp_path: Path) -> None:
    supervisor = keep("raise SystemExit(1)", tmp_path)
    entry, pauses = supervisor.supervised[0], []
    for crashes in (0, 1, 4, 7, 9, 5_000):
        entry.crashes, entry.next_start = crashes, 0.0
        supervisor.tick()
        assert entry.process is not None
        entry.process.wait()
        supervisor.tick()
        pauses.append(round(entry.next_start - time.monotonic()))
    assert pauses == [1, 2, 16, 128, 300, 300]


def test_other_commands_read_the_state_of_each_service(tmp_path: Path) -> None:
    states = {"worker": "crash loop: 6 quick exits in a row; restarts in 32 s; see LOG"}
    with file_lock(tmp_path, LOCK):
        publish(tmp_path, {"prefect": "http://127.0.0.1:4200/api"}, states)
        assert service_states(tmp_path) == states
    assert service_states(tmp_path) == {}, "its `up` has ended"


def test_a_service_that_no_longer_answers_is_killed_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervise, "SECONDS_BETWEEN_CHECKS", 0.0)
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port)]
    service = Service("x", command, address, partial(answers, address), lives=partial(lives, f"{address}/missing"))
    supervisor = Supervisor([service], tmp_path, tmp_path, lambda entry: None)
    first = until(supervisor, "healthy").process
    assert first is not None
    for _ in range(supervise.MAX_FAILED_CHECKS + 1):
        supervisor.tick()
    assert supervisor.supervised[0].state == "healthy", "a refusal is an answer"
    monkeypatch.setattr(supervise, "MAX_FAILED_CHECKS", 2)
    first.send_signal(signal.SIGSTOP)
    until(supervisor, "backing off")
    until(supervisor, "healthy")
    supervisor.stop(5)


def test_waiting_for_an_address_ends_with_the_answer_the_process_or_the_time(tmp_path: Path) -> None:
    port = free_port()
    address, server = f"http://127.0.0.1:{port}", [sys.executable, "-m", "http.server", "--bind", "127.0.0.1"]
    assert not wait_for(address, 0.2)
    with (tmp_path / "log").open("wb") as log:
        failing = start([sys.executable, "-c", "raise SystemExit(1)"], log)
        started = time.monotonic()
        assert not wait_for(address, 60, failing)
        assert time.monotonic() - started < 50
        assert failing.poll() == 1
        process = start([*server, str(port)], log, cwd=tmp_path)
        try:
            assert wait_for(address, 60, process)
        finally:
            stop(process)
    assert process.returncode == -signal.SIGTERM


def test_a_busy_server_is_waited_for_past_the_time_that_an_absent_one_has() -> None:
    class Slow(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(0.5)
            with contextlib.suppress(OSError):
                self.send_response(200)
                self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert not wait_for(address, 0.2, patience=0.1)
        assert wait_for(address, 0.2, patience=60)
        server.shutdown()
