"""A loaded encoder-decoder that serves: it takes chats as the engine does, and makes a text of the one in each."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from pathlib import Path

from components.agent.agent import ContextTooLong
from components.config.loop_settings import ServeConfig
from components.inference.summarizer import TextWriter
from serving.engine.local import Ask, Failed, Finished, Full, Late, Notify, Retired, Started, Text, Ticket
from serving.http.errors import ApiError
from serving.http.schemas import ChatRequest

WARM = "Warm up."
UNSUPPORTED = ("tools", "tool_choice", "response_format", "temperature", "top_p", "stop")

logger = logging.getLogger("loopwright.writers")


def source_of(body: ChatRequest, name: str) -> Ask:
    """What a chat asks of a writer.

    Raises: ApiError for whatever it cannot do.
    """
    asked = next((field for field in UNSUPPORTED if getattr(body, field, None)), None)
    if asked is not None:
        raise ApiError(400, f"{asked}: {name} has no use for it; leave it out", "unsupported_parameter", asked)
    if len(body.messages) != 1 or body.messages[0].role != "user":
        message = f"messages: {len(body.messages)}: {name} reads one text; send it as one message of role user"
        raise ApiError(400, message, "invalid_value", "messages")
    return Ask([body.messages[0].plain()], max_tokens=body.token_limit)


class Writer:
    """One version of an encoder-decoder; a thread reads what waits, several texts at once, and writes of each."""

    def __init__(self, texts: TextWriter, name: str, config: ServeConfig) -> None:
        self.texts, self.name = texts, name
        self.loaded = int(time.time())
        self.tool_names: frozenset[str] = frozenset()
        self._together, self._seconds = config.max_running, config.request_seconds
        self._room = config.max_running + config.max_waiting
        self._waiting: deque[Ticket] = deque()
        self._running: list[Ticket] = []
        self._changed = threading.Condition()
        self._retired = False
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

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, ask: Ask, notify: Notify, first: bool = False) -> Ticket:
        """As the engine's.

        Raises: Full, Retired.
        """
        ticket = Ticket(ask, notify, time.monotonic() + self._seconds, lambda _: None)
        with self._changed:
            if self._retired:
                raise Retired
            if self.waiting + self.running >= self._room and not first:
                raise Full(1)
            self._waiting.insert(0 if first else len(self._waiting), ticket)
            self._changed.notify()
        return ticket

    def retire(self) -> None:
        """Take no more requests; finish those that are here, then let go of the thread."""
        with self._changed:
            self._retired = True
            self._changed.notify()

    def close(self) -> None:
        """Retire, cancel what waits and wait for the thread."""
        self.retire()
        with self._changed:
            for ticket in self._waiting:
                ticket.cancel()
        self._thread.join()

    def _work(self) -> None:
        while tickets := self._next():
            try:
                self._answer(tickets)
            except Exception as error:
                logger.exception("%s could not write", self.name)
                for ticket in tickets:
                    ticket.notify(Failed(error))
            with self._changed:
                self._running = []

    def _next(self) -> list[Ticket]:
        """Those that wait, as many as are read together; none at the end."""
        with self._changed:
            while not self._waiting and not self._retired:
                self._changed.wait()
            while self._waiting and len(self._running) < self._together:
                self._running.append(self._waiting.popleft())
            return list(self._running)

    def _answer(self, tickets: list[Ticket]) -> None:
        begun = [ticket for ticket in tickets if self._begin(ticket)]
        written = self.texts.written([str(ticket.ask.messages[0]["content"]) for ticket in begun])
        for ticket, one in zip(begun, written, strict=True):
            limit = ticket.ask.max_tokens
            cut = limit is not None and len(one.ids) > limit
            text = self.texts.decode(one.ids[:limit]) if cut else one.text
            reason = "cancelled" if ticket.cancelled.is_set() else "stop" if one.ended and not cut else "length"
            ticket.notify(Text(text))
            ticket.notify(Finished(text, [], [], reason, one.source_tokens, len(one.ids[:limit])))

    def _begin(self, ticket: Ticket) -> bool:
        """Tell whether a request can be answered, itself too."""
        tokens = self.texts.count(str(ticket.ask.messages[0]["content"]))
        if ticket.late:
            ticket.notify(Failed(Late()))
        elif tokens > self.context_len:
            message = f"messages: {tokens} tokens; {self.name} reads {self.context_len}: send less"
            ticket.notify(Failed(ContextTooLong(message)))
        else:
            ticket.notify(Started())
            return True
        return False
