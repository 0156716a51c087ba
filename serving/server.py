"""Run the endpoint in this process: our ASGI app on uvicorn.

One process, so that no kill leaves half of a server behind; `bentoml serve` runs the same app
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from components.config.params import InputError, load_params
from components.config.paths import Paths
from components.feedback.store import Store, has_store
from serving.http.app import new_api
from serving.http.gateway import GatewayMiddleware, has_keys
from serving.models.state import Serving, drain_on_signals
from serving.observability.logs import log_to

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
    paths = Paths(Path.cwd())
    serve(Serving.open(paths.home, load_params(paths.params).serve, model, share=share), listener, ready)


def serve_bento(folder: Path, listener: socket.socket, ready: Ready) -> None:
    """Serve a built Bento; the working folder is its `src`."""
    import bentoml

    bentoml.load(str(folder))  # gives the service below the arguments that the Bento was built with
    from serving.service import open_serving

    serve(open_serving(), listener, ready)


def find_bento(tag: str) -> Path:
    """The folder of a built Bento in this server's BentoML home, by `NAME:VERSION` or `NAME:latest`.

    Raises: InputError naming the Bentos there are.
    """
    import bentoml

    try:
        return Path(bentoml.get(tag).path)
    except (bentoml.exceptions.BentoMLException, ValueError):
        known = ", ".join(str(bento.tag) for bento in bentoml.list()) or 'none; run "loopwright package"'
        raise InputError(f"--bento: {tag!r} is not a built Bento; there are: {known}") from None


def serve(serving: Serving, listener: socket.socket, ready: Ready) -> None:
    """Answer on a socket until a signal stops the process; `ready` is called from a thread."""
    server = _Server(serving, listener, ready)
    # uvicorn raises the signal again when all is done; that must not turn a clean end into a death by signal.
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        serving.close()
    gc.freeze()  # the interpreter's last collection would walk all of torch and MLflow for seconds
    if server.error is not None:
        raise server.error


@contextmanager
def serve_in_thread(serving: Serving) -> Iterator[str]:
    """Answer on a free loopback port while the block runs; gives the address."""
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(_config(serving))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="endpoint", daemon=True)
    thread.start()
    try:
        yield _address(listener)
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def local_endpoint(paths: Paths, model: str) -> Iterator[str]:
    """Serve a model of the registry on a thread while the block runs; gives the address once it answers.

    Raises: InputError when the model cannot be had.
    """
    serving = Serving.open(paths.home, load_params(paths.params).serve, model)
    try:
        serving.wait()
        with serve_in_thread(serving) as address:
            yield address
    finally:
        serving.close()


def _config(serving: Serving) -> uvicorn.Config:
    api = new_api()
    api.state.serving = serving
    return uvicorn.Config(
        GatewayMiddleware(api, api),
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=PATIENCE_SECONDS,
    )


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """Says when the first model answers, stops when it cannot be loaded, and drains before a signal stops it."""

    def __init__(self, serving: Serving, listener: socket.socket, ready: Ready) -> None:
        super().__init__(_config(serving))
        self._serving, self._url, self._ready = serving, _address(listener), ready
        self.error: Exception | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        drain_on_signals(self._serving)
        threading.Thread(target=self._wait, name="first-model", daemon=True).start()

    def _wait(self) -> None:
        try:
            self._serving.wait()
        except Exception as error:  # noqa: BLE001 (raised by `serve`, in the thread that is to end)
            self.error = error
            self.should_exit = True
        else:
            self._ready(self._url, self._serving.served)


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
