"""Registered models as tools of the agent, available while they have a champion and loaded at the first call."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

from components.agent.tools import Tool
from components.config.errors import reason_of
from components.config.loop_settings import ModelTool
from components.config.secrets import hidden
from components.inference.classifier import TextClassifier
from components.inference.summarizer import Summarizer
from components.models.devices import threads_for, use_threads
from components.tracking.registry import ModelVersion, Registry

LONGEST_PAUSE_SECONDS = 60.0
"""Longest interval of looks at the registry while it does not answer."""

logger = logging.getLogger("loopwright.model_tools")


class ModelTools:
    """The tools of the models `names`, whose champions are looked up every `seconds`.

    Requests do not wait for a registry on another machine, and keep the known tools while it does not answer.
    """

    def __init__(self, registry: Registry, names: Sequence[ModelTool], seconds: float) -> None:
        self._registry, self._names, self._seconds = registry, tuple(names), seconds
        # The permissions: a model's folder is read, and downloaded from a remote registry.
        self._tools = {
            name: Tool.of(function, permissions=("files", "network"))
            for name, function in (("classifier", self.classify), ("summarizer", self.summarize))
        }
        self._next, self._failures = 0.0, 0
        self._updating = threading.Lock()
        self._etag: object = None
        self._champions: dict[ModelTool, ModelVersion] = {}
        self._loaded: dict[ModelTool, tuple[str, Any]] = {}
        """`NAME/VERSION` and the model."""
        self._loading = threading.Lock()
        if self._names and self._registry.stamp() is None:
            self._update(None)

    def tools(self) -> list[Tool]:
        """The tools of the models that have a champion now."""
        if self._names and time.monotonic() >= self._next and not self._updating.locked():
            etag = self._registry.stamp()
            if etag is None:
                threading.Thread(target=self._update, args=(None,), name="model-tools", daemon=True).start()
            else:
                self._update(etag)
        return [self._tools[name] for name in self._champions]

    def _update(self, etag: object) -> None:
        if not self._updating.acquire(blocking=False):
            return
        try:
            if etag is None or etag != self._etag:
                champions = {name: self._registry.find(f"{name}@champion") for name in self._names}
                self._champions = {name: version for name, version in champions.items() if version is not None}
                self._etag = etag
            self._failures = 0
        except Exception as error:  # noqa: BLE001 - no error of the registry fails an answer
            self._failures += 1
            logger.warning("serve.model_tools: %s; the known tools stay", hidden(reason_of(error)))
        finally:
            longest = max(self._seconds, LONGEST_PAUSE_SECONDS)
            self._next = time.monotonic() + min(longest, self._seconds * 2.0 ** min(self._failures, 16))
            self._updating.release()

    def classify(self, text: str) -> str:
        """The label of a text, as the registered classifier was taught to give it."""
        classifier: TextClassifier = self._model("classifier", TextClassifier)
        return classifier.classify([text])[0].label

    def summarize(self, code: str) -> str:
        """What a function does, in one line, from its source text."""
        summarizer: Summarizer = self._model("summarizer", Summarizer)
        return summarizer.write([code])[0]

    def _model(self, name: ModelTool, kind: Any) -> Any:
        version = self._champions[name]
        with self._loading:
            if name not in self._loaded or self._loaded[name][0] != str(version):
                self._loaded[name] = (str(version), kind.load(version.folder))
            model = self._loaded[name][1]
        use_threads(threads_for(model.model.num_parameters))
        return model
