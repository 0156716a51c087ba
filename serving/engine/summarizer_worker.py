"""A loaded encoder-decoder that serves: it makes a text of the one message of each request."""

from __future__ import annotations

import logging
import queue
import threading
from pathlib import Path

from components.agent.agent import ContextTooLong
from components.config.loop_settings import ServeConfig
from components.inference.summarizer import TextWriter
from components.runtime.model_tasks import Task
from serving.engine.backend import Ask, Failed, Finished, Late, Notify, QueuedBackend, Started, Ticket

WARM = "Warm up."

logger = logging.getLogger("loopwright.writers")


class Writer(QueuedBackend):
    """One version of an encoder-decoder; a thread reads the texts that may begin, several at once."""

    task: Task = "summarize"

    def __init__(self, texts: TextWriter, name: str, config: ServeConfig) -> None:
        super().__init__(None, name, config)
        self.texts = texts
        self._begun: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"{name}-writer", daemon=True)
        self._thread.start()

    @classmethod
    def load(cls, folder: Path, name: str, config: ServeConfig) -> Writer:
        """Load a model folder and write once, so that the first real text is not slow.

        Raises: InputError when the folder holds no usable encoder-decoder.
        """
        texts = TextWriter.load(folder)
        texts.write([WARM])
        return cls(texts, name, config)

    @property
    def context_len(self) -> int:
        """Tokens that are read of a text."""
        return self.texts.max_seq_len

    def _ticket(self, ask: Ask, notify: Notify) -> Ticket:
        return Ticket(self, ask, notify)

    def _start(self, ticket: Ticket) -> None:
        self._begun.put(ticket)

    def _stop(self) -> None:
        self._begun.put(None)

    def _join(self) -> None:
        self._thread.join()

    def _work(self) -> None:
        while (ticket := self._begun.get()) is not None:
            tickets = [ticket]
            while not self._begun.empty() and (ticket := self._begun.get()) is not None:
                tickets.append(ticket)
            try:
                self._answer(tickets)
            except Exception as error:
                logger.exception("%s could not write", self.name)
                for ticket in tickets:
                    ticket.notify(Failed(error))
            for ticket in tickets:
                self.let_go()
                self.done(ticket)

    def _answer(self, tickets: list[Ticket]) -> None:
        begun = [ticket for ticket in tickets if self._begin(ticket)]
        written = self.texts.written([str(ticket.ask.messages[0]["content"]) for ticket in begun])
        for ticket, one in zip(begun, written, strict=True):
            limit = ticket.ask.max_tokens
            cut = limit is not None and len(one.ids) > limit
            ticket.tell(self.texts.decode(one.ids[:limit]) if cut else one.text)
            reason = "cancelled" if ticket.cancelled.is_set() else "stop" if one.ended and not cut else "length"
            said = "".join(ticket.said)
            ticket.notify(Finished(said, [], [], reason, one.source_tokens, len(one.ids[:limit])))

    def _begin(self, ticket: Ticket) -> bool:
        """Tell whether a request can be answered, itself too."""
        tokens = self.texts.count(str(ticket.ask.messages[0]["content"]))
        if ticket.cancelled.is_set():
            ticket.notify(Finished("", [], [], "cancelled", 0, 0))
        elif ticket.late:
            ticket.notify(Failed(Late("no slot became free within serve.request_seconds; try again later")))
        elif tokens > self.context_len:
            message = f"messages: {tokens} tokens; {self.name} reads {self.context_len}: send less"
            ticket.notify(Failed(ContextTooLong(message)))
        else:
            ticket.notify(Started())
            return True
        return False
