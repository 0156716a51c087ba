"""Of hosts that share a database, one runs the pipeline at a time."""

from __future__ import annotations

import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from components.config.params import InputError
from flows import pipeline
from flows.pipeline import RunOptions, run_pipeline
from tests.servers import new_database

RACES = 20


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two projects, with a state folder each."""
    monkeypatch.delenv("LOOPWRIGHT_HOME", raising=False)
    monkeypatch.setattr(pipeline, "fetch_base_models", lambda *_: None)
    return [tmp_path / name for name in ("one", "two")]


def race(hosts: list[Path], monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[str]]:
    """Start a run on each host at the same time; returns how many trained, and the refusals of the others."""
    starting, is_decided = threading.Barrier(len(hosts)), threading.Event()
    trained, refusals = [], []

    def train(root: Path, *_: object) -> list[object]:
        trained.append(root)
        if len(trained) == len(hosts):
            is_decided.set()
        assert is_decided.wait(60)
        return []

    def run(root: Path) -> None:
        starting.wait()
        try:
            run_pipeline(RunOptions(root, until="none", echo=lambda line: None))
        except InputError as error:
            refusals.append(str(error))
            is_decided.set()

    monkeypatch.setattr(pipeline, "stage_states", train)
    with ThreadPoolExecutor(len(hosts)) as pool:
        list(pool.map(run, hosts))
    return len(trained), refusals


def test_of_two_hosts_one_trains(postgres: str, hosts: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOPWRIGHT_DATABASE_URL", new_database(postgres, f"runs_{uuid.uuid4().hex[:12]}"))
    for _ in range(RACES):
        trained, (refusal,) = race(hosts, monkeypatch)
        assert trained == 1
        assert refusal.startswith("run: already running as process ")


def test_hosts_with_databases_of_their_own_train_beside_each_other(
    hosts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOOPWRIGHT_DATABASE_URL", raising=False)
    assert race(hosts, monkeypatch) == (2, [])
