"""The ingestion flow through real Prefect, MLflow and DVC, by the command line alone, and killed in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from components.feedback.items import read_items
from components.feedback.store import AnswerRecord, Store
from flows.feedback import ENOUGH
from flows.orchestration.prefect_server import prefect_api
from tests.conftest import Project, clone, prefect_client

pytestmark = pytest.mark.platform

STORAGE = """['remote "storage"']
    url = ../storage
"""


@dataclass(frozen=True)
class Place:
    """A project in which nothing ran yet, and a Prefect server."""

    project: Project
    api: str

    @property
    def environment(self) -> dict[str, str]:
        return {"PREFECT_API_URL": self.api}

    def say(self, first: int, count: int) -> list[str]:
        """Corrections of so many answers; returns their ids."""
        store = Store.of(self.project.home)
        ids = []
        for number in range(first, first + count):
            asked = {"messages": [{"role": "user", "content": f"What does f{number} do?"}]}
            store.add_request(f"chatcmpl-{number}", "agent/1", asked)
            store.add_answer(f"chatcmpl-{number}", AnswerRecord("I do not know.", "stop", 5, 5, 0.1))
            ids.append(store.add_feedback(f"chatcmpl-{number}", "down", f"It is {number}.", user="user:a"))
        store.close()
        return ids

    def taken(self) -> list[str]:
        return [item.feedback_id for item in read_items(self.project.root / "data/feedback")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    project = clone(tmp_path_factory.mktemp("feedback"))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PREFECT_API_URL", raising=False)
        with prefect_api(project.home) as api:
            yield Place(project, api.wait())


def test_feedback_is_taken_in_versioned_withdrawn_and_told(place: Place) -> None:
    project, root = place.project, place.project.root
    assert project.answer("feedback", "stats")["models"] == []
    assert project.ask("feedback", "ingest")["flow_run"] is None
    ids = place.say(0, 25)
    bad = ids[-1]
    config = root / ".dvc/config"
    config.write_text(config.read_text().replace("remote = local", "remote = storage") + STORAGE)

    report = project.ask("feedback", "ingest", **place.environment)
    assert (report["accepted"], report["quarantined"], report["waiting"]) == (25, {}, 25)
    assert place.taken() == ids
    assert json.loads((root / "data/feedback/withdrawn.json").read_text()) == {}
    pointer = yaml.safe_load((root / "data/feedback.dvc").read_text())["outs"][0]
    assert report["version"] == pointer["md5"]
    assert (root / "storage/files/md5" / pointer["md5"][:2] / pointer["md5"][2:]).is_file(), "pushed"
    assert (
        "data/feedback"
        not in subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "data/feedback/"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )

    again = project.ask("feedback", "ingest", **place.environment)
    assert (again["partition"], again["flow_run"]) == (None, None)

    withdrawn = project.answer("feedback", "revoke", bad, "--reason", "poison")
    assert withdrawn == {"id": bad, "revoked": True, "new": True, "models": []}
    report = project.ask("feedback", "ingest", **place.environment)
    assert report["partition"] is None
    assert report["flow_run"] is not None
    assert report["version"] not in (None, pointer["md5"])
    assert json.loads((root / "data/feedback/withdrawn.json").read_text()) == {bad: "revoked"}
    newest = project.answer("feedback", "list", "--limit", "1")[0]
    assert (newest["id"], newest["status"]) == (bad, "revoked")
    status = project.answer("feedback", "stats")
    assert (status["waiting"], status["fresh"]) == (24, 0)
    unknown = project.loopwright("feedback", "revoke", "fb-nope")
    assert unknown.returncode == 1
    assert 'fb-nope: no such feedback; see "loopwright feedback list"' in unknown.stderr


def test_enough_feedback_raises_an_event(place: Place) -> None:
    found = {"filter": {"event": {"name": [ENOUGH]}}}
    deadline = time.monotonic() + 30
    with prefect_client(place.project.home, place.api) as client:
        while not (events := client.post("/events/filter", json=found).json()["events"]):
            assert time.monotonic() < deadline, "no event came"
            time.sleep(0.2)
    assert events[-1]["resource"]["prefect.resource.id"] == "loopwright.feedback"
    assert events[-1]["payload"]["waiting"] == 25


def test_a_flow_killed_between_record_and_version_is_caught_up(place: Place) -> None:
    before = place.taken()
    ids = place.say(100, 5)
    store = Store.of(place.project.home)
    mark = store.watermark()
    command = place.project.command("feedback", "ingest", "--json")
    environment = {**place.project.environment, **place.environment}
    process = subprocess.Popen(command, cwd=place.project.root, env=environment, stderr=subprocess.DEVNULL)
    while store.watermark() == mark:
        assert process.poll() is None
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(store.unversioned()) == 1
    report = place.project.ask("feedback", "ingest", **place.environment)
    assert report["partition"] is None
    assert report["version"] is not None
    assert place.taken() == before + ids
    assert store.unversioned() == []
    assert store.partitions()[-1]["dvc"] == report["version"]
    store.close()


def test_commands_without_a_store_make_none(tmp_path: Path) -> None:
    project = clone(tmp_path)
    assert project.answer("feedback", "list") == []
    assert project.loopwright("feedback", "revoke", "fb-1").returncode == 1
    assert not project.home.exists()
