"""Registered models as tools of the agent: each is there while it has a champion, and loaded at its first call."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from components.agent.tools import Tool
from components.config import ModelTool
from components.prediction.texts import TextReader
from components.registry import ModelVersion, Registry


class ModelTools:
    """The tools of the models `names`; which has a champion is looked up every `seconds`."""

    def __init__(self, registry: Registry, names: Sequence[ModelTool], seconds: float) -> None:
        self._registry, self._names, self._seconds = registry, tuple(names), seconds
        # A model's folder is read, and fetched where the registry is a server.
        self._tools = {"classifier": Tool.of(self.classify, touches=("files", "network"))}
        self._looked = -seconds
        self._champions: dict[str, ModelVersion] = {}
        self._readers: dict[str, TextReader] = {}
        """By `NAME/VERSION`; one of each name."""
        self._loading = threading.Lock()

    def tools(self) -> list[Tool]:
        """Those of models that can be called now."""
        if self._names and time.monotonic() - self._looked >= self._seconds:
            found = {name: self._registry.find(f"{name}@champion") for name in self._names}
            self._champions = {name: version for name, version in found.items() if version is not None}
            self._looked = time.monotonic()
        return [self._tools[name] for name in self._champions]

    def classify(self, text: str) -> str:
        """The label of a text, as the registered classifier was taught to give it."""
        return self._reader(self._champions["classifier"]).classify([text])[0].label

    def _reader(self, version: ModelVersion) -> TextReader:
        with self._loading:
            if str(version) not in self._readers:
                self._readers = {str(version): TextReader.load(version.folder)}
            return self._readers[str(version)]
