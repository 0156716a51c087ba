"""Run one stage of dvc.yaml by name: `python -m components.stage NAME`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from components.config import Params, Paths

ROOMS: Mapping[str, str] = {
    "collect": "components.data",
    "validate": "components.data",
    "train_tokenizer": "components.data",
    "prepare": "components.data",
    "pretrain": "components.training",
    "tune": "components.training",
    "evaluate": "components.evaluation",
}
"""The room of each stage; its module and its function have the stage's name."""


class Tracker(Protocol):
    """What a stage may say to the experiment tracker; none of it slows or fails the stage."""

    def params(self, values: Mapping[str, Any]) -> None: ...

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None: ...

    def dataset(self, name: str, digest: str, source: str, context: str) -> None: ...

    def table(self, name: str, columns: Mapping[str, list[Any]]) -> None: ...

    def artifact(self, path: Path) -> None: ...

    def figure(self, figure: Any, name: str) -> None: ...


@dataclass(frozen=True)
class StageRun:
    """Everything a stage function is given."""

    name: str
    params: Params
    paths: Paths
    state: Path
    """Folder for resumable checkpoints, keyed by the stage's inputs; outlives a killed or failed run."""
    tracker: Tracker

    def progress(self, done: int, total: int, **facts: float | str) -> None:
        """Say how far the stage is, in one line that a person and the orchestrator can read."""
        said = "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in facts.items())
        print(f"{self.name}  {done}/{total}  {said}".rstrip(), flush=True)


def stage_function(name: str) -> Any:
    return getattr(importlib.import_module(f"{ROOMS[name]}.{name}"), name)
