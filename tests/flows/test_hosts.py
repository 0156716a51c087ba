"""Two hosts whose state folders have the same path, on one Prefect server, one PostgreSQL and one DVC remote."""

from __future__ import annotations

import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import closing

import pytest

from components.feedback.items import read_items
from components.feedback.store import AnswerRecord, Store
from components.runtime.process import host_id
from flows.orchestration.prefect_server import heartbeat, home_tag, mark_crashed_runs, prefect_api
from tests.conftest import Project, clone
from tests.servers import new_database

pytestmark = pytest.mark.platform


@pytest.fixture(scope="module")
def database(postgres: str) -> str:
    return new_database(postgres, f"hosts_{uuid.uuid4().hex[:12]}")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory, database: str) -> Iterator[tuple[list[Project], str]]:
    """Two clones with a DVC remote in common, and a Prefect server."""
    projects = [clone(tmp_path_factory.mktemp(name)) for name in ("one", "two")]
    remote = tmp_path_factory.mktemp("remote")
    for project in projects:
        command = [
            sys.executable,
            "-m",
            "dvc",
            "remote",
            "add",
            "--quiet",
            "--local",
            "--default",
            "shared",
            str(remote),
        ]
        subprocess.run(command, cwd=project.root, check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PREFECT_API_URL", raising=False)
        with prefect_api(projects[0].home) as api:
            yield projects, api.wait()


def correct(url: str, first: int, count: int) -> list[str]:
    """Corrections of so many answers; returns their ids."""
    with closing(Store(url)) as store:
        ids = []
        for number in range(first, first + count):
            asked = {"messages": [{"role": "user", "content": f"What does f{number} do?"}]}
            store.add_request(f"chatcmpl-{number}", "agent/1", asked)
            store.add_answer(f"chatcmpl-{number}", AnswerRecord("I do not know.", "stop", 5, 5, 0.1))
            ids.append(store.add_feedback(f"chatcmpl-{number}", "down", f"It is {number}.", user="user:a"))
        return ids


def test_each_host_ingests_what_is_new_and_has_what_the_other_ingested(
    hosts: tuple[list[Project], str], database: str
) -> None:
    (first_host, second_host), api = hosts
    auth = (first_host.home / "prefect-auth").read_text().strip()
    environment = {
        "PREFECT_API_URL": api,
        "PREFECT_API_AUTH_STRING": auth,
        "LOOPWRIGHT_DATABASE_URL": database,
    }
    first = correct(database, 0, 3)
    assert first_host.ask("feedback", "ingest", **environment)["accepted"] == 3
    second = correct(database, 3, 2)
    assert not (second_host.root / "data/feedback").exists(), "an empty disk"
    assert second_host.ask("feedback", "ingest", **environment)["accepted"] == 2
    assert [item.feedback_id for item in read_items(second_host.root / "data/feedback")] == [*first, *second]
    again = first_host.ask("feedback", "ingest", **environment)
    assert (again["partition"], again["accepted"]) == (None, 0)
    assert [item.feedback_id for item in read_items(first_host.root / "data/feedback")] == [*first, *second]


def test_a_start_marks_no_run_of_another_host_as_crashed(
    hosts: tuple[list[Project], str], database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.settings import temporary_settings
    from prefect.states import Pending, Running

    from flows.orchestration.prefect_server import Api, client_settings

    (project, _), url = hosts
    home = project.home
    monkeypatch.setenv("LOOPWRIGHT_DATABASE_URL", database)
    api = Api(url, home / "logs" / "prefect.log", None, client_settings(home, url)["PREFECT_API_AUTH_STRING"])

    @flow(name="improve")
    def improve() -> None:
        """Never called."""

    with temporary_settings(api.client), get_client(sync_client=True) as client, closing(Store(database)) as store:
        runs = [client.create_flow_run(improve, tags=[home_tag(home)], state=Running()).id for _ in range(4)]
        runs.append(client.create_flow_run(improve, tags=[home_tag(home)], state=Pending()).id)
        living, killed, killed_here, own, beginning = (str(run) for run in runs)
        elsewhere = f"{socket.gethostname()}-of-the-same-name"
        assert store.take_lease(f"flow-run {living}", f"{elsewhere}:17:a", 60.0)
        assert store.take_lease(f"flow-run {killed}", f"{elsewhere}:18:b", -1.0)
        assert store.take_lease(f"flow-run {killed_here}", f"{host_id(home)}:19:c", 60.0)
        with heartbeat(home, own):
            for _ in range(50):
                mark_crashed_runs(home, own_server=False)
            states = {str(run): client.read_flow_run(run).state.type.value for run in runs}
        mark_crashed_runs(home, own_server=False)
        after = client.read_flow_run(own).state.type.value
    crashed = {killed: "CRASHED", killed_here: "CRASHED"}
    assert states == {living: "RUNNING", **crashed, own: "RUNNING", beginning: "PENDING"}
    assert after == "CRASHED", "whose heartbeat has ended here"
