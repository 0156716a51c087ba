"""Honest clients beside half-sent requests: `python -m benchmarks.slow_clients --slow 1000`.

A real endpoint in a process of its own serves a tiny random model. Clients ask it in turn, first alone, then while
another process keeps so many connections open that never finish their request, and opens new ones for those that the
endpoint has closed, at most `--rate` a second. Prints the 95th percentile of the answers' times in milliseconds and the
endpoint's memory in MiB.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

CLIENTS = 4
TICK_SECONDS = 0.1
HALF = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Le"
BODY = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}).encode()


def make_model(folder: Path) -> Path:
    """A model folder of random weights."""
    import torch

    from components.models.checkpoint import save_decoder
    from components.models.decoder import Decoder, DecoderConfig
    from components.tokenization import chat_tokenizer as bpe
    from components.tokenization.hf_tokenizer import load_chat_tokenizer

    bpe.save(bpe.train(["Hello, how are you today?"] * 9, 360), folder / "tokenizer")
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=load_chat_tokenizer(folder / "tokenizer").vocab_size,
        embed_dim=32,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        hidden_dim=48,
        max_seq_len=256,
        qk_norm=True,
    )
    agent = folder / "agent"
    save_decoder(Decoder(config), agent, folder / "tokenizer", {"agent.json": '{"tools": [], "max_steps": 1}'})
    return agent


def serve(folder: Path, home: Path, limit: int | None) -> None:
    """Serve a model folder in this process until it is killed, with a limit of connections; prints the address."""
    from components.config.params import SCALES_FILE, load_params
    from serving import server
    from serving.models.state import Serving
    from serving.models.versions import Bundled

    limits = {f"serve.{name}": limit for name in ("max_connections", "max_connections_per_client") if limit}
    config = load_params(SCALES_FILE.parents[2] / "params.yaml", limits).serve
    serving = Serving.open(home, config, "", Bundled(folder, {"name": "agent", "version": 1}))
    server.serve(serving, server.listen("127.0.0.1", 0), server.announce_json)


def hold(address: tuple[str, int], count: int, rate: float, opened: Any) -> None:
    """Keep so many half-sent requests open until the process ends; `opened` counts all that were opened."""
    allow_open_files()
    poll, sockets = select.poll(), dict[int, socket.socket]()
    while True:
        for _ in range(min(count - len(sockets), round(rate * TICK_SECONDS))):
            with suppress(OSError):
                connection = socket.create_connection(address, timeout=10)
                sockets[connection.fileno()] = connection
                poll.register(connection, select.POLLIN)
                connection.sendall(HALF)
                opened.value += 1
        time.sleep(TICK_SECONDS)
        for number, _ in poll.poll(0):
            poll.unregister(number)
            sockets.pop(number).close()


@contextmanager
def slow(address: tuple[str, int], count: int, rate: float) -> Iterator[Any]:
    """Keep slow connections open while the block runs, from another process; yields the number of those opened."""
    context = multiprocessing.get_context("spawn")
    opened = context.Value("i", 0)
    process = context.Process(target=hold, args=(address, count, rate, opened), daemon=True)
    process.start()
    try:
        while opened.value < count:
            time.sleep(TICK_SECONDS)
        yield opened
    finally:
        process.terminate()
        process.join()


def allow_open_files() -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def ask(address: tuple[str, int]) -> float:
    """Milliseconds of one answer on a connection of its own."""
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address[0]}\r\nContent-Type: application/json\r\n"
    head += f"Connection: close\r\nContent-Length: {len(BODY)}\r\n\r\n"
    began = time.perf_counter()
    with socket.create_connection(address, timeout=60) as connection:
        connection.sendall(head.encode() + BODY)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 200 "), answer[:200]
    return 1000 * (time.perf_counter() - began)


def measure(address: tuple[str, int], process: psutil.Process, requests: int) -> dict[str, float]:
    times: list[float] = []

    def client() -> None:
        times.extend(ask(address) for _ in range(requests // CLIENTS))

    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    p95 = statistics.quantiles(times, n=20)[-1]
    return {"answers": len(times), "p95_ms": p95, "memory_mib": process.memory_info().rss / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.slow_clients", description=__doc__)
    parser.add_argument("--slow", type=int, default=1000, help="half-sent requests that are open at once")
    parser.add_argument("--rate", type=float, default=500, help="slow connections that are opened in a second")
    parser.add_argument("--limit", type=int, help="serve.max_connections and max_connections_per_client")
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.home, arguments.limit)
        return
    allow_open_files()
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_model(Path(scratch))
        command = [sys.executable, "-m", "benchmarks.slow_clients", "--serve", str(folder), "--home", f"{scratch}/var"]
        command += ["--limit", str(arguments.limit)] if arguments.limit else []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            port = int(json.loads(process.stdout.readline())["url"].rpartition(":")[2])
            address, server = ("127.0.0.1", port), psutil.Process(process.pid)
            measure(address, server, requests=40)  # warm
            print(json.dumps({"slow": 0, **measure(address, server, arguments.requests)}), flush=True)
            with slow(address, arguments.slow, arguments.rate) as opened:
                row = measure(address, server, arguments.requests)
                held = len(server.net_connections()) - 1
                print(json.dumps({"slow": arguments.slow, "held": held, "opened": opened.value, **row}), flush=True)
            process.terminate()


if __name__ == "__main__":
    main()
