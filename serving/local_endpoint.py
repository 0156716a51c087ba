"""The endpoint inside another process, for `loopwright chat`: the same routes on a free loopback port, no BentoML."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from components.config.params import load_params
from components.config.paths import Paths
from serving.http.app import new_api
from serving.http.gateway import Edge
from serving.models.state import Serving
from serving.server import listen


@contextmanager
def local_endpoint(paths: Paths, model: str) -> Iterator[str]:
    """Serve a model of the registry on a thread while the block runs; gives the address once it answers.

    Raises: InputError when the model cannot be had.
    """
    api = new_api()
    api.state.serving = serving = Serving.open(paths.home, load_params(paths.params).serve, model)
    try:
        serving.wait()
        listener = listen("127.0.0.1", 0)
        server = uvicorn.Server(uvicorn.Config(Edge(api, api), log_config=None, access_log=False, lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="endpoint", daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
    finally:
        serving.close()
