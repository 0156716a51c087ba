"""The endpoint under random load for minutes: `python -m benchmarks.soak [--minutes 10]`.

Clients stream answers over real HTTP, with seeds, stop strings, limits and tools that take their time; some go away in
the middle. Every whole answer must be what the same request got alone before, every broken-off one a beginning of it;
no request may fail, and once warm the server's memory may not grow.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx

CLIENTS = 32
QUESTIONS = 160
"""Different requests, each asked alone first."""
WORDS = ("Hello", "Thanks!", "A story", "Who are you?", "What can you do?", "What does json.dumps do?")
SYMBOLS = ("json.dumps", "os.path.join", "collections.OrderedDict", "textwrap.wrap", "csv.reader", "math.sqrt")
GONE_SHARE = 0.25
"""Of the requests, whose client goes away in the middle."""
WARM_SHARE = 0.3
"""Of the time, after which memory may not grow."""
MAX_GROWTH = 0.02


def question(number: int) -> dict[str, Any]:
    """The body of a request; the same number, the same body."""
    dice = random.Random(number)
    questions = [
        dice.choice(WORDS),
        f"What is {dice.randint(2, 99)}*{dice.randint(2, 99)}?",
        f"What does {dice.choice(SYMBOLS)} do?",
        f"Which class does {dice.choice(SYMBOLS)} extend?",
    ]
    messages = [{"role": "user", "content": dice.choice(questions)}]
    if dice.random() < 0.3:
        before = [{"role": "user", "content": dice.choice(questions)}, {"role": "assistant", "content": "As you say."}]
        messages = [{"role": "system", "content": "You help people with the standard library."}, *before, *messages]
    body: dict[str, Any] = {"messages": messages, "stream": True, "seed": number, "max_tokens": dice.randint(1, 90)}
    if dice.random() < 0.5:
        body |= {"temperature": dice.choice([0.3, 1.0, 2.0]), "top_p": dice.choice([1.0, 0.8])}
    if dice.random() < 0.3:
        body["stop"] = dice.sample(["e", ". ", " the", "is", "o w"], 2)
    return body


def serve(folder: Path, home: Path) -> None:
    """The endpoint on a port of its own, its tools slowed, until standard input ends."""
    from components.agent.tools import Tool
    from components.config.params import SCALES_FILE, load_params
    from serving.models.state import Serving
    from serving.models.versions import Bundled
    from serving.server import serve_in_thread

    def slowed(tool: Tool) -> Tool:
        def function(**arguments: Any) -> str:
            time.sleep(random.random() / 10)
            return tool.function(**arguments)

        return replace(tool, function=function)

    config = load_params(SCALES_FILE.parents[2] / "params.yaml").serve
    config = config.model_copy(update={"requests_per_minute": 10**6})
    serving = Serving.open(home, config, "", Bundled(folder, {"name": "agent", "version": 1}))
    serving.models.first.wait()
    engine = serving.models.engine
    if engine is None:
        raise serving.models.error or RuntimeError("no engine")
    engine.agent.own_tools = tuple(slowed(tool) for tool in engine.agent.own_tools)
    with serve_in_thread(serving) as address:
        print(f"{address}/v1/chat/completions", flush=True)
        sys.stdin.read()
    serving.close()


@contextmanager
def served(folder: Path, home: Path) -> Iterator[tuple[str, int]]:
    """Address and process id of an endpoint while the block runs."""
    command = [sys.executable, "-m", "benchmarks.soak", "--serve", "--model", str(folder), "--home", str(home)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        url = process.stdout.readline().strip()
        if not url:
            raise RuntimeError("the endpoint did not start")
        yield url, process.pid
    finally:
        process.communicate()


def ask(client: httpx.Client, url: str, body: dict[str, Any], pieces: int | None = None) -> tuple[str, str, Any]:
    """Text, reason of the end, steps; after so many `pieces` the client goes away and the reason is "gone"."""
    text, reason, steps, seen = "", "", [], 0
    with client.stream("POST", url, json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise RuntimeError(chunk["error"]["message"])
            choice = chunk["choices"][0]
            text += choice["delta"].get("content") or ""
            steps += choice["delta"].get("steps", [])
            reason = choice["finish_reason"] or ""
            seen += 1
            if pieces is not None and seen > pieces and not reason:
                return text, "gone", steps
    return text, reason, steps


class Soak:
    """Clients, what they saw, and what it should have been."""

    def __init__(self, url: str, process: int, alone: list[tuple[str, str, Any]]) -> None:
        self.url, self.process, self.alone = url, process, alone
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.memory: list[float] = []
        self._over = threading.Event()

    def run(self, seconds: float) -> None:
        import psutil

        clients = [threading.Thread(target=self._client, args=(number,)) for number in range(CLIENTS)]
        for client in clients:
            client.start()
        ends, process = time.monotonic() + seconds, psutil.Process(self.process)
        while time.monotonic() < ends:
            time.sleep(min(2.0, seconds / 60))
            self.memory.append(process.memory_info().rss)
        self._over.set()
        for client in clients:
            client.join()

    def _client(self, number: int) -> None:
        import httpx

        dice = random.Random(number)
        with httpx.Client(timeout=120) as client:
            while not self._over.is_set():
                which = dice.randrange(len(self.alone))
                pieces = dice.randint(0, 12) if dice.random() < GONE_SHARE else None
                try:
                    self._compare(which, ask(client, self.url, question(which), pieces))
                except Exception as error:  # noqa: BLE001 - whatever it is, it is counted
                    self.counts["errors"] += 1
                    self.wrong.append(f"{which}: {type(error).__name__}: {error}")

    def _compare(self, which: int, outcome: tuple[str, str, Any]) -> None:
        text, reason, steps = outcome
        expected = self.alone[which]
        self.counts[reason] += 1
        self.counts["tool calls"] += len(steps) // 2
        same = expected[0].startswith(text) if reason == "gone" else outcome == expected
        if not same:
            self.counts["different"] += 1
            self.wrong.append(f"{which}: {outcome} instead of {expected}")

    def growth(self) -> float:
        """Of memory, from the first tenth behind the warm-up to the last tenth."""
        warm = self.memory[int(len(self.memory) * WARM_SHARE) :]
        tenth = max(1, len(warm) // 10)
        return statistics.median(warm[-tenth:]) / statistics.median(warm[:tenth]) - 1


def soak(folder: Path, home: Path, minutes: float) -> dict[str, Any]:
    import httpx

    with served(folder, home) as (url, process):
        with httpx.Client(timeout=120) as client:
            alone = [ask(client, url, question(number)) for number in range(QUESTIONS)]
        run = Soak(url, process, alone)
        run.run(minutes * 60)
    return {
        "minutes": minutes,
        "answers": dict(run.counts),
        "errors": run.counts["errors"],
        "different_from_alone": run.counts["different"],
        "memory_mb": round(run.memory[-1] / 2**20),
        "memory_growth": round(run.growth(), 4),
        "first_wrong": run.wrong[:3],
        "ok": not run.wrong and run.growth() <= MAX_GROWTH,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("data/models/agent"), help="a model folder")
    parser.add_argument("--home", type=Path, help="state folder; default: a temporary one")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.model, arguments.home)
        return
    with tempfile.TemporaryDirectory(dir=arguments.home) as scratch:
        result = soak(arguments.model, Path(scratch), arguments.minutes)
    print(json.dumps(result))
    sys.exit(not result["ok"])


if __name__ == "__main__":
    main()
