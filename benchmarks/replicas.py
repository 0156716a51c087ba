"""Endpoints behind haproxy on one PostgreSQL, while everything happens to them: `python -m benchmarks.replicas`.

Clients hold conversations of three turns, some streamed, through promotions, rollbacks, a replica that is killed, one
that is stopped in order, and restarts of the database. No request that is not streamed may fail, no stream may name two
versions, no promotion may change the version of a conversation, and a key's limit has to hold over all replicas. Needs
the server programs of PostgreSQL and haproxy, and the extra `postgres`.

`--throughput` compares answers a second of one replica and of all, in front of a model server whose answers take
`ANSWER_SECONDS` each, eight at a time for a replica: what is left is what replicas share, their processors included.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.postgres_server import PostgresServer
from components.runtime.service_registry import wait_for
from flows.orchestration.prefect_server import free_port

if TYPE_CHECKING:
    import httpx

ROOT = Path(__file__).parent.parent
TURNS = 3
STREAMED_SHARE = 0.3
LIMIT = 600
"""Requests a minute of the key whose limit is measured."""
ANSWER_SECONDS = 1.0
SETTINGS = "{follow_seconds: 0.5, handover_seconds: 10.0, notice_seconds: 7.0, max_waiting: 256}"


class Endpoint:
    """One replica: a process of `loopwright serve` on a port that it keeps."""

    def __init__(self, project: Path, database: str, wrapper: Sequence[str] = ()) -> None:
        """`wrapper`: words before the command."""
        self._project, self.port, self._wrapper = project, free_port(), wrapper
        self._environment = {**os.environ, "LOOPWRIGHT_DATABASE_URL": database, "LOOPWRIGHT_HOME": "var"}
        self.start()

    def start(self) -> None:
        command = [*self._wrapper, sys.executable, "-m", "loopwright", "serve", "--port", str(self.port), "--json"]
        with (self._project / f"{self.port}.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self._project, env=self._environment, stdout=subprocess.PIPE, stderr=log
            )

    def wait(self) -> None:
        assert self.process.stdout is not None
        if not self.process.stdout.readline():
            raise RuntimeError(f"a replica did not start; see {self._project}/{self.port}.log")

    def restart(self, number: signal.Signals) -> int:
        """End the process by a signal and start another, which `wait` waits for; returns its exit code."""
        code = self.stop(number)
        self.start()
        return code

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """End the process by a signal, by default in order; returns its exit code."""
        self.process.send_signal(number)  # without effect on one that has ended
        code = self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


@contextmanager
def balanced(ports: Sequence[int], log: Path) -> Iterator[str]:
    """The address of haproxy before replicas, with the configuration of `deploy/`."""
    port = free_port()
    servers = {f"LOOPWRIGHT_REPLICA_{number}": f"127.0.0.1:{each}" for number, each in enumerate(ports, 1)}
    lines = (ROOT / "deploy" / "haproxy.cfg").read_text(encoding="utf-8").splitlines()
    listed = [line for line in lines if "LOOPWRIGHT_REPLICA_" not in line or any(name in line for name in servers)]
    configuration = log.with_suffix(".cfg")
    configuration.write_text("\n".join([*listed, ""]), encoding="utf-8")
    environment = {**os.environ, **servers, "LOOPWRIGHT_BIND": f"127.0.0.1:{port}"}
    with log.open("wb") as file:
        command = ["haproxy", "-db", "-f", str(configuration)]
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@contextmanager
def replica_set(project: Path, database: str, replicas: int) -> Iterator[tuple[list[Endpoint], str]]:
    """Endpoints that answer, and the address of haproxy before them."""
    with ExitStack() as stack:
        endpoints = [Endpoint(project, database) for _ in range(replicas)]
        for endpoint in endpoints:
            stack.callback(endpoint.stop)
        for endpoint in endpoints:
            endpoint.wait()
        log = project / "haproxy.log"
        url = stack.enter_context(balanced([endpoint.port for endpoint in endpoints], log))
        if not wait_for(f"{url}/readyz", 20.0):
            raise RuntimeError(f"haproxy does not answer: {log.read_text()}")
        yield endpoints, url


class Load:
    """Clients, and what they saw."""

    def __init__(self, url: str, key: str) -> None:
        self._url, self._headers = url, {"Authorization": f"Bearer {key}"}
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.texts: dict[str, set[str]] = defaultdict(set)
        """The answers to the first turn, by the version that gave them: one each."""
        self.rollbacks: list[float] = []
        """By `time.monotonic()`."""
        self.over = threading.Event()
        self._lock = threading.Lock()

    def run(self, clients: int, events: Callable[[], None]) -> None:
        threads = [threading.Thread(target=self._client, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        try:
            events()
        finally:
            self.over.set()
            for thread in threads:
                thread.join()

    def _client(self, number: int) -> None:
        import httpx

        dice = random.Random(number)
        with httpx.Client(timeout=120, headers=self._headers) as client:
            while not self.over.is_set():
                self._converse(client, dice)

    def _converse(self, client: httpx.Client, dice: random.Random) -> None:
        messages: list[dict[str, str]] = []
        began, versions = time.monotonic(), []
        for turn in range(TURNS):
            messages.append({"role": "user", "content": f"Hello {dice.randrange(10**6)}" if turn else "Hello"})
            streamed = dice.random() < STREAMED_SHARE
            try:
                models, text = self._ask(client, messages, streamed)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is counted
                with self._lock:
                    self.counts["failed streams" if streamed else "failed requests"] += 1
                    self.failures.append(f"{'stream' if streamed else 'request'}: {type(error).__name__}: {error}")
                return
            with self._lock:
                self.counts["streams" if streamed else "requests"] += 1
                self.counts["mixed streams"] += len(models) != 1
                if not turn:
                    self.texts[models[0]].add(text)
            versions.append(models[0])
            messages.append({"role": "assistant", "content": text})
            time.sleep(dice.uniform(0.0, 1.0))
        with self._lock:
            self.counts["conversations"] += 1
            rolled_back = any(began - 5 < moment for moment in self.rollbacks)
            changed = len(set(versions)) != 1
            self.counts["changed by a rollback" if rolled_back else "changed versions"] += changed

    def _ask(self, client: httpx.Client, messages: list[dict[str, str]], streamed: bool) -> tuple[list[str], str]:
        """The versions that an answer names, and its text."""
        import httpx

        body = {"model": "agent", "messages": messages, "stream": streamed, "max_tokens": 16}
        if not streamed:
            try:
                response = client.post(f"{self._url}/v1/chat/completions", json=body)
            except httpx.RemoteProtocolError:  # as OpenAI's clients do
                with self._lock:
                    self.counts["repeated by the client"] += 1
                response = client.post(f"{self._url}/v1/chat/completions", json=body)
            response.raise_for_status()
            answer = response.json()
            return [answer["model"]], answer["choices"][0]["message"]["content"]
        models, text, ended = set(), "", False
        with client.stream("POST", f"{self._url}/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                ended = ended or line == "data: [DONE]"
                if line.startswith("data: {"):
                    chunk = json.loads(line.removeprefix("data: "))
                    models.add(chunk["model"])
                    text += chunk["choices"][0]["delta"].get("content") or ""
        if not ended:
            raise RuntimeError("the stream ended early")
        return sorted(models), text


def count_allowed(url: str, key: str, over: threading.Event) -> Callable[[], dict[str, float]]:
    """Send requests with a limited key from four threads until `over`; then the returned function compares."""
    import httpx

    statuses: Counter[int] = Counter()
    began, ended = time.monotonic(), list[float]()

    def send() -> None:
        with httpx.Client(timeout=60, headers={"Authorization": f"Bearer {key}"}) as client:
            while not over.is_set():
                statuses[client.get(f"{url}/v1/models").status_code] += 1
                time.sleep(0.04)
        ended.append(time.monotonic())

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()

    def result() -> dict[str, float]:
        for thread in threads:
            thread.join()
        due = LIMIT + LIMIT / 60 * (max(ended) - began)
        return {"allowed": statuses[200], "due": round(due, 1), "ratio": round(statuses[200] / due, 4)}

    return result


def write_settings(folder: Path, settings: str = SETTINGS) -> None:
    """Make a folder the project of endpoints with these settings."""
    for name in ("params.yaml", "dvc.yaml"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    with (folder / "params.yaml").open("a") as params:
        params.write(f"\nserve: {settings}\n")


@contextmanager
def slow_model() -> Iterator[str]:
    """The address of a model server whose answers take `ANSWER_SECONDS`."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    async def models(_request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "agent", "object": "model"}]})

    async def answer(_request: Request) -> Response:
        await asyncio.sleep(ANSWER_SECONDS)
        choice = {"index": 0, "delta": {"role": "assistant", "content": "Hi."}, "finish_reason": "stop"}
        chunk = json.dumps({"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 1}})
        return Response(f"data: {chunk}\n\ndata: [DONE]\n\n", media_type="text/event-stream")

    routes = [Route("/v1/models", models), Route("/v1/chat/completions", answer, methods=["POST"])]
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.should_exit = True
        thread.join()


def throughput(folder: Path, scratch: Path, replicas: int, clients: int, seconds: float) -> dict[str, Any]:
    """Answers a second of `replicas` endpoints, of which each asks for eight answers at a time."""
    import httpx

    from components.feedback.store import Store
    from components.tracking.registry import Registry

    done: list[float] = []
    over = threading.Event()
    with ExitStack() as stack:
        backend = f"backend: openai, backend_url: '{stack.enter_context(slow_model())}', backend_model: agent"
        write_settings(scratch, f"{{{backend}, max_running: 8, max_waiting: 256, requests_per_minute: 1000000}}")
        registry = Registry(scratch / "var")
        registry.promote(registry.register(folder, "agent", {}, {}, None))
        database = PostgresServer()
        stack.callback(database.close)
        store = Store(database.url)
        stack.callback(store.close)
        _, key = store.create_key("clients", ["predict"], 10**6)
        _, url = stack.enter_context(replica_set(scratch, database.url, replicas))

        def ask() -> None:
            with httpx.Client(timeout=120, headers={"Authorization": f"Bearer {key}"}) as client:
                while not over.is_set():
                    body = {"model": "agent", "messages": [{"role": "user", "content": "Hello"}]}
                    client.post(f"{url}/v1/chat/completions", json=body).raise_for_status()
                    done.append(time.monotonic())

        threads = [threading.Thread(target=ask) for _ in range(clients)]
        for thread in threads:
            thread.start()
        time.sleep(5.0)  # until all places are taken
        began = time.monotonic()
        time.sleep(seconds)
        ended = time.monotonic()
        over.set()
        for thread in threads:
            thread.join()
    rate = sum(began <= moment <= ended for moment in done) / (ended - began)
    return {"replicas": replicas, "answers a second": round(rate, 2), "possible": 8 * replicas / ANSWER_SECONDS}


def restart_in_turn(endpoints: Sequence[Endpoint]) -> int:
    """Stop and start the last endpoint once the first answers again; returns the exit code of the stopped one."""
    endpoints[0].wait()
    code = endpoints[-1].restart(signal.SIGTERM)
    endpoints[-1].wait()
    return code


def trial(folders: Sequence[Path], scratch: Path, replicas: int, clients: int, rounds: int) -> dict[str, Any]:
    """Register two model folders as versions of `agent`, serve them and let everything happen, `rounds` times."""
    from components.feedback.store import Store
    from components.tracking.registry import Registry

    write_settings(scratch)
    registry = Registry(scratch / "var")
    versions = [registry.register(folder, "agent", {}, {}, None) for folder in folders]
    registry.promote(versions[0])
    with ExitStack() as stack:
        database = PostgresServer()
        stack.callback(database.close)
        store = Store(database.url)
        _, key = store.create_key("clients", ["predict"], 10**6)
        _, limited = store.create_key("limited", ["predict"], LIMIT)
        endpoints, url = stack.enter_context(replica_set(scratch, database.url, replicas))
        load = Load(url, key)
        allowed = count_allowed(url, limited, load.over)
        codes: list[int] = []

        def events() -> None:
            for _ in range(rounds):
                registry.promote(versions[1])
                time.sleep(5.0)
                endpoints[0].restart(signal.SIGKILL)
                database.stop()
                database.start()
                time.sleep(2.0)
                load.rollbacks.append(time.monotonic())
                registry.rollback("agent")
                time.sleep(2.0)
                load.rollbacks.append(time.monotonic())
                codes.append(restart_in_turn(endpoints))

        began = time.monotonic()
        load.run(clients, events)
        seconds = time.monotonic() - began
        limit = allowed()
        codes += [endpoint.stop() for endpoint in endpoints]
        store.close()
    counts = load.counts
    return {
        "replicas": replicas,
        "clients": clients,
        "seconds": round(seconds, 1),
        **{name: counts[name] for name in ("requests", "failed requests", "streams", "failed streams")},
        **{name: counts[name] for name in ("mixed streams", "conversations", "changed versions")},
        **{name: counts[name] for name in ("changed by a rollback", "repeated by the client")},
        "texts by version": {model: len(texts) for model, texts in sorted(load.texts.items())},
        "limit": limit,
        "exit codes": codes,
        "failures": load.failures[:10],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replicas", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("data/models/agent"), help="the first version")
    parser.add_argument("--second", type=Path, help="the second version; default: the same again")
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--throughput", action="store_true")
    arguments = parser.parse_args()
    if arguments.throughput:
        rates = []
        for replicas in (1, arguments.replicas):
            with tempfile.TemporaryDirectory() as scratch:
                rates.append(throughput(arguments.model, Path(scratch), replicas, arguments.clients, 30.0))
            print(json.dumps(rates[-1]), flush=True)
        share = rates[1]["answers a second"] / rates[0]["answers a second"] / arguments.replicas
        print(f"{share:.3f} x {arguments.replicas} replicas' throughput")
        return
    with tempfile.TemporaryDirectory() as scratch:
        folders = [arguments.model, arguments.second or arguments.model]
        result = trial(folders, Path(scratch), arguments.replicas, arguments.clients, arguments.rounds)
    print(json.dumps(result, indent=1))
    ok = not result["failed requests"] and not result["mixed streams"] and not result["changed versions"]
    sys.exit(not (ok and abs(result["limit"]["ratio"] - 1) <= 0.02))


if __name__ == "__main__":
    main()
