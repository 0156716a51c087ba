"""Several models in one process: each is computed with the torch threads that pay for its size."""

from __future__ import annotations

import asyncio
import os
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from components.config.params import load_params
from components.models import devices
from serving.engine.backend import Completion, Failure, GenerationRequest
from serving.engine.classifier_worker import ClassifierWorker
from serving.engine.local import LocalEngine
from serving.engine.summarizer_worker import SummarizerWorker
from serving.observability.metrics import Metrics

CONFIG = load_params(Path(__file__).parents[2] / "params.yaml").serve
MANY = 3
"""Cores that the test's machine seems to have: another number than one, and than it has."""
QUESTION = "add"


@pytest.fixture
def loaders(
    agent_folder: Path, classifier_folder: Path, summarizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Callable[[], Any]]:
    monkeypatch.setattr(os, "cpu_count", lambda: MANY)
    monkeypatch.setattr(devices, "SMALL_MODEL", 60_000)
    return {
        "agent": lambda: LocalEngine.load(agent_folder, "agent/1", CONFIG),
        "classifier": lambda: ClassifierWorker.load(classifier_folder, "classifier/1", Metrics()),
        "summarizer": lambda: SummarizerWorker.load(summarizer_folder, "summarizer/1", CONFIG),
    }


@pytest.fixture
def threads() -> Iterator[Callable[[torch.nn.Module], set[int]]]:
    """Numbers of threads that the parts of a model were computed with since the last time."""
    seen: list[tuple[torch.nn.Module, int]] = []
    hook = register_module_forward_pre_hook(lambda module, _: seen.append((module, torch.get_num_threads())))

    def of(model: torch.nn.Module) -> set[int]:
        parts = set(model.modules())
        return {count for module, count in seen if module in parts}

    of.forget = seen.clear  # type: ignore[attr-defined]
    yield of
    hook.remove()


def model_of(loaded: Any) -> Any:
    return loaded.model if isinstance(loaded, LocalEngine) else loaded.texts.model


def ask(loaded: Any) -> None:
    if isinstance(loaded, ClassifierWorker):
        asyncio.run(loaded.classify([QUESTION]))
        asyncio.run(loaded.embed([QUESTION]))
        return
    told: queue.Queue[Any] = queue.Queue()
    loaded.submit(GenerationRequest([{"role": "user", "content": QUESTION}], max_tokens=2), told.put)
    while not isinstance(event := told.get(timeout=60), Completion):
        assert not isinstance(event, Failure), event


def test_batches_of_one_cpu_divide_its_threads(agent_folder: Path, loaders: Any, threads: Any) -> None:
    """Each has computed when the engine is loaded."""
    before = torch.get_num_threads()
    config = CONFIG.model_copy(update={"devices": ["cpu", "cpu"]})
    with ThreadPoolExecutor(1) as follower:
        engine = follower.submit(LocalEngine.load, agent_folder, "agent/1", config).result()
    try:
        first, second = engine.router.models
        assert threads(second) == {MANY // 2}
        assert MANY // 2 in threads(first)
    finally:
        engine.close()
        torch.set_num_threads(before)


@pytest.mark.parametrize("order", list(permutations(["agent", "classifier", "summarizer"])), ids="-".join)
def test_each_model_keeps_its_threads(order: tuple[str, ...], loaders: Any, threads: Any) -> None:
    """Each is loaded, and asked, on a thread of its own; one of them is large."""
    before = torch.get_num_threads()
    served = {}
    for name in order:
        with ThreadPoolExecutor(1) as follower:
            served[name] = follower.submit(loaders[name]).result()
    threads.forget()
    try:
        for loaded in served.values():
            with ThreadPoolExecutor(1) as requests:
                requests.submit(ask, loaded).result()
        found = {name: threads(model_of(loaded)) for name, loaded in served.items()}
        assert found == {"agent": {MANY}, "classifier": {1}, "summarizer": {1}}
    finally:
        for loaded in served.values():
            loaded.close()
        torch.set_num_threads(before)
