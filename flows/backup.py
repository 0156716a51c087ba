"""Backup of everything that is not computed again, at one consistent point while everything runs, and its restoration.

Databases are copied first, then the files that they refer to, which are written before they are referred to and never
change. `prune` waits meanwhile, so nothing referred to is removed in between.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import IO, Any

from components.config.errors import InputError, reason_of
from components.config.paths import Paths, writing
from components.config.secrets import hidden
from components.feedback.replicas import LIVE_SECONDS, live_replicas
from components.feedback.store import Store, database_url, has_store, leased_in, record_success
from components.runtime.files import RESTORING, remove, scratch_folder, sync, write_text
from components.runtime.object_store import filesystem
from components.runtime.process import file_lock, git
from components.tracking.mlflow_database import upgrade_database
from flows.orchestration.dvc_repo import cache_folder

MANIFEST = "manifest.json"
FORMAT = 1
RETENTION_LOCK = "retention"
"""Held by a backup and by `prune`, in the folder `stages` of the state folder."""
UPGRADES = "backups/upgrade-"
"""In the state folder; behind it the time."""
FEEDBACK, MLFLOW = "home/feedback.db", "home/mlflow/mlflow.db"
POSTGRESQL = "feedback.pgdump"
_HOME, _PROJECT, _CACHE = "home", "project", "cache"
_DATABASES = (MLFLOW, FEEDBACK, "home/prefect/prefect.db")
_HOME_FOLDERS = ("mlflow/artifacts", "bento", "reports", "dvc-remote")
_LOCKS = ("dvc.lock", "data/improve/dvc.lock")
_TRIES = 5
_PATIENCE_SECONDS = 600.0
_BUFFER = 1 << 20


@dataclass(frozen=True)
class Backup:
    """What a backup has, or what of it was restored."""

    address: str
    created: float
    """Seconds since the epoch."""
    files: int
    size: int
    """Bytes."""
    left_out: tuple[str, ...]
    """Stores of other machines, which have backups of their own."""


def backup(paths: Paths, address: str) -> Backup:
    """Write a backup into a new folder, or to an address of fsspec such as `s3://BUCKET/NAME`.

    Raises: InputError where something is there already, or a tool or library for it is missing.
    """
    writer = _Writer(address)
    with (
        file_lock(paths.home / "stages", RETENTION_LOCK, _PATIENCE_SECONDS),
        leased_in(paths.home, RETENTION_LOCK, _PATIENCE_SECONDS),
    ):
        # Event logs go to MLflow meanwhile: before its database, so that no line is in neither.
        writer.add_folder(paths.home / "tracking", f"{_HOME}/tracking", lambda name: not name.endswith(".lock"))
        _add_databases(paths, writer)
        for path in (*(paths.root / name for name in _LOCKS), *(paths.root / "data").glob("**/*.dvc")):
            writer.add(path, f"{_PROJECT}/{path.relative_to(paths.root).as_posix()}")
        writer.add_folder(paths.feedback, f"{_PROJECT}/data/feedback")
        for name in _HOME_FOLDERS:
            writer.add_folder(paths.home / name, f"{_HOME}/{name}")
        writer.add_folder(cache_folder(paths.root), _CACHE, _is_object)
    servers = ("MLFLOW_TRACKING_URI", "PREFECT_API_URL")
    result = writer.finish(tuple(name for name in servers if os.environ.get(name)))
    record_success(paths.home, "backup")
    return result


def verify(address: str) -> Backup:
    """Hash every file of a backup again.

    Raises: InputError naming the first files that are missing or differ.
    """
    fs, root = filesystem(address)
    manifest = _manifest(address)
    faults = []
    for name, entry in manifest["files"].items():
        try:
            with fs.open(f"{root}/{name}", "rb") as file:
                actual = _copy(file, None)
        except FileNotFoundError:
            faults.append(f"{name} is missing")
        else:
            faults += [] if actual == (entry["sha256"], entry["bytes"]) else [f"{name} differs"]
    if faults:
        raise InputError(f"{address}: {len(faults)} files are damaged: {', '.join(faults[:3])}; use another backup")
    return _summary(address, manifest)


def restore(paths: Paths, address: str, force: bool = False) -> Backup:
    """Put a backup into the project; with `force`, in place of what is there.

    Every file is checked before any is replaced.

    Raises: InputError where there is state already, the platform runs, or a file of the backup is damaged.
    """
    manifest = _manifest(address)
    if not force and not (paths.home / RESTORING).exists() and (occupied := _occupied(paths, manifest)):
        remedy = f'restore into an empty project, or run "loopwright restore {address} --force"'
        raise InputError(f"{occupied}: is there already, with other content; {remedy}")
    with _stopped(paths), writing(paths.home), scratch_folder(paths.home, "restore") as scratch:
        _fetch(address, manifest, scratch)
        _put(paths, scratch, address)
    return _summary(address, manifest)


def upgrade(paths: Paths, echo: Callable[[str], None]) -> str:
    """Migrate the databases to this version's schemas; where that fails they are as before. Returns the backup's path.

    Raises: InputError where the platform runs, or a migration fails.
    """
    folder = paths.home / time.strftime(f"{UPGRADES}%Y%m%dT%H%M%S")
    with _stopped(paths):
        writer = _Writer(str(folder))
        _add_databases(paths, writer)
        writer.finish(())
        echo(f"upgrade: databases are backed up in {folder}")
        try:
            if has_store(paths.home):
                Store.of(paths.home).close()
            if not os.environ.get("MLFLOW_TRACKING_URI"):
                upgrade_database(paths.home)
        except Exception as error:
            with scratch_folder(paths.home, "restore") as scratch:
                _fetch(str(folder), _manifest(str(folder)), scratch)
                _put(paths, scratch, str(folder))
            reason = reason_of(error)
            raise InputError(
                f"upgrade: {reason}; the databases are as before; go on with the former version"
            ) from error
    return str(folder)


@contextmanager
def _stopped(paths: Paths) -> Iterator[None]:
    """Hold the locks of `up` and of runs: nothing may write what is replaced.

    Raises: InputError naming the process that does, or the endpoint, of any host, that answers from this state.
    """
    if replicas := live_replicas(paths.home):
        rest = f"a killed one counts for {LIVE_SECONDS:.0f} s"
        raise InputError(f"serve: {', '.join(replicas)} (host and process) still answers; stop it; {rest}")
    with ExitStack() as stack:
        for folder, name in (("", "up"), ("stages", "run"), ("stages", "ingest"), ("stages", RETENTION_LOCK)):
            stack.enter_context(file_lock(paths.home / folder, name))
        yield


def _add_databases(paths: Paths, writer: _Writer) -> None:
    """Add one point of the registry and the feedback database: answers refer to versions, and versions to feedback.

    What refers is written after what it refers to, so that feedback behind the registry may name a version that the
    copy lacks: both are copied again while versions were registered in between.
    """
    url = database_url(paths.home)
    with scratch_folder(paths.home, "backup") as folder:
        for _ in range(_TRIES):
            for name in _DATABASES:
                _copy_sqlite(_target(paths, name), folder / PurePosixPath(name).name)
            if not url.startswith("sqlite") and has_store(paths.home):
                _dump_postgresql(url, folder / POSTGRESQL)
            if _versions(folder / PurePosixPath(MLFLOW).name) == _versions(_target(paths, MLFLOW)):
                break
        for name in (*_DATABASES, POSTGRESQL):
            writer.add(folder / PurePosixPath(name).name, name)


def _copy_sqlite(source: Path, target: Path) -> None:
    """Copy a database at one point in time; its writers go on."""
    target.unlink(missing_ok=True)
    if not source.is_file():
        return
    with closing(sqlite3.connect(source, timeout=60.0)) as live, closing(sqlite3.connect(target)) as copied:
        live.backup(copied)


def _dump_postgresql(url: str, target: Path) -> None:
    address, password = _postgresql(url)
    _run_tool("pg_dump", "--format=custom", f"--file={target}", f"--dbname={address}", password=password)


def _postgresql(url: str) -> tuple[str, str]:
    """A URL as PostgreSQL's tools take it, and its password, which other users would see among their arguments."""
    plain = re.sub(r"^postgres(ql)?(\+\w+)?://", "postgresql://", url)
    match = re.match(r"(postgresql://[^/?#@:]*):([^/?#]*)(@.*)", plain)
    return (match[1] + match[3], match[2]) if match else (plain, "")


def _run_tool(tool: str, *arguments: str, password: str) -> None:
    """Raises: InputError where PostgreSQL's tool is missing or fails."""
    from urllib.parse import unquote

    environment = {**os.environ, **({"PGPASSWORD": unquote(password)} if password else {})}
    try:
        done = subprocess.run([tool, *arguments], env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise InputError(f"{tool}: not found; install PostgreSQL's client programs") from None
    if done.returncode:
        reason = " ".join(done.stderr.split())[:300]
        raise InputError(f"{tool}: {reason}; check LOOPWRIGHT_DATABASE_URL ({hidden(database_url(Path()))})")


def _versions(database: Path) -> list[Any]:
    """The registered versions in MLflow's database."""
    if not database.is_file():
        return []
    with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True, timeout=60.0)) as tables:
        try:
            return tables.execute("SELECT name, version FROM model_versions ORDER BY name, version").fetchall()
        except sqlite3.OperationalError:  # MLflow has not made its tables yet
            return []


def _is_object(name: str) -> bool:
    """Whether a file of DVC's cache is complete: a temporary name is being written."""
    parts = PurePosixPath(name).parts
    return parts[0] != "files" or re.fullmatch(r"[0-9a-f]{30}(\.dir)?", parts[-1]) is not None


class _Writer:
    """A backup that is being written; it counts from its manifest on, which is written last."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._fs, self._root = filesystem(address)
        if self._fs.exists(self._root) and self._fs.ls(self._root):
            raise InputError(f"{address}: is not empty; name a new folder for each backup")
        if "file" in self._fs.protocol:
            Path(self._root).mkdir(mode=0o700, parents=True, exist_ok=True)  # it holds what users wrote
        self._created = time.time()
        self._files: dict[str, dict[str, Any]] = {}

    def add(self, source: Path, name: str) -> None:
        """Copy a file, if it is there."""
        if not source.is_file():
            return
        with writing(Path(self._root)):
            self._fs.makedirs(f"{self._root}/{PurePosixPath(name).parent}", exist_ok=True)
            try:
                with source.open("rb") as file, self._fs.open(f"{self._root}/{name}", "wb") as target:
                    digest, size = _copy(file, target)
            except FileNotFoundError:  # an event log that was uploaded meanwhile
                if source.exists():
                    raise
                return
        self._files[name] = {"sha256": digest, "bytes": size}

    def add_folder(self, folder: Path, name: str, keep: Callable[[str], bool] = lambda name: True) -> None:
        for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
            relative = path.relative_to(folder).as_posix()
            if keep(relative):
                self.add(path, f"{name}/{relative}")

    def finish(self, left_out: tuple[str, ...]) -> Backup:
        manifest = {
            "format": FORMAT,
            "created": self._created,
            "loopwright": version("loopwright"),
            "left_out": left_out,
            "files": self._files,
        }
        if is_local := "file" in self._fs.protocol:  # the files are on the disk before the manifest says that they are
            files = [Path(self._root, name) for name in self._files]
            sync(*files, *{folder for file in files for folder in file.parents if folder.is_relative_to(self._root)})
        with self._fs.open(f"{self._root}/{MANIFEST}", "wb") as file:
            file.write(json.dumps(manifest, indent=1).encode())
        if is_local:
            sync(Path(self._root, MANIFEST), Path(self._root), Path(self._root).parent)
        return _summary(self.address, manifest)


def _manifest(address: str) -> dict[str, Any]:
    fs, root = filesystem(address)
    try:
        with fs.open(f"{root}/{MANIFEST}", "rb") as file:
            manifest: dict[str, Any] = json.loads(file.read())
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{address}: no {MANIFEST}, so no complete backup; name the folder of a backup") from None
    if manifest.get("format") != FORMAT:
        raise InputError(f"{address}: format {manifest.get('format')} is not known; restore it with a newer Loopwright")
    return manifest


def _summary(address: str, manifest: Mapping[str, Any]) -> Backup:
    sizes = [entry["bytes"] for entry in manifest["files"].values()]
    return Backup(address, manifest["created"], len(sizes), sum(sizes), tuple(manifest["left_out"]))


def _copy(source: IO[bytes], target: IO[bytes] | None) -> tuple[str, int]:
    """Copy to `target`, if any; SHA-256 and number of bytes."""
    digest, size = hashlib.sha256(), 0
    while chunk := source.read(_BUFFER):
        digest.update(chunk)
        size += len(chunk)
        if target is not None:
            target.write(chunk)
    return digest.hexdigest(), size


def _target(paths: Paths, name: str) -> Path:
    """Where a file of a backup belongs, if it is not of DVC's cache."""
    first, _, rest = name.partition("/")
    url = database_url(paths.home)
    if name == FEEDBACK and url.startswith("sqlite:///"):
        return Path(url.removeprefix("sqlite:///"))
    return (paths.home if first == _HOME else paths.root) / rest


def _occupied(paths: Paths, manifest: Mapping[str, Any]) -> str:
    """What a restoration would replace by something else, if anything."""
    if POSTGRESQL in manifest["files"]:
        with closing(Store.of(paths.home)) as store:
            if store.counts()["requests"]:
                return store.address
    for name, entry in manifest["files"].items():
        if name == POSTGRESQL or name.startswith(f"{_CACHE}/"):  # objects have the same content under the same name
            continue
        target = _target(paths, name)
        if target.is_file() and not (target.name == "dvc.lock" and _is_committed(paths.root, target)):
            with target.open("rb") as file:
                if _copy(file, None)[0] != entry["sha256"]:
                    return str(target)
    return ""


def _is_committed(root: Path, file: Path) -> bool:
    """Whether git has a file as it is here."""
    with suppress(InputError):
        return not git(root, "status", "--porcelain", "--", str(file))
    return False


def _fetch(address: str, manifest: Mapping[str, Any], scratch: Path) -> None:
    """Copy a backup's files to this disk. Raises: InputError for one that is damaged."""
    fs, root = filesystem(address)
    for name, entry in manifest["files"].items():
        (scratch / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            with fs.open(f"{root}/{name}", "rb") as file, (scratch / name).open("wb") as target:
                actual = _copy(file, target)
        except FileNotFoundError:
            actual = ("", 0)
        if actual != (entry["sha256"], entry["bytes"]):
            raise InputError(f"{address}: {name} is damaged; nothing was restored; use another backup")


def _put(paths: Paths, scratch: Path, address: str) -> None:
    """Move fetched files to where they belong; folders are replaced as a whole, DVC's objects added.

    A marker lies in the state folder meanwhile: killed here, nothing else starts before it is done again.
    """
    marker = paths.home / RESTORING
    write_text(marker, address)
    if (dump := scratch / POSTGRESQL).is_file():
        address, password = _postgresql(database_url(paths.home))
        options = ("--clean", "--if-exists", "--no-owner", "--single-transaction", f"--dbname={address}")
        try:
            _run_tool("pg_restore", *options, str(dump), password=password)
        except InputError:  # in a transaction: all is as before
            marker.unlink()
            raise
    for name in _DATABASES:
        for suffix in ("", "-wal", "-shm"):
            if (scratch / name).is_file():  # a log of another database would be written into this one
                remove(_target(paths, name).with_name(PurePosixPath(name).name + suffix))
    for name in (*(f"{_HOME}/{folder}" for folder in (*_HOME_FOLDERS, "tracking")), f"{_PROJECT}/data/feedback"):
        if (scratch / name).is_dir():
            remove(_target(paths, name))
    cache = cache_folder(paths.root)
    for source in sorted(path for path in scratch.rglob("*") if path.is_file() and path.name != POSTGRESQL):
        name = source.relative_to(scratch).as_posix()
        is_object = name.startswith(f"{_CACHE}/")
        target = cache / name.removeprefix(f"{_CACHE}/") if is_object else _target(paths, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not (is_object and target.exists()):
            shutil.move(source, target)
    marker.unlink()
