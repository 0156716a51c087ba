"""The BentoML service: one FastAPI app with the public routes, and one model behind it.

From the source tree it follows the registry; inside a Bento it serves the weights that the Bento
carries. BentoML's own metrics are off (their labels are raw paths) and so is its time-out
(it would cut long answers off): `edge` and `engine` bound what must be bounded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bentoml
from pydantic import BaseModel, Field

from components.config.params import load_params
from components.config.paths import Paths
from components.runtime.service_registry import bypass_proxies_for_loopback
from serving.engine.adaptive_batching import CLOSED, MAX_BATCH_SIZE, MAX_LATENCY_MS, Batching, embed_all, label_all
from serving.http.app import new_api
from serving.http.gateway import Edge
from serving.models.drain import drain_on_signals
from serving.models.state import Serving
from serving.models.versions import DEFAULT, Bundled

DAY_SECONDS = 86_400
ADAPTIVE: dict[str, Any] = {"batchable": True, "max_batch_size": MAX_BATCH_SIZE, "max_latency_ms": MAX_LATENCY_MS}


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


class Endpoint:
    """Answers chats, reads texts, and keeps what people say about the answers."""

    if arguments.weights:
        weights = bentoml.models.BentoModel(arguments.weights)

    def __init__(self) -> None:
        bypass_proxies_for_loopback()  # `bentoml serve` comes by no other door
        paths = Paths(Path.cwd())
        config = load_params(paths.params).serve
        bundled = _bundled(self.weights) if arguments.weights else None
        share = arguments.challenger_share
        api.state.serving = self.serving = Serving.open(paths.home, config, arguments.model, bundled, share)
        drain_on_signals(self.serving)

    @bentoml.api(route=CLOSED["classify"], **ADAPTIVE)  # type: ignore[untyped-decorator]
    def classify(self, asked: list[Any]) -> list[Any]:
        return label_all(asked, self.serving.metrics)

    @bentoml.api(route=CLOSED["embed"], **ADAPTIVE)  # type: ignore[untyped-decorator]
    def embed(self, asked: list[Any]) -> list[Any]:
        return embed_all(asked, self.serving.metrics)

    def __is_ready__(self) -> bool:
        return self.serving.ready

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    def close(self) -> None:
        self.serving.close()


def _bundled(weights: Any) -> Bundled:
    """The model that `flows.release.package` put into BentoML's store: the model folder, its facts as metadata."""
    return Bundled(Path(weights.path), weights.info.metadata)


endpoint = bentoml.service(
    bentoml.asgi_app(api, path="/")(Endpoint),
    name="agent",
    workers=1,
    traffic={"timeout": DAY_SECONDS},
    metrics={"enabled": False, "namespace": "bentoml_service"},
)
endpoint.add_asgi_middleware(Edge, api=api)
endpoint.add_asgi_middleware(Batching, api=api)
