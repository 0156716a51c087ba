"""Questions answered by several processes: on a CPU one for each core, with one torch thread in each.

A small model's products gain little from a second thread (784 questions: 19.5 s with one, 17.3 s with two), a second
process halves the time (10.3 s). Answers are independent, so that splitting the questions changes nothing.
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
from components.config.loop_settings import EvaluateConfig
from components.datasets.formats import Row
from components.evaluation.questions import Question, answer_questions
from components.inference.cache_plan import context_len
from components.inference.served_model import load_served
from components.models.checkpoint import check_model, load_decoder
from components.models.decoder import Decoder
from components.models.devices import SMALL_MODEL, best_device
from components.runtime.process import end_with_parent
from components.tokenization.hf_tokenizer import load_chat_tokenizer

MIN_QUESTIONS = 1000
"""Questions from which on starting processes pays: each imports torch and loads the model."""
MAX_PROCESSES = 8
"""Each takes half a gigabyte of memory."""


class ParallelRollout:
    """A loaded model folder that answers; a context manager, which ends the worker processes."""

    def __init__(self, folder: Path, config: EvaluateConfig, cores: int | None = None) -> None:
        """Raises: InputError when the folder is not a readable agent."""
        self.model, self.agent = load_agent(folder)
        self._folder, self._config = folder, config
        parallel = self.model.embed.weight.device.type == "cpu" and self.model.num_parameters <= SMALL_MODEL
        self._most = min(MAX_PROCESSES, cores or os.cpu_count() or 1) - 1 if parallel else 0
        self._workers: list[tuple[SpawnProcess, Connection]] = []

    def __enter__(self) -> ParallelRollout:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process, connection in self._workers:
            connection.close()
            if kind is not None:
                process.terminate()
            process.join()
        self._workers.clear()

    def prepare(self, count: int) -> None:
        """Start the workers for `count` questions, where it pays; they load while this process goes on."""
        if count < MIN_QUESTIONS or self._workers:
            return
        context = multiprocessing.get_context("spawn")
        for _ in range(self._most):
            connection, worker_connection = context.Pipe()
            process = context.Process(target=_work, args=(worker_connection, self._folder, self._config), daemon=True)
            process.start()
            worker_connection.close()
            self._workers.append((process, connection))

    def __call__(
        self, questions: Sequence[Question], progress: Callable[..., None] = lambda *args, **values: None
    ) -> list[Row]:
        """As `answer_questions`. Raises: RuntimeError when a worker has died."""
        count = len(self._workers) + 1
        parts = [list(questions[start::count]) for start in range(count)]
        for (_, connection), part in zip(self._workers, parts[1:], strict=True):
            connection.send(part)

        def report(done: int, of: int, **_: float) -> None:
            answered = len(questions) * done // max(1, of)
            progress(answered, len(questions), answered=answered)

        threads = torch.get_num_threads()
        torch.set_num_threads(1 if self._workers else threads)
        try:
            answers = [answer_questions(self.model, self.agent, parts[0], self._config, report)]
        finally:
            torch.set_num_threads(threads)
        answers += [_receive(connection) for _, connection in self._workers]
        rows: list[Row] = [{} for _ in questions]
        for start, part_answers in enumerate(answers):
            rows[start::count] = part_answers
        return rows


def load_agent(folder: Path) -> tuple[Decoder, Agent]:
    """A model folder as it is served, for answers alone.

    Raises: InputError when the folder is not a readable agent.
    """
    if sum(weight.numel() for weight in check_model(folder).parameters()) > SMALL_MODEL:
        model = load_served(folder, load_chat_tokenizer(folder))
    else:
        model = load_decoder(folder, device=best_device())
    return model, Agent.load(folder, context_len(model))


def _receive(connection: Connection) -> list[Row]:
    try:
        received: list[Row] | Exception = connection.recv()
    except (EOFError, ConnectionError):
        raise RuntimeError("a worker process of the evaluation has died") from None
    if isinstance(received, Exception):
        raise received
    return received


def _work(connection: Connection, folder: Path, config: EvaluateConfig) -> None:
    """Answer the parts that come until the connection is closed."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends this process
    torch.set_num_threads(1)
    model, agent = load_agent(folder)
    while True:
        try:
            questions = connection.recv()
        except EOFError:
            return
        try:
            result: list[Row] | Exception = answer_questions(model, agent, questions, config)
        except Exception as error:  # noqa: BLE001 - raised by the parent
            result = error
        connection.send(result)
