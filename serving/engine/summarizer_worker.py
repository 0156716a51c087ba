"""A loaded encoder-decoder: summarizes the one message of each request."""

from __future__ import annotations

import logging
import queue
import threading
from pathlib import Path

from components.agent.agent import ContextTooLong
from components.config.loop_settings import ServeConfig
from components.inference.summarizer import Summarizer
from components.models.devices import threads_for, use_threads
from components.runtime.model_tasks import Task
from serving.engine.backend import (
    Backend,
    Completion,
    DeadlineExceeded,
    Failure,
    GenerationRequest,
    GenerationTask,
    Notify,
    Start,
)

WARM = "Warm up."

logger = logging.getLogger("loopwright.writers")


class SummarizerWorker(Backend):
    """One version of an encoder-decoder; a thread summarizes the started requests in batches."""

    task: Task = "summarize"

    def __init__(self, texts: Summarizer, name: str, config: ServeConfig) -> None:
        super().__init__(None, name, config)
        self.texts, self.model = texts, texts.model
        self._started: queue.SimpleQueue[GenerationTask | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"{name}-writer", daemon=True)
        self._thread.start()

    @classmethod
    def load(cls, folder: Path, name: str, config: ServeConfig) -> SummarizerWorker:
        """Load a model folder and summarize one text as a warm-up.

        Raises: InputError when the folder holds no usable encoder-decoder.
        """
        texts = Summarizer.load(folder)
        use_threads(threads_for(texts.model.num_parameters))
        texts.write([WARM])
        return cls(texts, name, config)

    @property
    def context_len(self) -> int:
        """Tokens of a source at most."""
        return self.texts.max_seq_len

    def _new_task(self, request: GenerationRequest, notify: Notify) -> GenerationTask:
        return GenerationTask(self, request, notify)

    def _start(self, task: GenerationTask) -> None:
        self._started.put(task)

    def _stop(self) -> None:
        self._started.put(None)

    def _join(self) -> None:
        self._thread.join()

    def _work(self) -> None:
        use_threads(threads_for(self.texts.model.num_parameters))
        while (task := self._started.get()) is not None:
            tasks = [task]
            while not self._started.empty() and (task := self._started.get()) is not None:
                tasks.append(task)
            try:
                self._answer(tasks)
            except Exception as error:
                logger.exception("%s failed", self.name)
                for task in tasks:
                    task.notify(Failure(error))
            for task in tasks:
                self.release_slot()
                self.finish(task)

    def _answer(self, tasks: list[GenerationTask]) -> None:
        accepted = [task for task in tasks if self._accept(task)]
        summaries = self.texts.generate([str(task.request.messages[0]["content"]) for task in accepted])
        for task, summary in zip(accepted, summaries, strict=True):
            ids = summary.ids[: task.request.max_tokens]
            cut = len(ids) < len(summary.ids)
            task.send_text(self.texts.decode(ids) if cut else summary.text)
            reason = "cancelled" if task.cancelled.is_set() else "stop" if summary.ended and not cut else "length"
            task.notify(Completion("".join(task.text), [], [], reason, summary.source_tokens, len(ids)))

    def _accept(self, task: GenerationTask) -> bool:
        """Start a request, or end it where it is cancelled, late or too long."""
        tokens = self.texts.count(str(task.request.messages[0]["content"]))
        if task.cancelled.is_set():
            task.notify(Completion("", [], [], "cancelled", 0, 0))
        elif task.expired:
            task.notify(Failure(DeadlineExceeded()))
        elif tokens > self.context_len:
            message = f"messages: {tokens} tokens; {self.name} takes {self.context_len} at most; send less"
            task.notify(Failure(ContextTooLong(message)))
        else:
            task.notify(Start())
            return True
        return False
