"""Run the endpoint in this process: our ASGI app on uvicorn.

One process, so that no kill leaves child processes behind; `bentoml serve` runs the same app under its own supervisor.
`python -m serving.server --bento FOLDER ...`, started inside a Bento's `src` folder, serves that Bento with the code it
was built with.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import gc
import json
import os
import resource
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import uvicorn

from components.agent.saved_tools import project_tools
from components.config.params import InputError, load_params
from components.config.paths import Paths
from serving.http.app import new_api
from serving.http.connections import Connections
from serving.http.gateway import GatewayMiddleware
from serving.http.keyring import has_keys
from serving.models.state import Serving, drain_on_signals
from serving.observability.access_log import AccessLogMiddleware
from serving.observability.logs import log_to

SHUTDOWN_SECONDS = 30
"""Grace period of connections still open after draining."""

Ready = Callable[[str, list[str]], None]
"""Called with the address and each served `NAME/VERSION` once they answer."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 chooses a free one.

    Raises: InputError when the address is unavailable.
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
    # Connections inherit it; asyncio does not set it on sockets passed to it, which costs 40 ms per response.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def check_host(host: str, home: Path) -> None:
    """Refuse any host but loopback where no API key exists.

    Raises: InputError.
    """
    if host in ("127.0.0.1", "::1", "localhost"):
        return
    if not has_keys(os.environ.get("LOOPWRIGHT_API_KEYS", ""), home):
        remedy = 'run "loopwright keys create NAME" or set LOOPWRIGHT_API_KEYS=KEY,... first, or leave --host out'
        raise InputError(f"--host: {host} is open to others; {remedy}")


def serve_model(model: str, share: float, listener: socket.socket, ready: Ready, tls: Tls | None = None) -> None:
    """Serve a model of the registry, and its challenger with a share of the requests, until a signal stops the process.

    Raises: InputError when the first model cannot be loaded.
    """
    paths = Paths(Path.cwd())
    serve(_open(paths, model, share), listener, ready, tls)


def serve_bento(folder: Path, listener: socket.socket, ready: Ready, tls: Tls | None = None) -> None:
    """Serve a built Bento; the working folder is its `src`."""
    import bentoml

    bentoml.load(str(folder))  # sets the arguments of the service below to those of the Bento
    from serving.service import open_serving

    serve(open_serving(), listener, ready, tls)


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


def serve(serving: Serving, listener: socket.socket, ready: Ready, tls: Tls | None = None) -> None:
    """Serve on a socket until a signal stops the process; `ready` is called from a thread."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection is an open file
    server = _Server(serving, listener, ready, tls)
    # uvicorn raises the signal again after its shutdown; ignored, so that the process exits with status 0.
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        serving.close()
    gc.freeze()  # else the interpreter's last collection traverses torch and MLflow for seconds
    if server.error is not None:
        raise server.error


@contextmanager
def serve_in_thread(serving: Serving, tls: Tls | None = None) -> Iterator[str]:
    """Serve on a free loopback port while the block runs; yields the address."""
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(_config(serving, tls))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="endpoint", daemon=True)
    thread.start()
    try:
        yield _address(listener, tls)
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def local_endpoint(paths: Paths, model: str) -> Iterator[str]:
    """Serve a model of the registry on a thread while the block runs; yields the address once it answers.

    Raises: InputError when the model cannot be loaded.
    """
    serving = _open(paths, model)
    try:
        serving.wait()
        with serve_in_thread(serving) as address:
            yield address
    finally:
        serving.close()


def _open(paths: Paths, model: str, share: float = 0.0) -> Serving:
    config = load_params(paths.params).serve
    return Serving.open(paths.home, config, model, share=share, project_tools=partial(project_tools, paths))


def _config(serving: Serving, tls: Tls | None = None) -> uvicorn.Config:
    api = new_api()
    api.state.serving = serving
    connections = Connections(serving.config, serving.metrics, tls.context() if tls else None)
    return uvicorn.Config(
        AccessLogMiddleware(GatewayMiddleware(api, api), api),
        http=cast(type[asyncio.Protocol], connections.protocol),
        loop="asyncio" if tls else "auto",  # see BoundedProtocol
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )


def _address(listener: socket.socket, tls: Tls | None = None) -> str:
    host, port = listener.getsockname()[:2]
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


@dataclass(frozen=True)
class Tls:
    """Files in PEM format, with which the endpoint speaks HTTPS."""

    certificate: Path
    """The certificate and its chain."""
    key: Path

    @classmethod
    def checked(cls, certificate: Path | None, key: Path | None) -> Tls | None:
        """None without files.

        Raises: InputError for one file without the other, and for files that are no pair.
        """
        if certificate is None and key is None:
            return None
        if certificate is None or key is None:
            raise InputError("--tls-cert, --tls-key: one without the other; give both files")
        for option, file in (("--tls-cert", certificate), ("--tls-key", key)):
            if not file.is_file():
                raise InputError(f"{option}: {file}: not found; give a file in PEM format")
        try:
            cls(certificate, key).context()
        except (ssl.SSLError, OSError) as error:
            raise InputError(f"--tls-cert {certificate}, --tls-key {key}: {error}; give a pair in PEM format") from None
        return cls(certificate.resolve(), key.resolve())

    def context(self) -> ssl.SSLContext:
        """What a server's handshakes use: TLS 1.2 or newer.

        Raises: ssl.SSLError or OSError for files that are no pair.
        """
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.certificate, self.key, password="")
        return context


class _Server(uvicorn.Server):
    """Calls `ready` once the first model answers, stops when none can be loaded, and drains before it stops."""

    def __init__(self, serving: Serving, listener: socket.socket, ready: Ready, tls: Tls | None) -> None:
        super().__init__(_config(serving, tls))
        self._serving, self._url, self._ready = serving, _address(listener, tls), ready
        self.error: Exception | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        drain_on_signals(self._serving)
        threading.Thread(target=self._wait, name="first-model", daemon=True).start()

    def _wait(self) -> None:
        try:
            self._serving.wait()
        except Exception as error:  # noqa: BLE001 (raised by `serve`, in the main thread)
            self.error = error
            self.should_exit = True
        else:
            self._ready(self._url, self._serving.served)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m serving.server", description=serve_bento.__doc__)
    parser.add_argument("--bento", type=Path, required=True)
    parser.add_argument("--fd", type=int, required=True, help="the listening socket")
    parser.add_argument("--logs", type=Path, required=True)
    parser.add_argument("--tls-cert", type=Path)
    parser.add_argument("--tls-key", type=Path)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    log_to(arguments.logs)
    try:
        tls, ready = Tls.checked(arguments.tls_cert, arguments.tls_key), announce_json if arguments.json else announce
        serve_bento(arguments.bento, socket.socket(fileno=arguments.fd), ready, tls)
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
