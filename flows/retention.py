"""Retention: remove what the section `keep` of params.yaml does not keep, from every store that grows."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from components.config.params import load_params
from components.config.paths import Paths
from components.feedback.store import Store, has_store, leased_in
from components.runtime.process import file_lock, lock_owner
from components.runtime.service_registry import SERVED, running
from components.tracking.registry import ModelVersion, Registry, is_empty
from components.tracking.retention import (
    Size,
    prune_runs,
    prune_traces,
    prune_versions,
    removed,
    retained_versions,
)
from components.tracking.version_files import lineage
from flows.backup import MANIFEST, RETENTION_LOCK, UPGRADES
from flows.bento import prune_bentos
from flows.orchestration.dvc_repo import prune_cache
from flows.orchestration.prefect_server import prune_flow_runs

_PATIENCE_SECONDS = 600.0
_MEGABYTE = 10**6


@dataclass(frozen=True)
class Removal:
    """What was removed of one kind."""

    kind: str
    count: int
    size: int
    """Bytes on this disk; 0 where it is space inside a database, which is used again."""
    names: tuple[str, ...]


def prune(paths: Paths, dry_run: bool = False) -> list[Removal]:
    """Remove what the policy does not keep, and return what; nothing with `dry_run`.

    What an alias names, a server serves or kept lineage refers to stays. A backup waits, and is waited for.

    Raises: InputError where a store cannot be read.
    """
    keep = load_params(paths.params).keep
    with (
        file_lock(paths.home / "stages", RETENTION_LOCK, _PATIENCE_SECONDS),
        leased_in(paths.home, RETENTION_LOCK, _PATIENCE_SECONDS),
    ):
        removals = []
        if keep.request_days is not None and not dry_run and has_store(paths.home):
            with closing(Store.of(paths.home)) as store:
                removals.append(Removal("requests", store.forget(keep.request_days), 0, ()))
        retained: list[ModelVersion] = []
        if not is_empty(paths.home):
            registry = Registry(paths.home)
            retained = retained_versions(registry, keep.versions, served_versions(paths.home))
            removals.append(_removal("versions", prune_versions(registry, retained, dry_run)))
            if keep.runs is not None:
                removals.append(_removal("runs", prune_runs(registry, keep.runs, retained, dry_run)))
            if keep.traces is not None:
                removals.append(_removal("traces", prune_traces(registry, keep.traces, retained, dry_run)))
            if keep.bentos is not None:
                named = retained_versions(registry, 1)  # the newest may be in its release
                removals.append(_removal("Bentos", prune_bentos(paths.home, named, keep.bentos, dry_run)))
        if keep.cache_days is not None:
            removals.append(_removal("data", prune_cache(paths.root, _data(retained), keep.cache_days, dry_run)))
        if keep.log_megabytes is not None:
            limit = keep.log_megabytes * _MEGABYTE
            removals.append(_removal("logs", _trim_logs(paths.home / "logs", limit, dry_run)))
        if keep.upgrades is not None:
            removals.append(_removal("backups", _prune_upgrades(paths.home, keep.upgrades, dry_run)))
        address = os.environ.get("PREFECT_API_URL") or running(paths.home).get("prefect")
        if keep.flow_runs is not None and address:
            names = prune_flow_runs(address, paths.home, keep.flow_runs, dry_run)
            removals.append(_removal("flow runs", ((name, 0) for name in names)))
    return removals


def served_versions(home: Path) -> set[str]:
    """`NAME/VERSION` that servers on this machine were started with, by their locks, or that any replica has loaded."""
    locks = [lock.stem for lock in (home / SERVED).glob("*.lock") if lock_owner(home / SERVED, lock.stem)]
    served = {lock.rpartition("-")[0].replace("@", "/") for lock in locks}
    if has_store(home):
        with closing(Store.of(home)) as store:
            served |= store.loaded_models()
    return served


def _removal(kind: str, sizes: Iterable[Size]) -> Removal:
    entries = list(sizes)
    return Removal(kind, len(entries), sum(size for _, size in entries), tuple(name for name, _ in entries))


def _data(retained: Collection[ModelVersion]) -> set[str]:
    """DVC's hashes of all data that kept versions were made from."""
    return {md5 for version in retained for key, md5 in lineage(version).items() if key.startswith("dvc.")}


def _prune_upgrades(home: Path, newest: int, dry_run: bool) -> Iterator[Size]:
    """Remove backups of upgrades but the newest whole ones; one that was cut off has no manifest."""
    backups = sorted(home.glob(f"{UPGRADES}*"))
    whole = [folder for folder in backups if (folder / MANIFEST).is_file()]
    for folder in backups:
        if folder not in whole[-newest:]:
            yield from removed(folder, dry_run)


def _trim_logs(folder: Path, limit: int, dry_run: bool) -> Iterator[Size]:
    """Cut logs down to their last bytes; their writers hold them open and append meanwhile."""
    for path in sorted(folder.glob("*.log")):
        surplus = path.stat().st_size - limit
        if surplus <= 0:
            continue
        if not dry_run:
            with path.open("r+b") as file:
                file.seek(surplus)
                file.readline()  # a line that is cut off
                start, size = file.tell(), 0
                # Until nothing more was appended: a line is lost only within the microseconds before the truncation.
                while block := os.pread(file.fileno(), _MEGABYTE, start + size):
                    size += os.pwrite(file.fileno(), block, size)
                os.truncate(file.fileno(), size)
        yield str(path), surplus
