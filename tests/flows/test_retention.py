"""The retention policy on real stores: the disk stays flat, and whatever lineage, an alias or a server needs stays."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import yaml

from components.config.loop_settings import KeepConfig
from components.config.params import InputError, load_params
from components.config.paths import TRAINED_ON_FILE, Paths
from components.feedback.lineage import lineage, registry_metadata
from components.feedback.store import AnswerRecord, Store
from components.runtime.process import file_lock
from components.runtime.service_registry import SERVED
from components.tracking.mlflow_client import create_run
from components.tracking.mlflow_database import EXPERIMENT
from components.tracking.registry import Registry
from components.tracking.traces import Span, Traces, store_held_out_traces
from flows.backup import MANIFEST, RETENTION_LOCK, UPGRADES
from flows.orchestration.dvc_repo import version_data
from flows.orchestration.prefect_server import client_settings, home_tag, prefect_api
from flows.retention import prune
from tests.pages import ROOT

POLICY = {"versions": 3, "runs": 4, "bentos": 1, "cache_days": 0, "log_megabytes": 1, "flow_runs": 5, "traces": 2}
ROUNDS = 12
WEIGHTS = 300_000
"""Bytes of a version's weights, and of each round's data."""


@pytest.fixture
def paths(home: Path, monkeypatch: pytest.MonkeyPatch) -> Paths:
    monkeypatch.setenv("LOOPWRIGHT_HOME", str(home))
    for variable in ("LOOPWRIGHT_DATABASE_URL", "PREFECT_API_URL"):
        monkeypatch.delenv(variable, raising=False)
    paths = Paths(home.parent)
    shutil.copy(ROOT / "dvc.yaml", paths.root)
    params = (ROOT / "params.yaml").read_text(encoding="utf-8").replace("keep: {}", f"keep: {json.dumps(POLICY)}")
    paths.params.write_text(params, encoding="utf-8")
    return paths


def improve(paths: Paths, registry: Registry, number: int) -> None:
    """What a round leaves: data under DVC, runs, a version trained from the last, its Bento, an answer, a log."""
    paths.feedback.mkdir(parents=True, exist_ok=True)
    (paths.feedback / "items.parquet").write_bytes(os.urandom(WEIGHTS))
    hashed = version_data(paths.root, paths.feedback)
    folder = paths.root / "candidate"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(os.urandom(WEIGHTS))
    (folder / TRAINED_ON_FILE).write_text(json.dumps({"feedback": [f"fb-{number}"]}))
    flow = create_run(registry.client, "improve", {}, None, number)
    for run_id in (create_run(registry.client, "align", {}, flow, number), flow):
        registry.client.log_text(run_id, "x" * 10_000, "report.md")
        registry.client.set_terminated(run_id)
    tags = {"dvc.data/feedback": hashed, "bento": f"agent:v{number}"}
    tags |= {"parent": f"agent/{number - 1}"} if number > 1 else {}
    version = registry.register(folder, "agent", {"score": 0.5}, tags, flow)
    for name, text in (("held_out_answers.json", "x" * WEIGHTS), ("lineage.json", "{}"), ("gate.md", "")):
        registry.client.log_text(version.run_id, text, name)
    registry.promote(version)
    with closing(Store.of(paths.home)) as store:
        body = {"messages": [{"role": "user", "content": "hi"}]}
        store.add_exchange(f"chatcmpl-{number}", str(version), body, 1.7e9, AnswerRecord("hi", "stop", 1, 1, 0.1), [])
    log = paths.home / "logs" / "serve.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"{number} {'x' * 996}\n" * 400)


def package(paths: Paths, number: int) -> None:
    """A Bento's weights; in one test alone, for BentoML keeps the store of its first use."""
    os.environ.update(BENTOML_HOME=str(paths.home / "bento"), BENTOML_DO_NOT_TRACK="true")
    (paths.home / "bento" / "bentos").mkdir(parents=True, exist_ok=True)
    import bentoml

    with bentoml.models.create(f"agent:v{number}") as weights:
        shutil.copytree(paths.root / "candidate", weights.path, dirs_exist_ok=True)


def size(paths: Paths) -> int:
    files = (path for top in (paths.home, paths.root / ".dvc") for path in top.rglob("*"))
    return sum(path.stat().st_size for path in files if path.is_file() and "downloads" not in path.parts)


def test_the_disk_stays_flat_and_lineage_whole(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENTOML_HOME", "")
    registry = Registry(paths.home)
    sizes = []
    for number in range(1, ROUNDS + 1):
        improve(paths, registry, number)
        package(paths, number)
        if number % 2 == 0:
            prune(paths)
            sizes.append(size(paths))
    grown = sizes[-1] - sizes[len(sizes) // 2 - 1]
    assert grown < WEIGHTS, f"six rounds leave {grown} bytes: {sizes}"
    assert grown < 0.05 * sizes[-1]
    metadata = registry_metadata(paths.home)
    with closing(Store.of(paths.home)) as store:
        for number in range(1, ROUNDS + 1):
            version = lineage(store, f"chatcmpl-{number}", metadata)["version"]
            chain = [(each["version"], each["feedback"]) for each in version["taught_by"]]
            assert chain == [(f"agent/{each}", [f"fb-{each}"]) for each in range(number, 0, -1)]
            assert version["metrics"] == {"score": 0.5}
    older = registry.files(registry.resolve("agent/1")).parent
    assert sorted(path.name for path in older.iterdir() if path.is_file()) == ["gate.md", "lineage.json"]
    kept = [f"agent/{number}" for number in range(ROUNDS - 2, ROUNDS + 1)]
    assert all((registry.resolve(name).folder / "model.safetensors").is_file() for name in kept)
    with pytest.raises(InputError, match=r"agent/1: its weights were pruned \(keep\.versions"):
        registry.promote(registry.resolve("agent/1"))
    objects = {path.parent.name + path.name for path in (paths.root / ".dvc/cache/files/md5").glob("??/*")}
    hashes = {registry.resolve(name).tags["dvc.data/feedback"] for name in kept}
    assert hashes <= objects
    assert len(objects) == 2 * len(hashes), "a folder and its file for each kept version"
    assert not any(removal.count for removal in prune(paths)), "a second pass finds nothing"


def test_what_is_served_or_named_by_an_alias_stays(paths: Paths) -> None:
    registry = Registry(paths.home)
    for number in range(1, 7):
        improve(paths, registry, number)
    registry.alias("agent", "challenger", registry.resolve("agent/2"))
    holder = f"from components.runtime.process import file_lock\nfrom pathlib import Path\nwith file_lock(Path({str(paths.home / SERVED)!r}), 'agent@1-77'):\n    print('held', flush=True)\n    input()"  # noqa: E501
    with subprocess.Popen(
        [sys.executable, "-c", holder], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "held\n"
        planned = prune(paths, dry_run=True)
        assert [registry.resolve(f"agent/{number}").folder for number in range(1, 7)], "a dry run removes nothing"
        done = prune(paths)
        server.communicate("\n")
    assert [removal.names for removal in planned] == [removal.names for removal in done]
    assert {removal.kind: removal.names for removal in done}["versions"] == ("agent/3",)
    assert all(registry.resolve(f"agent/{number}").folder for number in (1, 2, 4, 5, 6))
    prune(paths)  # the server has ended
    with pytest.raises(InputError, match="pruned"):
        _ = registry.resolve("agent/1").folder


def test_a_backup_holds_removals_off(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.retention._PATIENCE_SECONDS", 0.0)
    with file_lock(paths.home / "stages", RETENTION_LOCK), pytest.raises(InputError, match="retention: already"):
        prune(paths)


def test_the_earlier_name_of_the_days_of_requests_is_refused_with_the_present_one(paths: Paths) -> None:
    written = yaml.safe_load(paths.params.read_text(encoding="utf-8"))
    paths.params.write_text(yaml.safe_dump(written | {"feedback": {"keep_days": 30}}), encoding="utf-8")
    with pytest.raises(InputError, match=r"feedback\.keep_days: renamed; write keep\.request_days"):
        load_params(paths.params)


def test_traces_stay_of_the_newest_answers_and_of_kept_versions(paths: Paths) -> None:
    registry = Registry(paths.home)
    for number in range(1, 5):
        improve(paths, registry, number)
        row = {"suite": "s", "question": f"held out {number}", "expected": "b", "answer": "b", "score": 1.0}
        store_held_out_traces(registry.resolve(f"agent/{number}"), [row])
    traces = Traces(paths.home, 1.0)
    for number in range(1, 5):
        traces.add(
            Span("answer", "AGENT", number, number + 1, f"question {number}", "b"), (), {"completion_id": f"c-{number}"}
        )
    traces.close(60)

    def questions() -> set[str]:
        experiment = registry.client.get_experiment_by_name(EXPERIMENT).experiment_id
        traces = registry.client.search_traces(locations=[experiment])
        return {str(trace.data.spans[0].inputs) for trace in traces}

    before = questions()
    assert len(before) == 8
    (planned,) = (removal for removal in prune(paths, dry_run=True) if removal.kind == "traces")
    assert (planned.count, questions()) == (3, before)
    prune(paths)
    stay = {f"{{'question': 'held out {number}'}}" for number in (2, 3, 4)} | {"question 3", "question 4"}
    assert questions() == stay
    assert not [path for path in paths.home.rglob("traces*") if path.is_dir() and len(list(path.iterdir())) > len(stay)]


def test_the_newest_whole_backups_of_upgrades_stay(paths: Paths) -> None:
    for number, is_whole in enumerate([True, True, True, True, False]):
        folder = paths.home / f"{UPGRADES}2026010{number}T000000"
        folder.mkdir(parents=True)
        (folder / "feedback.db").write_text("x")
        if is_whole:
            (folder / MANIFEST).write_text("{}")
    own = paths.home / "backups" / "of-a-person"
    own.mkdir()
    (removal,) = (removal for removal in prune(paths) if removal.kind == "backups")
    assert [Path(name).name[8:16] for name in removal.names] == ["20260100", "20260101", "20260104"]
    stay = {own.name, "upgrade-20260102T000000", "upgrade-20260103T000000"}
    assert {folder.name for folder in own.parent.iterdir()} == stay


def test_null_removes_nothing_and_less_than_one_is_refused(paths: Paths) -> None:
    text = paths.params.read_text(encoding="utf-8").replace(json.dumps(POLICY), "NULLS")
    nulls = dict.fromkeys(KeepConfig.model_fields)
    paths.params.write_text(text.replace("NULLS", json.dumps(nulls)))
    assert load_params(paths.params).keep.model_dump() == nulls
    assert load_params(ROOT / "params.yaml", {"keep.versions": None}).keep.versions is None
    assert {removal.kind: removal.count for removal in prune(paths)} == {"versions": 0}
    for key in ("request_days", "versions", "runs", "traces", "log_megabytes", "flow_runs", "upgrades"):
        paths.params.write_text(text.replace("NULLS", json.dumps({key: 0})))
        with pytest.raises(InputError, match=rf"keep\.{key}: .*greater than or equal to 1"):
            load_params(paths.params)


@pytest.mark.platform
def test_the_oldest_flow_runs_of_a_flow_are_removed(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    with prefect_api(paths.home) as api:
        url = api.wait()
        from prefect import flow, tags
        from prefect.client.orchestration import get_client
        from prefect.settings import temporary_settings

        def runs() -> int:
            with get_client(sync_client=True) as client:
                return len(client.read_flow_runs())

        with temporary_settings(api.client):
            with tags(home_tag(paths.home)):
                for _ in range(7):
                    flow(name="ingest")(lambda: None)()
            flow(name="of another folder")(lambda: None)()
            monkeypatch.setenv("PREFECT_API_URL", url)
            (planned,) = (removal for removal in prune(paths, dry_run=True) if removal.kind == "flow runs")
            assert (planned.count, runs()) == (2, 8)
            prune(paths)
            assert runs() == 6
        command = [sys.executable, "-c", "from flows.deployments import ingest, monitor; ingest(); monitor()"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **client_settings(paths.home, url)}
        subprocess.run(command, cwd=paths.root, env=environment, check=True, capture_output=True)
    with closing(Store.of(paths.home)) as store:
        assert set(store.successes()) == {"ingest", "monitor"}, "alerts see when a schedule last succeeded"


def test_a_line_that_is_appended_while_a_log_is_cut_stays(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    log = paths.home / "logs" / "endpoint.log"
    log.parent.mkdir()
    log.write_text("".join(f"{number:999}\n" for number in range(3000)))
    late, read = iter(range(3000, 3005)), os.pread
    with log.open("a") as service:

        def pread(descriptor: int, size: int, offset: int) -> bytes:
            block = read(descriptor, size, offset)
            if block and (number := next(late, None)):  # the service appends behind each read
                service.write(f"{number:999}\n")
                service.flush()
            return block

        monkeypatch.setattr(os, "pread", pread)
        prune(paths)
        service.write(f"{3005:999}\n")
    numbers = [int(line) for line in log.read_text().splitlines()]
    assert numbers == list(range(2001, 3006))
    assert log.stat().st_size < 1_010_000
