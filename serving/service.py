"""The BentoML service: our ASGI app, mounted, and the models behind it.

From the source tree it follows the registry; inside a Bento it serves the weights that the Bento
carries. BentoML's own metrics are off (their labels are raw paths) and so is its time-out
(it would cut long answers off): `gateway` and `engine` bound what must be bounded.
"""

from __future__ import annotations

from pathlib import Path

import bentoml
from pydantic import BaseModel, Field

from components.config.params import load_params
from components.config.paths import Paths
from components.runtime.service_registry import bypass_proxies_for_loopback
from serving.http.app import new_api
from serving.http.gateway import GatewayMiddleware
from serving.models.state import Serving, drain_on_signals
from serving.models.versions import DEFAULT, Bundled

DAY_SECONDS = 86_400


class Arguments(BaseModel):
    """What a Bento was built with, or `--arg` says."""

    model: str = DEFAULT
    """`NAME@ALIAS`, followed, or `NAME/VERSION`, in the registry; several between commas, one for each task."""
    challenger_share: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of the requests that the challenger answers, where there is one."""
    weights: str = ""
    """Tag in BentoML's model store, as `agent:v3`: the model that a Bento carries; wins over `model`."""


api = new_api()
arguments = bentoml.use_arguments(Arguments)


def open_serving() -> Serving:
    """Start loading what the arguments name; of a Bento's model, its facts are the metadata that it was stored with."""
    paths = Paths(Path.cwd())
    bundled = None
    if arguments.weights:
        weights = bentoml.models.get(arguments.weights)
        bundled = Bundled(Path(weights.path), weights.info.metadata)
    config = load_params(paths.params).serve
    return Serving.open(paths.home, config, arguments.model, bundled, arguments.challenger_share)


class Endpoint:
    """Answers chats, reads texts, and keeps what people say about the answers."""

    def __init__(self) -> None:
        bypass_proxies_for_loopback()  # `bentoml serve` comes by no other door
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
endpoint.add_asgi_middleware(GatewayMiddleware, api=api)
