"""The disk through many improvements: `python -m benchmarks.improvements [--rounds 30]`.

A clone of this project is run at scale smoke and served. In each round a user corrects the answers to one kind of
question, all different; the corrections are ingested, an improvement is made of them, promoted or refused, and the
default retention policy is applied, as the schedules do. Prints what the clone takes on disk after each round, by
place, and the growth a round since the tenth. A round stands for a day: of Prefect's events, which it keeps for seven
days whatever their number, seven rounds stay.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from ruamel.yaml import YAML

from flows.orchestration.prefect_server import prefect_api

ROOT = Path(__file__).parent.parent
REFUSED = 3
"""Exit code of an improvement that the gate refuses."""
SETTLED = 10
"""Rounds after which the disk has to be flat."""
PLACES = (".dvc/cache", "data", "var/feedback.db", "var/mlflow", "var/prefect", "var/bentoml", "var/logs", "var")
EVENT_DAYS = 7
"""Prefect's default."""
VERBS = ("greet", "call", "visit", "help", "thank", "teach")
PEOPLE = ("visitor", "guest", "member", "neighbour", "player")
KINDS = [(verb, person) for verb in VERBS for person in PEOPLE]


def command(root: Path, environment: Mapping[str, str], *words: str, allowed: int = 0) -> Any:
    """The JSON document of a command of the project that ends with 0 or the `allowed` status."""
    line = [sys.executable, "-m", "loopwright", *words, "--json"]
    ended = subprocess.run(line, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode not in (0, allowed):
        raise SystemExit(f"loopwright {' '.join(words)}: status {ended.returncode}\n{ended.stderr}{ended.stdout}")
    return json.loads(ended.stdout)


@contextmanager
def endpoint(root: Path, environment: Mapping[str, str]) -> Iterator[httpx.Client]:
    line = [sys.executable, "-m", "loopwright", "serve", "--port", "0", "--json"]
    with subprocess.Popen(line, cwd=root, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            with httpx.Client(base_url=json.loads(process.stdout.readline())["url"], timeout=120) as client:
                yield client
        finally:
            process.send_signal(signal.SIGINT)


def correct(client: httpx.Client, verb: str, person: str, count: int) -> None:
    """Ask for one kind of thing, and correct every answer to the same words."""
    for number in range(count):
        messages = [{"role": "user", "content": f"Please {verb} {person} number {number}."}]
        answered = client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 24})
        answered.raise_for_status()
        vote = {"completion_id": answered.json()["id"], "rating": "down", "correction": f"I {verb} you, {person}."}
        client.post("/v1/feedback", json=vote).raise_for_status()


def megabytes(path: Path) -> float:
    """What a file or folder takes on disk; a file with several names counts once."""
    sizes = {}
    for file in (path, *path.rglob("*")):
        if file.is_file() and not file.is_symlink():
            status = file.stat()
            sizes[status.st_ino] = 512 * status.st_blocks
    return round(sum(sizes.values()) / 1e6, 1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.improvements", description=__doc__)
    parser.add_argument("--rounds", type=int, default=len(KINDS))
    parser.add_argument("--corrections", type=int, default=40, help="in each round")
    parser.add_argument("--day", type=float, default=120.0, help="seconds that a round takes on this machine")
    arguments = parser.parse_args()
    foreign = ("LOOPWRIGHT_", "PREFECT_", "MLFLOW_", "BENTOML_", "DVC_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "project"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(root)], check=True)
        command(root, environment, "run", "--scale", "smoke")
        text = YAML()
        params = text.load(root / "params.yaml")
        # Enough for so small a model to learn the words of a round.
        params["align"] = {"dataset": "feedback", "max_steps": 200, "learning_rate": 0.01, "trained_share": 0.5}
        params["feedback"] = {"max_items_per_user": 10_000}  # one person corrects all
        text.dump(params, root / "params.yaml")
        os.environ["PREFECT_HOME"] = environment["PREFECT_HOME"] = str(root / "var/prefect")
        os.environ |= {
            "PREFECT_SERVER_EVENTS_RETENTION_PERIOD": f"PT{EVENT_DAYS * arguments.day:.0f}S",
            "PREFECT_SERVER_SERVICES_DB_VACUUM_EVENT_RETENTION_OVERRIDES": "{}",
            "PREFECT_SERVER_SERVICES_DB_VACUUM_LOOP_SECONDS": "60",
        }
        totals = []
        with prefect_api(root / "var") as api, endpoint(root, environment) as client:
            environment["PREFECT_API_URL"] = api.wait()
            for number in range(arguments.rounds):
                began = time.perf_counter()
                correct(client, *KINDS[number % len(KINDS)], arguments.corrections)
                command(root, environment, "feedback", "ingest")
                improved = command(root, environment, "improve", allowed=REFUSED)
                command(root, environment, "prune")
                totals.append(megabytes(root))
                sizes = {place: megabytes(root / place) for place in PLACES if (root / place).exists()}
                row = {"round": number + 1, "outcome": improved.get("outcome", "refused"), "megabytes": totals[-1]}
                row["seconds"] = round(time.perf_counter() - began)
                print(json.dumps(row | sizes), flush=True)
    if len(totals) > SETTLED:
        growth = (totals[-1] - totals[SETTLED - 1]) / (len(totals) - SETTLED)
        print(json.dumps({"growth_megabytes_a_round": round(growth, 3), "share": round(growth / totals[-1], 5)}))


if __name__ == "__main__":
    main()
