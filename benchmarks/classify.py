"""What batching costs and gives: `python -m benchmarks.classify` asks `/v1/classify` by many clients at once.

A real server in a process of its own, over real HTTP; each client sends one text at a time, all at the same moment.
Beside it, in this process and with as many threads, one forward pass over the texts that came together, tokenizing
included. Without `--model` the classifier has random weights in the shape that `params.yaml` gives the encoder: what is
measured does not depend on what it learned.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pydoc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CLIENTS = 64
ROUNDS = 30
WARM = 10
"""Rounds before the clock counts."""
LABELS = 20
PATH = "/v1/classify"


def texts(count: int) -> list[str]:
    """First paragraphs of docstrings, as many as asked for."""
    import collections
    import inspect
    import string
    import textwrap

    sentences = []
    for module in (collections, inspect, json, os, statistics, string, subprocess, tempfile, textwrap, asyncio):
        for name in dir(module):
            first, rest = pydoc.splitdoc(pydoc.getdoc(getattr(module, name)))
            sentences.append(f"{first} {rest.partition(chr(10) * 2)[0]}".strip())
    return [text for text in dict.fromkeys(sentences) if len(text) > 20][:count]


def random_classifier(folder: Path, params: Path) -> Path:
    """A classifier that learned nothing, in the encoder's shape."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    from components.config.params import load_params
    from components.models.checkpoint import save_model
    from components.models.encoder import Classifier, EncoderConfig

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = ["[PAD]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(texts(2000), trainers.BpeTrainer(vocab_size=2048, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    spelled = folder.parent / "tokenizer"
    spelled.mkdir(parents=True)
    tokenizer.save(str(spelled / "tokenizer.json"))
    (spelled / "tokenizer_config.json").write_text('{"pad_token": "[PAD]"}')
    shape = load_params(params).model.encoder.model_dump()
    labels = tuple(f"label {number}" for number in range(LABELS))
    torch.manual_seed(0)
    save_model(Classifier(EncoderConfig(tokenizer.get_vocab_size(), **shape, labels=labels)), folder, spelled)
    return folder


@contextmanager
def serving(folder: Path, root: Path) -> Iterator[int]:
    """A server of that classifier in a project of its own while the block runs; gives its port."""
    from components.tracking.registry import Registry

    source = Path(__file__).parents[1]
    for name in ("params.yaml", "dvc.yaml"):
        (root / name).write_bytes((source / name).read_bytes())
    registry = Registry(root / "var")
    registry.promote(registry.register(folder, "classifier", {}, {}, None))
    command = [sys.executable, "-m", "loopwright", "serve", "--model", "classifier@champion", "--port", "0", "--json"]
    environment = {**os.environ, "LOOPWRIGHT_HOME": "var", "PYTHONPATH": str(source)}
    with subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(json.loads(process.stdout.readline())["url"].rpartition(":")[2])
        finally:
            process.terminate()


class Client:
    """One connection that is kept open; as little around the request as may be."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader | None = None

    async def connect(self) -> None:
        """Anew where the server has closed it: it does after some idle seconds."""
        if self._reader is None or self._reader.at_eof():
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)

    async def ask(self, method: str, path: str, body: bytes = b"") -> bytes:
        await self.connect()
        assert self._reader is not None
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        self._writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        header = (await self._reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = next(line for line in header.splitlines() if line.startswith("content-length:"))
        answer = await self._reader.readexactly(int(length.partition(":")[2]))
        assert " 200 " in header.splitlines()[0], answer
        return answer

    async def seconds(self, body: bytes) -> float:
        await self.connect()
        began = time.perf_counter()
        await self.ask("POST", PATH, body)
        return time.perf_counter() - began


async def measure(port: int, words: list[str], rounds: int) -> dict[str, Any]:
    """Latency of each request in rounds in which all clients ask at once, and the batches that were made of them."""
    clients = [Client(port) for _ in words]
    bodies = [json.dumps({"input": [text]}).encode() for text in words]

    async def go() -> list[float]:
        return list(await asyncio.gather(*(client.seconds(body) for client, body in zip(clients, bodies, strict=True))))

    for _ in range(WARM):
        await go()
    before = _batches(await clients[0].ask("GET", "/metrics"))
    taken = [seconds for _ in range(rounds) for seconds in await go()]
    after = _batches(await clients[0].ask("GET", "/metrics"))
    sizes = {size: int(after[size] - before[size]) for size in after}
    return {"p50_ms": 1e3 * statistics.median(taken), "p95_ms": 1e3 * sorted(taken)[int(0.95 * len(taken))]} | sizes


def _batches(metrics: bytes) -> dict[str, float]:
    """`loopwright_classify_batch_size` as counts of batches up to each size."""
    name, values, below = "loopwright_classify_batch_size", {}, 0.0
    for line in metrics.decode().splitlines():
        if line.startswith(f"{name}_bucket"):
            size = line.partition('le="')[2].partition('"')[0]
            count = float(line.rpartition(" ")[2])
            values[f"batches_to_{size}"], below = count - below, count
        if line.startswith((f"{name}_sum", f"{name}_count")):
            values[line.partition(" ")[0].rpartition("_")[2]] = float(line.rpartition(" ")[2])
    return values


def forward_ms(folder: Path, words: list[str], rounds: int) -> float:
    """One forward pass over all texts, tokenizing included: the median, in milliseconds."""
    from serving.engine.classifier_worker import ClassifierWorker
    from serving.observability.metrics import Metrics

    reader = ClassifierWorker.load(folder, "classifier/1", Metrics())
    taken = []
    for _ in range(rounds + 3):
        began = time.perf_counter()
        reader.texts.classify(words)
        taken.append(time.perf_counter() - began)
    return 1e3 * statistics.median(taken[3:])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.classify", description=__doc__)
    parser.add_argument("--model", type=Path, help="a classifier's folder; default: random weights")
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    params = Path(__file__).parents[1] / "params.yaml"
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        folder = (
            arguments.model.resolve() if arguments.model else random_classifier(root / "models" / "classifier", params)
        )
        words = texts(arguments.clients)
        with serving(folder, root) as port:
            measured = asyncio.run(measure(port, words, arguments.rounds))
        alone = forward_ms(folder, words, arguments.rounds)
    print(json.dumps(measured | {"forward_ms": alone, "p50_over_forward": measured["p50_ms"] / alone}, indent=2))


if __name__ == "__main__":
    main()
