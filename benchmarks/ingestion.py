"""What taking in votes costs behind many old ones, and what each write of the store costs.

    python -m benchmarks.ingestion

Prints median and 95th percentile of the store's three writes beside a bare synced write of the same disk, and the
seconds that ingesting 1,000 new votes takes with none and with 100,000 old ones (medians of five, gate included).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from components.config.loop_settings import FeedbackConfig
from components.feedback.ingest import ingest, write_revocations
from components.feedback.ledger import DAY_SECONDS
from components.feedback.store import AnswerRecord, Store
from components.feedback.tables import ANSWERS, FEEDBACK, REQUESTS
from components.validation.validate import Validator

ROOT = Path(__file__).parents[1]
CONFIG = FeedbackConfig(max_items=10_000, max_items_per_user=500, improve_after=20)
STEPS = [
    {"type": "call", "name": "lookup", "arguments": {"name": "json.dumps"}},
    {"type": "result", "name": "lookup", "content": "Serialize obj to a JSON formatted str."},
]
ANSWER = AnswerRecord("json.dumps serializes obj to a JSON formatted str.", "stop", 60, 20, 0.2, STEPS)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--old", type=int, default=100_000, help="old votes behind which the new ones come")
    parser.add_argument("--new", type=int, default=1_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, seconds in writes(Path(folder) / "writes"):
            median, late = 1000 * statistics.median(seconds), 1000 * sorted(seconds)[int(0.95 * len(seconds))]
            print(f"{name:<14} median {median:6.3f} ms   95th percentile {late:6.3f} ms")
        few, many = ingestions(Path(folder), arguments.old, arguments.new)
        for old, runs in ((0, few), (arguments.old, many)):
            print(
                f"{arguments.new} new votes behind {old:>7} old ones: {statistics.median(runs):.3f} s  {rounded(runs)}"
            )
        print(f"ratio {statistics.median(many) / statistics.median(few):.3f}")


def writes(home: Path, count: int = 1_000) -> Iterator[tuple[str, list[float]]]:
    """Seconds of each kind of write."""
    store = Store.of(home)
    body = {"messages": [{"role": "user", "content": "What does json.dumps do?"}]}
    requests, answers, votes = [], [], []
    for number in range(count):
        name = f"chatcmpl-{number}"
        requests.append(_timed(lambda name=name: store.add_request(name, "agent/1", body)))
        answers.append(_timed(lambda name=name: store.add_answer(name, ANSWER)))
        votes.append(_timed(lambda name=name: _vote(store, name)))
    store.close()
    with (home / "bare").open("ab") as file:

        def bare() -> None:
            file.write(b"x" * 4096)
            file.flush()
            os.fdatasync(file.fileno())

        yield "bare write", [_timed(bare) for _ in range(count)]
    yield from (("add_request", requests), ("add_answer", answers), ("add_feedback", votes))


def ingestions(folder: Path, old: int, new: int, runs: int = 5) -> tuple[list[float], list[float]]:
    """Seconds of ingesting `new` votes with no old ones and with `old` ones, by turns."""
    validator = Validator(ROOT / "data/expectations")

    def take(home: Path) -> None:
        store = Store.of(home)
        while ingest(store, home / "feedback", CONFIG, lambda rows: validator.failing(rows, "feedback")).partition:
            pass
        write_revocations(store, home / "feedback")
        store.waiting()
        store.close()

    full = folder / "full"
    speak(full, 0, old, time.time() - 30 * DAY_SECONDS)
    take(full)
    store = Store.of(full)
    store.add_improvement(store.last_accepted_sequence(), "agent/2", "promoted", "learned")
    store.close()
    few, many = [], []
    for run in range(runs + 1):
        empty = folder / f"empty-{run}"
        speak(empty, 0, new)
        few.append(_timed(lambda empty=empty: take(empty)))
        speak(full, old + run * new, new)
        many.append(_timed(lambda: take(full)))
    return few[1:], many[1:]


def speak(home: Path, first: int, count: int, when: float | None = None) -> None:
    """So many requests with answers and votes, of a thousand voices, written at once."""
    store = Store.of(home)
    now = time.time() if when is None else when
    for start in range(first, first + count, 10_000):
        numbers = range(start, min(start + 10_000, first + count))
        with store._write() as connection:
            bodies = [{"messages": [{"role": "user", "content": f"What does module.f{n} do?"}]} for n in numbers]
            rows = zip(numbers, bodies, strict=True)
            connection.execute(
                REQUESTS.insert(),
                [{"id": f"c{n}", "created": now, "model": "agent/1", "body": body} for n, body in rows],
            )
            connection.execute(
                ANSWERS.insert(), [{"request_id": f"c{n}", "created": now, **vars(ANSWER)} for n in numbers]
            )
            connection.execute(
                FEEDBACK.insert(),
                [
                    {
                        "id": f"fb-{n}",
                        "completion_id": f"c{n}",
                        "created": now,
                        "rating": "down",
                        "correction": f"It does {n}.",
                        "voice": f"user:{n % 1000}",
                    }
                    for n in numbers
                ],
            )
    store.close()


def rounded(seconds: list[float]) -> list[float]:
    return [round(value, 3) for value in seconds]


def _vote(store: Store, name: str) -> None:
    store.add_feedback(name, "down", "It writes JSON.", "too long", f"key-{name}", "user:a")


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
