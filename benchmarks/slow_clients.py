"""Honest clients beside half-sent requests or unread answers: `python -m benchmarks.slow_clients --slow 1000`.

A real endpoint in a process of its own serves a tiny random model. Clients ask it in turn, first alone, then while
another thread keeps so many connections open that never finish their request (with `--unread`: that read no answer),
and once a second opens a new one for each that the endpoint has closed. Prints the 95th percentile of the answers'
times in milliseconds and the endpoint's memory in MiB.
"""

from __future__ import annotations

import argparse
import json
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

import psutil

CLIENTS = 4
REOPEN_SECONDS = 1.0
HALF = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Le"
UNREAD = b"GET /openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 300
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


def serve(folder: Path, home: Path) -> None:
    """Serve a model folder in this process until it is killed; prints the address."""
    from components.config.params import SCALES_FILE, load_params
    from serving import server
    from serving.models.state import Serving
    from serving.models.versions import Bundled

    config = load_params(SCALES_FILE.parents[2] / "params.yaml").serve
    serving = Serving.open(home, config, "", Bundled(folder, {"name": "agent", "version": 1}))
    server.serve(serving, server.listen("127.0.0.1", 0), server.announce_json)


@contextmanager
def slow(address: tuple[str, int], count: int, sent: bytes) -> Iterator[list[int]]:
    """Keep connections open that sent this, while the block runs; yields a list whose number counts what was opened."""
    opened, stop = [0], threading.Event()

    def open_one(poll: select.poll, sockets: dict[int, socket.socket]) -> None:
        connection = socket.create_connection(address, timeout=10)
        connection.sendall(sent)
        sockets[connection.fileno()] = connection
        poll.register(connection, select.POLLIN if sent == HALF else 0)  # else only of its end
        opened[0] += 1

    def run() -> None:
        poll, sockets = select.poll(), dict[int, socket.socket]()
        while not stop.is_set():
            for _ in range(count - len(sockets)):
                with suppress(OSError):
                    open_one(poll, sockets)
            stop.wait(REOPEN_SECONDS)
            for number, _ in poll.poll(0):
                poll.unregister(number)
                sockets.pop(number).close()
        for connection in sockets.values():
            connection.close()

    thread = threading.Thread(target=run)
    thread.start()
    while opened[0] < count:
        time.sleep(0.01)
    try:
        yield opened
    finally:
        stop.set()
        thread.join()


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
    parser.add_argument("--unread", action="store_true", help="whole requests instead, whose answers are not read")
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--home", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.home)
        return
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_model(Path(scratch))
        command = [sys.executable, "-m", "benchmarks.slow_clients", "--serve", str(folder), "--home", f"{scratch}/var"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            port = int(json.loads(process.stdout.readline())["url"].rpartition(":")[2])
            address, server = ("127.0.0.1", port), psutil.Process(process.pid)
            measure(address, server, requests=40)  # warm
            print(json.dumps({"slow": 0, **measure(address, server, arguments.requests)}), flush=True)
            with slow(address, arguments.slow, UNREAD if arguments.unread else HALF) as opened:
                row = measure(address, server, arguments.requests)
                print(json.dumps({"slow": arguments.slow, "opened": opened[0], **row}), flush=True)
            process.terminate()


if __name__ == "__main__":
    main()
