"""What HTTP and recording add to the engine: `python -m benchmarks.serving` (in `make bench`).

One model in this process, asked the same in turn: its engine directly, over HTTP with a store that forgets, and over
HTTP with requests and answers on record as `loopwright serve` keeps them. Metrics are on in both. Reported are the
medians, and the medians of what each way adds to the one before within a round. Who asks writes bytes into a socket
that stays open: a client library would take longer than what is measured.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import tempfile
import threading
import time
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from components.feedback.store import Store
    from serving.engine.local import LocalEngine

ROUNDS = 300
WARM = 20
"""Questions to each endpoint before the clock counts."""
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}


def forgetful(home: Path) -> Store:
    """A store that writes nothing."""
    from components.feedback.store import AnswerRecord, Store

    class Forgetful(Store):
        def add_exchange(
            self,
            completion_id: str,
            model: str,
            body: Any,
            created: float,
            answer: AnswerRecord,
            pictures: Any = (),
            owner: str = "",
        ) -> None:
            """Forget it."""

    return Forgetful.of(home)


class Client:
    """One connection that is kept."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._answers = self._socket.makefile("rb")
        body = json.dumps(BODY).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        self._request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    def ask(self) -> float:
        """Milliseconds of one answered question."""
        began = time.perf_counter()
        self._socket.sendall(self._request)
        assert self._answers.readline().startswith(b"HTTP/1.1 200 ")
        length = 0
        while (line := self._answers.readline()) != b"\r\n":
            name, _, value = line.partition(b":")
            length = int(value) if name.lower() == b"content-length" else length
        self._answers.read(length)
        return 1000 * (time.perf_counter() - began)

    def close(self) -> None:
        self._answers.close()
        self._socket.close()


def ask_engine(engine: LocalEngine) -> float:
    """Milliseconds of the same question, asked without HTTP."""
    from serving.engine.backend import Completion, Failure, GenerationRequest

    ended = threading.Event()
    began = time.perf_counter()
    ask = GenerationRequest(BODY["messages"], rules=engine.agent.rules(), max_tokens=BODY["max_tokens"])
    engine.submit(ask, lambda event: ended.set() if isinstance(event, Completion | Failure) else None)
    ended.wait()
    return 1000 * (time.perf_counter() - began)


def measure(folder: Path, home: Path, rounds: int) -> dict[str, float]:
    """Medians in milliseconds; the three ways take turns, so that noise meets all."""
    from components.config.params import SCALES_FILE, load_params
    from serving.models.state import Serving
    from serving.models.versions import Bundled
    from serving.observability.metrics import Metrics
    from serving.server import serve_in_thread

    config = load_params(SCALES_FILE.parents[2] / "params.yaml").serve
    recording = Serving.open(home, config, "", Bundled(folder, {"name": "agent", "version": 1}))
    recording.wait()
    with ExitStack() as stack:
        stack.callback(recording.close)
        store = forgetful(home)
        stack.callback(store.close)
        endpoints = (replace(recording, store=store, metrics=Metrics()), recording)
        urls = [stack.enter_context(serve_in_thread(endpoint)) for endpoint in endpoints]
        clients = [stack.enter_context(closing(Client(int(url.rpartition(":")[2])))) for url in urls]
        engine = recording.models.engine
        assert engine is not None
        for _ in range(WARM):
            for client in clients:
                client.ask()
        times = [[ask_engine(engine), *(client.ask() for client in clients)] for _ in range(rounds)]
    alone, without, with_store = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "engine_ms": alone,
        "http_ms": without,
        "http_and_store_ms": with_store,
        "http_adds_ms": statistics.median(http - engine for engine, http, _ in times),
        "store_adds_ms": statistics.median(stored - http for _, http, stored in times),
        "both_add_ms": statistics.median(stored - engine for engine, _, stored in times),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("data/models/agent"), help="a model folder")
    parser.add_argument("--home", type=Path, help="state folder on the disk to measure; default: a temporary one")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.home) as scratch:
        print(json.dumps(measure(arguments.model, Path(scratch), arguments.rounds)))


if __name__ == "__main__":
    main()
