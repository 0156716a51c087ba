"""Retention in MLflow: old versions lose weights and held-out answers, old runs go; what lineage reads stays.

A version itself is never removed: answers name it, and its tags, metrics, run and `lessons.json` take kilobytes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from components.config.params import InputError
from components.config.paths import AGENT, CONFIG, TRAINED_ON_FILE
from components.models.base_store import STORE
from components.runtime.files import remove
from components.tracking.mlflow_database import DATABASE, EXPERIMENT
from components.tracking.model_card import CARD
from components.tracking.registry import BASE_SHA256, BASE_VERSION, LINEAGE, PRUNED, ModelVersion, Registry

Size = tuple[str, int]
"""What is removed: its name, and its bytes on this disk."""
_STAYS = (CONFIG, AGENT, TRAINED_ON_FILE, CARD, LINEAGE)
_EVIDENCE = (".parquet", ".json", ".png")
"""Of a version's run: its held-out answers and their plot; what a person reads of the gate stays."""
_PARENT = "mlflow.parentRunId"
_MAX_RUNS = 200
"""Ids in one call of MLflow's command."""
_MAX_TRACES = 100
"""Ids in one request of MLflow's API."""


def retained_versions(registry: Registry, newest: int | None, pinned: Collection[str] = ()) -> list[ModelVersion]:
    """Versions that keep their weights: those an alias or `pinned` names, the newest of each model, and their bases."""
    by_name = {str(version): version for name in registry.names() for version in registry.versions(name)}
    per_model: dict[str, list[ModelVersion]] = defaultdict(list)
    for version in by_name.values():
        per_model[version.name].append(version)
    recent = {str(version) for versions in per_model.values() for version in versions[:newest]}
    retained = {name for name, version in by_name.items() if version.aliases or name in pinned or name in recent}
    retained |= {by_name[name].tags[BASE_VERSION] for name in retained if BASE_VERSION in by_name[name].tags}
    return [version for name, version in by_name.items() if name in retained]


def prune_versions(registry: Registry, retained: Collection[ModelVersion], dry_run: bool) -> Iterator[Size]:
    """Remove the files of all other versions, but those that lineage reads, and bases that no kept adapter has."""
    names = {str(version) for version in retained}
    for version in (version for name in registry.names() for version in registry.versions(name)):
        if str(version) in names:
            continue
        for cached in (registry.home / "answers", registry.home / "mlflow" / "downloads"):
            yield from removed(cached / version.name / str(version.version), dry_run)
        if version.tags.get(PRUNED) == "true" or os.environ.get("MLFLOW_TRACKING_URI"):
            continue  # the files of a server's versions are that server's
        if not dry_run:
            registry.tag(version, {PRUNED: "true"})
        folder = registry.files(version)
        beside = (path for path in folder.parent.iterdir() if path.is_file() and path.suffix in _EVIDENCE)
        yield str(version), sum(_prune_file(path, dry_run) for path in (*_files(folder), *beside))
    bases = {version.tags.get(BASE_SHA256) for version in retained}
    for folder in sorted((registry.home / STORE).glob("*")):
        if folder.name not in bases:
            yield from removed(folder, dry_run)


def prune_runs(registry: Registry, newest: int, retained: Collection[ModelVersion], dry_run: bool) -> list[Size]:
    """Remove runs but the newest of each name, those of versions, and the runs that kept versions were made in."""
    client = registry.client
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    runs: list[Any] = []
    token = None
    while token != "":
        page = client.search_runs([experiment], max_results=1000, page_token=token, order_by=["start_time DESC"])
        runs, token = [*runs, *page], page.token or ""
    parents = {run.info.run_id: run.data.tags.get(_PARENT, "") for run in runs}
    versions = [version for name in registry.names() for version in registry.versions(name)]
    stay = {version.run_id for version in versions}
    made_in = {parents.get(version.run_id, "") for version in retained} - {""}
    stay |= made_in | {run_id for run_id, parent in parents.items() if parent in made_in}
    seen: dict[str, int] = defaultdict(int)
    old = []
    for run in runs:
        seen[run.info.run_name] += 1
        if seen[run.info.run_name] > newest and run.info.run_id not in stay and run.info.status != "RUNNING":
            old.append(run)
    sizes = [(f"{run.info.run_name} {run.info.run_id}", _artifact_bytes(registry.home, run)) for run in old]
    if not dry_run and old:
        _delete([run.info.run_id for run in old], registry)
    return sizes


def prune_traces(registry: Registry, newest: int, retained: Collection[ModelVersion], dry_run: bool) -> list[Size]:
    """Remove traces of answers but the newest, and those of held-out answers of versions that are not kept."""
    client, names = registry.client, {str(version) for version in retained}
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    answers, held_out, token = list[str](), list[str](), None
    while token != "":
        page = client.search_traces(
            locations=[experiment], page_token=token, order_by=["timestamp_ms DESC"], include_spans=False
        )
        for trace in page:
            tags = trace.info.tags
            if "completion_id" in tags:
                answers.append(trace.info.trace_id)
            elif tags.get("held_out") == "true" and tags.get("model") not in names:
                held_out.append(trace.info.trace_id)
        token = page.token or ""
    old = answers[newest:] + held_out
    for first in range(0, 0 if dry_run else len(old), _MAX_TRACES):
        client.delete_traces(experiment, trace_ids=old[first : first + _MAX_TRACES])
    return [(trace_id, 0) for trace_id in old]


def removed(path: Path, dry_run: bool) -> Iterator[Size]:
    """Remove a file or folder, if it is there."""
    if not path.exists():
        return
    size = path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in _files(path))
    if not dry_run:
        remove(path)
    yield str(path), size


def _prune_file(path: Path, dry_run: bool) -> int:
    if path.name in _STAYS or path.name == "MLmodel":
        return 0
    size = path.stat().st_size
    if not dry_run:
        path.unlink()
    return size


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _artifact_bytes(home: Path, run: Any) -> int:
    return sum(path.stat().st_size for path in _files(home / "mlflow" / "artifacts" / run.info.run_id))


def _delete(run_ids: list[str], registry: Registry) -> None:
    """Delete runs, and in the state folder's own database their rows and artifacts, which MLflow's client leaves."""
    for run_id in run_ids:
        registry.client.delete_run(run_id)
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return
    database = registry.home / "mlflow" / DATABASE
    address = f"sqlite:///{database}"
    for first in range(0, len(run_ids), _MAX_RUNS):
        some = ",".join(run_ids[first : first + _MAX_RUNS])
        command = [sys.executable, "-m", "mlflow", "gc", "--backend-store-uri", address, "--tracking-uri", address]
        done = subprocess.run([*command, "--run-ids", some], capture_output=True, text=True, check=False)
        if done.returncode:
            raise InputError(f"{database}: mlflow gc: {(done.stderr.strip().splitlines() or ['failed'])[-1][:300]}")
