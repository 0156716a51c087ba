"""The BentoML service: our ASGI app, mounted, and the models behind it.

In the source tree it serves the registry's models; inside a Bento, the weights that the Bento carries. BentoML's own
metrics are off (their labels are raw paths) and so is its time-out (it would interrupt long answers): the gateway and
the backends have their own limits.
"""

from __future__ import annotations

import asyncio
from functools import cache
from pathlib import Path
from typing import Any, cast

import bentoml
from pydantic import BaseModel, Field
from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from components.config.params import load_params
from components.config.paths import Paths
from components.runtime.files import keep_private
from components.runtime.service_registry import bypass_proxies_for_loopback
from serving.http.app import new_api
from serving.http.connections import Connections
from serving.http.gateway import GatewayMiddleware
from serving.models.state import Serving, drain_on_signals
from serving.models.versions import DEFAULT, Bundled
from serving.observability.access_log import AccessLogMiddleware

DAY_SECONDS = 86_400


class Arguments(BaseModel):
    """Arguments of a Bento, set at its build or by `--arg`."""

    model: str = DEFAULT
    """`NAME@ALIAS` (watched) or `NAME/VERSION` in the registry; a comma-separated list has one model per task."""
    challenger_share: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of the requests that the challenger answers, where there is one."""
    weights: str = ""
    """Tag in BentoML's model store, such as `agent:v3`: the model inside a Bento; overrides `model`."""


api = new_api()
arguments = bentoml.use_arguments(Arguments)
WEIGHTS = bentoml.models.BentoModel(arguments.weights) if arguments.weights else None


def open_serving() -> Serving:
    """Start loading the models that the arguments name; a Bento's model has the metadata it was stored with."""
    paths = Paths(Path.cwd())
    weights = WEIGHTS.resolve() if WEIGHTS else None
    bundled = Bundled(Path(weights.path), weights.info.metadata) if weights else None
    config = load_params(paths.params).serve
    return Serving.open(paths.home, config, arguments.model, bundled, arguments.challenger_share)


class Endpoint:
    """Answers chats, classifies and embeds texts, and stores feedback."""

    weights = WEIGHTS  # by which a build puts them into the Bento

    def __init__(self) -> None:
        # Under `bentoml serve` no other code of ours runs before this.
        keep_private(Paths(Path.cwd()))
        bypass_proxies_for_loopback()
        api.state.serving = self.serving = open_serving()
        drain_on_signals(self.serving)

    def __is_ready__(self) -> bool:
        return self.serving.ready

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    def close(self) -> None:
        self.serving.close()


endpoint = bentoml.service(
    bentoml.asgi_app(api, path="/")(Endpoint),
    name="agent",
    workers=1,
    traffic={"timeout": DAY_SECONDS},
    metrics={"enabled": False, "namespace": "bentoml_service"},
)
endpoint.add_asgi_middleware(AccessLogMiddleware, api=api)  # the first is the outermost
endpoint.add_asgi_middleware(GatewayMiddleware, api=api)


@cache
def _connections() -> Connections:
    return Connections(api.state.serving.config, api.state.serving.metrics)


def _connection(**arguments: Any) -> asyncio.Protocol:
    """A new connection of `bentoml serve`, within the limits of `serve`."""
    return _connections().protocol(**arguments) if hasattr(api.state, "serving") else HttpToolsProtocol(**arguments)


# BentoML's worker leaves the choice of the protocol to uvicorn, which looks it up here.
cast(dict[str, Any], HTTP_PROTOCOLS)["auto"] = _connection
