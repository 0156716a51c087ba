"""A scheduled flow waits for a database that is away for a while."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.config.errors import Unavailable
from components.config.params import InputError
from components.feedback.store import Store
from components.tracking.mlflow_client import connect
from flows.orchestration.flow_run import while_unavailable
from flows.orchestration.prefect_server import free_port


def test_what_needs_the_store_goes_on_when_it_is_back(tmp_path: Path) -> None:
    store = Store.of(tmp_path)
    store.add_request("c-1", "agent/1", {"messages": []})
    file, away, told = tmp_path / "feedback.db", tmp_path / "away", list[str]()
    file.rename(away)

    def bring_back(line: str) -> None:
        told.append(line)
        away.rename(file)

    assert while_unavailable(lambda: store.counts()["requests"], bring_back) == 1
    assert len(told) == 1
    assert told[0].endswith("restore the file; tries again in 1 s")
    store.close()


def test_patience_ends_and_wrong_input_is_not_tried_again(tmp_path: Path) -> None:
    store = Store.of(tmp_path)
    (tmp_path / "feedback.db").unlink()
    with pytest.raises(Unavailable, match="missing"):
        while_unavailable(store.counts, lambda line: None, patience=0.5)
    store.close()
    calls: list[int] = []

    def wrong() -> None:
        calls.append(1)
        raise InputError("params.yaml: seed: is no number")

    with pytest.raises(InputError, match="is no number"):
        while_unavailable(wrong, lambda line: None)
    assert calls == [1]


def test_a_tracking_server_without_an_answer_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(Unavailable, match="MLFLOW_TRACKING_URI: http"):
        connect(tmp_path)
