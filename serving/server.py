"""Run the endpoint in this process: the BentoML service's app on uvicorn.

One process, so that no kill leaves half of a server behind; `bentoml serve` runs the same service
under its own supervisor. `python -m serving.server --bento FOLDER ...`, started inside a Bento's
`src` folder, serves that Bento with the code it was built with.
"""

from __future__ import annotations

import argparse
import errno
import gc
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn

from components.config.params import InputError
from components.feedback.store import Store, has_store
from serving.http.keys import has_keys
from serving.observability.logs import log_to

if TYPE_CHECKING:
    from fastapi import FastAPI

    from serving.models.state import Serving

PATIENCE_SECONDS = 30
"""For connections that are still open when the answers are finished."""

Ready = Callable[[str, list[str]], None]
"""Told the address and each `NAME/VERSION` once they answer."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any free one.

    Raises: InputError when the address cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    except socket.gaierror as error:
        raise InputError(f"--host: {host!r}: {error.strerror}; give an address of this machine") from None
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"--port: {port} is in use; stop what listens there or choose another --port") from None
        raise InputError(f"--host {host} --port {port}: {error.strerror}; choose others") from None
    # Connections inherit it; asyncio forgets to set it on sockets it is handed, which costs 40 ms an answer.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def check_host(host: str, home: Path) -> None:
    """Only loopback without keys, of the environment or of the state folder's store.

    Raises: InputError.
    """
    if host in ("127.0.0.1", "::1", "localhost"):
        return
    if not has_keys(os.environ.get("LOOPWRIGHT_API_KEYS", ""), lambda: Store.of(home) if has_store(home) else None):
        remedy = 'run "loopwright keys create NAME" or set LOOPWRIGHT_API_KEYS=KEY,... first, or leave --host out'
        raise InputError(f"--host: {host} is open to others; {remedy}")


def serve_model(model: str, share: float, listener: socket.socket, ready: Ready) -> None:
    """Serve a model of the registry, and its challenger with a share of the requests, until a signal stops the process.

    Raises: InputError when the first model cannot be loaded.
    """
    from serving import service

    service.arguments = service.Arguments(model=model, challenger_share=share)
    run(service.endpoint.to_asgi(), service.api, listener, ready)


def serve_bento(folder: Path, listener: socket.socket, ready: Ready) -> None:
    """Serve a built Bento; the working folder is its `src`."""
    import bentoml

    bentoml.load(str(folder))  # gives the service below the arguments that the Bento was built with
    from serving.service import api, endpoint

    run(endpoint.to_asgi(), api, listener, ready)


def run(app: Any, api: FastAPI, listener: socket.socket, ready: Ready) -> None:
    """Run an app on a socket; `ready` is called from a thread."""
    from serving.http.gateway import Edge

    config = uvicorn.Config(
        Edge(app, api),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=PATIENCE_SECONDS,
    )
    server = uvicorn.Server(config)
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    watch = _FirstModel(api, server, url, ready)
    watch.start()
    # uvicorn raises the signal again when all is done; that must not turn a clean end into a death by signal.
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    watch.ended.set()
    gc.freeze()  # the interpreter's last collection would walk all of torch and MLflow for seconds
    if watch.error is not None:
        raise watch.error


class _FirstModel(threading.Thread):
    """Says when the first model answers, and stops a server whose model cannot be loaded."""

    def __init__(self, api: FastAPI, server: uvicorn.Server, url: str, ready: Ready) -> None:
        super().__init__(name="first-model", daemon=True)
        self._api, self._server, self._url, self._ready = api, server, url, ready
        self.ended = threading.Event()
        self.error: Exception | None = None

    def run(self) -> None:
        while not self._server.started:
            if self.ended.wait(0.02):
                return
        serving: Serving = self._api.state.serving
        try:
            serving.wait()
        except Exception as error:  # noqa: BLE001 (raised by `run`, in the thread that is to end)
            self.error = error
            self._server.should_exit = True
        else:
            self._ready(self._url, serving.served)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m serving.server", description=serve_bento.__doc__)
    parser.add_argument("--bento", type=Path, required=True)
    parser.add_argument("--fd", type=int, required=True, help="the listening socket")
    parser.add_argument("--logs", type=Path, required=True)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    log_to(given.logs)
    try:
        serve_bento(given.bento, socket.socket(fileno=given.fd), announce_json if given.json else announce)
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(1)


def announce(url: str, models: list[str]) -> None:
    answer = "answers" if len(models) == 1 else "answer"
    print(f"{', '.join(models)} {answer} on {url}  (OpenAI's API: {url}/v1, Ctrl-C stops)", flush=True)


def announce_json(url: str, models: list[str]) -> None:
    print(json.dumps({"url": url, "model": models[0], "models": models, "pid": os.getpid()}), flush=True)


if __name__ == "__main__":
    main()
