"""What HTTP and recording add to the engine: `python -m benchmarks.serving` (in `make bench`).

One model in this process, asked the same in turn: its engine directly, over HTTP with a store that forgets, and over
HTTP with requests and answers on record as `loopwright serve` keeps them. Metrics are on in both. Reported are the
medians, and the medians of what each way adds to the one before within a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx

    from components.feedback.store import Store
    from serving.engine import Engine
    from serving.state import Serving

ROUNDS = 300
WARM = 20
"""Questions to each endpoint before the clock counts."""
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}


def forgetful(home: Path) -> Store:
    """A store that writes nothing."""
    from components.feedback.store import Answered, Store

    class Forgetful(Store):
        def add_request(self, completion_id: str, model: str, body: Any) -> None:
            """Forget it."""

        def add_answer(self, completion_id: str, answer: Answered) -> None:
            """Forget it."""

    return Forgetful.of(home)


@contextmanager
def listening(serving: Serving) -> Iterator[str]:
    """The public routes over real HTTP while the block runs."""
    import uvicorn

    from serving.api import new_api
    from serving.edge import Edge
    from serving.server import listen

    api = new_api()
    api.state.serving = serving
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(Edge(api, api), log_config=None, access_log=False, lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1/chat/completions"
    finally:
        server.should_exit = True
        thread.join()


def ask(client: httpx.Client, url: str) -> float:
    """Milliseconds of one answered question."""
    began = time.perf_counter()
    client.post(url, json=BODY).raise_for_status()
    return 1000 * (time.perf_counter() - began)


def ask_engine(engine: Engine) -> float:
    """Milliseconds of the same question, asked without HTTP."""
    from serving.engine import Ask, Failed, Finished

    ended = threading.Event()
    began = time.perf_counter()
    ask = Ask(BODY["messages"], rules=engine.agent.rules(), max_tokens=BODY["max_tokens"])
    engine.submit(ask, lambda event: ended.set() if isinstance(event, Finished | Failed) else None)
    ended.wait()
    return 1000 * (time.perf_counter() - began)


def measure(folder: Path, home: Path, rounds: int) -> dict[str, float]:
    """Medians in milliseconds; the three ways take turns, so that noise meets all."""
    import httpx

    from components.config import SCALES_FILE, load_params
    from serving.metrics import Metrics
    from serving.state import Serving
    from serving.versions import Bundled

    config = load_params(SCALES_FILE.parents[1] / "params.yaml").serve
    kept = Serving.open(home, config, "", Bundled(folder, {"name": "agent", "version": 1}))
    kept.wait()
    with ExitStack() as stack:
        stack.callback(kept.close)
        store = forgetful(home)
        stack.callback(store.close)
        urls = [stack.enter_context(listening(one)) for one in (kept, replace(kept, store=store, metrics=Metrics()))]
        client = stack.enter_context(httpx.Client(timeout=60))
        engine = kept.models.engine
        assert engine is not None
        for _ in range(WARM):
            for url in urls:
                ask(client, url)
        times = [[ask_engine(engine), *(ask(client, url) for url in reversed(urls))] for _ in range(rounds)]
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
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.home) as scratch:
        print(json.dumps(measure(given.model, Path(scratch), given.rounds)))


if __name__ == "__main__":
    main()
