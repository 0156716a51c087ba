"""A loaded encoder-decoder that serves: it makes a text of the one message of each request."""

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
    Completion,
    DeadlineExceeded,
    Failure,
    GenerationRequest,
    GenerationTask,
    Notify,
    QueuedBackend,
    Start,
)

WARM = "Warm up."

logger = logging.getLogger("loopwright.writers")


class SummarizerWorker(QueuedBackend):
    """One version of an encoder-decoder; a thread reads the texts that may begin, several at once."""

    task: Task = "summarize"

    def __init__(self, texts: Summarizer, name: str, config: ServeConfig) -> None:
        super().__init__(None, name, config)
        self.texts = texts
        self._begun: queue.SimpleQueue[GenerationTask | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"{name}-writer", daemon=True)
        self._thread.start()

    @classmethod
    def load(cls, folder: Path, name: str, config: ServeConfig) -> SummarizerWorker:
        """Load a model folder and write once, so that the first real text is not slow.

        Raises: InputError when the folder holds no usable encoder-decoder.
        """
        texts = Summarizer.load(folder)
        use_threads(threads_for(texts.model.num_parameters))
        texts.write([WARM])
        return cls(texts, name, config)

    @property
    def context_len(self) -> int:
        """Tokens that are read of a text."""
        return self.texts.max_seq_len

    def _new_task(self, request: GenerationRequest, notify: Notify) -> GenerationTask:
        return GenerationTask(self, request, notify)

    def _start(self, task: GenerationTask) -> None:
        self._begun.put(task)

    def _stop(self) -> None:
        self._begun.put(None)

    def _join(self) -> None:
        self._thread.join()

    def _work(self) -> None:
        use_threads(threads_for(self.texts.model.num_parameters))
        while (task := self._begun.get()) is not None:
            tasks = [task]
            while not self._begun.empty() and (task := self._begun.get()) is not None:
                tasks.append(task)
            try:
                self._answer(tasks)
            except Exception as error:
                logger.exception("%s could not write", self.name)
                for task in tasks:
                    task.notify(Failure(error))
            for task in tasks:
                self.let_go()
                self.done(task)

    def _answer(self, tasks: list[GenerationTask]) -> None:
        begun = [task for task in tasks if self._begin(task)]
        written = self.texts.written([str(task.request.messages[0]["content"]) for task in begun])
        for task, one in zip(begun, written, strict=True):
            limit = task.request.max_tokens
            cut = limit is not None and len(one.ids) > limit
            task.tell(self.texts.decode(one.ids[:limit]) if cut else one.text)
            reason = "cancelled" if task.cancelled.is_set() else "stop" if one.ended and not cut else "length"
            said = "".join(task.said)
            task.notify(Completion(said, [], [], reason, one.source_tokens, len(one.ids[:limit])))

    def _begin(self, task: GenerationTask) -> bool:
        """Tell whether a request can be answered, itself too."""
        tokens = self.texts.count(str(task.request.messages[0]["content"]))
        if task.cancelled.is_set():
            task.notify(Completion("", [], [], "cancelled", 0, 0))
        elif task.late:
            task.notify(Failure(DeadlineExceeded()))
        elif tokens > self.context_len:
            message = f"messages: {tokens} tokens; {self.name} reads {self.context_len}: send less"
            task.notify(Failure(ContextTooLong(message)))
        else:
            task.notify(Start())
            return True
        return False
