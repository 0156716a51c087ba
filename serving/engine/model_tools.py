"""Registered models as tools of the agent: each is there while it has a champion, and loaded at its first call."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

from components.agent.tools import Tool
from components.config.loop_settings import ModelTool
from components.inference.classifier import TextClassifier
from components.inference.summarizer import Summarizer
from components.models.devices import threads_for, use_threads
from components.tracking.registry import ModelVersion, Registry


class ModelTools:
    """The tools of the models `names`; which has a champion is looked up every `seconds`."""

    def __init__(self, registry: Registry, names: Sequence[ModelTool], seconds: float) -> None:
        self._registry, self._names, self._seconds = registry, tuple(names), seconds
        functions = {"classifier": self.classify, "summarizer": self.summarize}
        # A model's folder is read, and fetched where the registry is a server.
        self._tools = {
            name: Tool.of(function, permissions=("files", "network")) for name, function in functions.items()
        }
        self._looked = -seconds
        self._stamp: object = None
        self._champions: dict[ModelTool, ModelVersion] = {}
        self._loaded: dict[ModelTool, tuple[str, Any]] = {}
        """`NAME/VERSION` and the model."""
        self._loading = threading.Lock()

    def tools(self) -> list[Tool]:
        """Those of models that can be called now."""
        if self._names and time.monotonic() - self._looked >= self._seconds:
            self._looked, stamp = time.monotonic(), self._registry.stamp()
            if stamp is None or stamp != self._stamp:
                found = {name: self._registry.find(f"{name}@champion") for name in self._names}
                self._champions = {name: version for name, version in found.items() if version is not None}
                self._stamp = stamp
        return [self._tools[name] for name in self._champions]

    def classify(self, text: str) -> str:
        """The label of a text, as the registered classifier was taught to give it."""
        reader: TextClassifier = self._model("classifier", TextClassifier)
        return reader.classify([text])[0].label

    def summarize(self, code: str) -> str:
        """What a function does, in one line, from its source text."""
        writer: Summarizer = self._model("summarizer", Summarizer)
        return writer.write([code])[0]

    def _model(self, name: ModelTool, kind: Any) -> Any:
        version = self._champions[name]
        with self._loading:
            if name not in self._loaded or self._loaded[name][0] != str(version):
                self._loaded[name] = (str(version), kind.load(version.folder))
            model = self._loaded[name][1]
        use_threads(threads_for(model.model.num_parameters))
        return model
