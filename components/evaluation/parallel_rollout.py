"""Many questions put to one model folder, on a CPU by a process for each core with one torch thread in each.

A small model's products gain little from a second thread (784 questions: 19.5 s with one, 17.3 s with two), a second
process halves the time (10.3 s). Each answer is what its question gets alone, so that parting them changes nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import TracebackType

import torch

from components.agent.agent import Agent
from components.config.model_settings import EvaluateConfig
from components.datasets.formats import Row
from components.evaluation.questions import Question, answer_questions
from components.inference.cache_plan import context_len
from components.models.checkpoint import load_decoder
from components.models.decoder import Decoder
from components.models.devices import SMALL_MODEL, best_device
from components.runtime.process import end_with_parent

MANY = 1000
"""Questions from which on it pays to start processes, each of which imports torch and loads the model."""
PROCESSES = 8
"""At most: each takes half a gigabyte of memory."""


class Answering:
    """A loaded model folder that answers; a context manager, which ends the processes that help."""

    def __init__(self, folder: Path, config: EvaluateConfig, cores: int | None = None) -> None:
        """Raises: InputError when the folder is not a readable agent."""
        self.model, self.agent = _load(folder)
        self._folder, self._config = folder, config
        here = self.model.embed.weight.device.type == "cpu" and self.model.num_parameters <= SMALL_MODEL
        self._most = min(PROCESSES, cores or os.cpu_count() or 1) - 1 if here else 0
        self._helpers: list[tuple[SpawnProcess, Connection]] = []

    def __enter__(self) -> Answering:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process, connection in self._helpers:
            connection.close()
            if kind is not None:
                process.terminate()
            process.join()
        self._helpers.clear()

    def prepare(self, count: int) -> None:
        """Start the processes that help with so many questions, where it pays; they load while this one goes on."""
        if count < MANY or self._helpers:
            return
        context = multiprocessing.get_context("spawn")
        for _ in range(self._most):
            ours, theirs = context.Pipe()
            process = context.Process(target=_help, args=(theirs, self._folder, self._config), daemon=True)
            process.start()
            theirs.close()
            self._helpers.append((process, ours))

    def __call__(
        self, questions: Sequence[Question], progress: Callable[..., None] = lambda *args, **facts: None
    ) -> list[Row]:
        """As `answer_questions`. Raises: RuntimeError when a process that helps has died."""
        parts = [list(questions[start :: len(self._helpers) + 1]) for start in range(len(self._helpers) + 1)]
        for (_, connection), part in zip(self._helpers, parts[1:], strict=True):
            connection.send(part)

        def tell(done: int, of: int, **_: float) -> None:
            whole = len(questions) * done // max(1, of)
            progress(whole, len(questions), answered=whole)

        threads = torch.get_num_threads()
        torch.set_num_threads(1 if self._helpers else threads)
        try:
            answered = [answer_questions(self.model, self.agent, parts[0], self._config, tell)]
        finally:
            torch.set_num_threads(threads)
        answered += [_received(connection) for _, connection in self._helpers]
        rows: list[Row] = [{} for _ in questions]
        for start, found in enumerate(answered):
            rows[start :: len(answered)] = found
        return rows


def _load(folder: Path) -> tuple[Decoder, Agent]:
    model = load_decoder(folder, device=best_device())
    return model, Agent.load(folder, context_len(model))


def _received(connection: Connection) -> list[Row]:
    try:
        told: list[Row] | Exception = connection.recv()
    except (EOFError, ConnectionError):
        raise RuntimeError("a process that helped to answer has died") from None
    if isinstance(told, Exception):
        raise told
    return told


def _help(connection: Connection, folder: Path, config: EvaluateConfig) -> None:
    """Answer what comes until nothing more can."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asks is told too, and ends this
    torch.set_num_threads(1)
    model, agent = _load(folder)
    while True:
        try:
            questions = connection.recv()
        except EOFError:
            return
        try:
            told: list[Row] | Exception = answer_questions(model, agent, questions, config)
        except Exception as error:  # noqa: BLE001 - raised by whoever asked
            told = error
        connection.send(told)
