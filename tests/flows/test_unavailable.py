"""A scheduled flow waits for a database that is away for a while."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, TEMPORARILY_UNAVAILABLE

from components.config.errors import Unavailable
from components.config.params import InputError
from components.feedback.store import Store
from components.tracking.mlflow_client import connect
from components.tracking.mlflow_requests import is_outage
from flows import deployments
from flows.orchestration.flow_run import while_unavailable
from flows.orchestration.prefect_server import free_port


def response(status: int) -> requests.Response:
    made = requests.Response()
    made.status_code = status
    return made


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


def test_work_of_hours_that_fails_in_the_end_is_waited_for() -> None:
    outages = [Unavailable("away")]

    def work() -> str:
        time.sleep(1.1)  # longer than the patience
        if outages:
            raise outages.pop()
        return "done"

    assert while_unavailable(work, lambda line: None, patience=1.0) == "done"


@pytest.mark.parametrize(
    ("error", "is_away"),
    [
        (MlflowException("API request failed with exception: connection refused"), True),
        (MlflowException("database is away", TEMPORARILY_UNAVAILABLE), True),
        (MlflowException("no such run", RESOURCE_DOES_NOT_EXIST), False),
        (requests.ConnectionError("refused"), True),
        (requests.HTTPError("502 Bad Gateway", response=response(502)), True),
        (requests.HTTPError("404 Not Found", response=response(404)), False),
        (requests.exceptions.MissingSchema("no address"), False),
        (FileNotFoundError("config.json"), False),
    ],
)
def test_outages_are_told_from_wrong_requests(error: Exception, is_away: bool) -> None:
    assert is_outage(error) is is_away


def test_a_scheduled_improvement_waits_for_the_registry_and_skips_where_there_is_no_champion(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a flow run of Prefect's: what the deployment calls."""
    lines: list[str] = []
    monkeypatch.setenv("LOOPWRIGHT_HOME", str(home))
    monkeypatch.setattr(deployments, "get_run_logger", lambda: SimpleNamespace(info=bring_back))
    monkeypatch.setattr(deployments, "end_with_parent", lambda: None)

    def bring_back(line: str) -> None:
        lines.append(line)
        monkeypatch.delenv("MLFLOW_TRACKING_URI")

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    state = deployments.improve.fn()
    assert (state.name, len(lines)) == ("Skipped", 1)
    assert "there is no champion to improve" in state.message
