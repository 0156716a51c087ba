"""DVC's remote: results and versions are pushed there, and a stage's result is looked for there before the stage runs.

Results are found as DVC's run cache finds them: by the hash of a stage's command, dependencies and parameters. What
`dvc push --run-cache` and `dvc repro --pull` do falls short of it in three ways: the former sends no outs with
`cache: false`, without which DVC restores nothing; both copy the entries of every run there ever was, each time; and
the latter ends with an error where the remote does not answer. So here entries of single stages are copied.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import chdir, contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from components.config.errors import Unavailable, reason_of
from components.config.paths import Paths
from components.tracking.event_log import warn_on_failure
from flows.orchestration.dvc_repo import LOCAL_REMOTE, dvc_error, open_repo
from flows.orchestration.flow_run import Echo, effect

_PATIENCE_SECONDS = 10.0
"""Short: nothing waits for a push, and the next one makes up for it."""


def remote_name(root: Path) -> str | None:
    """The default remote; None where that is the state folder's own, on this disk.

    Raises: InputError for a configuration that DVC refuses.
    """
    from dvc.config import Config, ConfigError

    try:
        name = Config(str(root / ".dvc"))["core"].get("remote", LOCAL_REMOTE)
    except ConfigError as error:
        raise dvc_error(error) from error
    return None if name == LOCAL_REMOTE else str(name)


def push_to_remote(root: Path, echo: Echo) -> None:
    """Inside a flow run: push to the default remote; what fails is warned of, and pushed with the next version."""
    with warn_on_failure("dvc push"):
        pushed = effect(push_data, root, patience=_PATIENCE_SECONDS)
        if pushed is not None:
            echo(f"dvc push: {pushed} objects")


def push_pending(root: Path, echo: Echo) -> None:
    """Outside of a flow run: push the results that an earlier run could not push."""
    if _pending(root).exists():
        with warn_on_failure("dvc push"):
            echo(f"dvc push: {push_data(root)} objects")


def _pending(root: Path) -> Path:
    """The file that is there while results may wait for a push; the next complete one, of any run, removes it."""
    return Paths(root).home / "stages" / "push-pending"


class RemoteResults:
    """Stages' results in the default remote, inside of one flow run.

    A remote that failed once is left alone until the run's end: the stages need not wait for it one after another.
    """

    def __init__(self, root: Path, echo: Echo) -> None:
        self._root, self._echo = root, echo
        self._answers = remote_name(root) is not None

    def fetch(self, target: str) -> bool:
        """`fetch_result`; False also where the remote fails, which is reported: the stage can run."""
        if self._answers:
            try:
                return effect(fetch_result, self._root, target, self._echo, of=target, patience=_PATIENCE_SECONDS)
            except Exception as error:  # noqa: BLE001 - each kind of remote has its own errors, and none must end a run
                self._answers = False
                reason = reason_of(error) or type(error).__name__
                self._echo(f"{target}: not looked for in DVC's remote: {reason}; this run looks there no more")
        return False

    def push(self, target: str) -> None:
        """Push the result of a stage that ran; what fails is warned of, and pushed at this run's end or by the next."""
        if remote_name(self._root) is None:
            return
        _pending(self._root).parent.mkdir(parents=True, exist_ok=True)
        _pending(self._root).touch()
        if self._answers:
            self._answers = False
            with warn_on_failure(f"dvc push {target}"):
                pushed = effect(push_data, self._root, target, of=target, patience=_PATIENCE_SECONDS)
                self._echo(f"dvc push {target}: {pushed} objects")
                self._answers = True


def push_data(root: Path, target: str | None = None) -> int | None:
    """Push what dvc.lock and `*.dvc` name, or a stage's part of it, to the default remote, then the entries of the run
    cache; the number of objects that it lacked.

    None where the default is the state folder's own remote, on this disk.

    Raises: InputError for what DVC refuses, Unavailable where the remote does not take it.
    """
    from dvc.exceptions import UploadError

    name = remote_name(root)
    if name is None:
        return None
    with chdir(root), open_repo(root) as repo:
        stages = repo.stage.collect(target) if target else repo.index.stages
        try:
            pushed = int(repo.push(targets=[target] if target else None))
            pushed += _push_uncached(repo, stages)
        except UploadError as error:
            raise Unavailable(f"remote {name}: {error.amount} objects were not pushed") from error
        # After their files: a host that finds an entry finds the result.
        pushed += sum(_copy_entries(stage, repo.cache.legacy, odb) for odb in _run_caches(repo) for stage in stages)
    if target is None:
        _pending(root).unlink(missing_ok=True)
    return pushed


def _push_uncached(repo: Any, stages: Iterable[Any]) -> int:
    """Push the outs with `cache: false`, such as metrics, of which the run cache has copies."""
    from dvc.exceptions import UploadError

    infos = {out.hash_info for stage in stages for out in stage.outs if not out.use_cache and out.hash_info}
    local = repo.cache.local
    result = repo.cloud.push({info for info in infos if local.exists(info.value)})
    if result.failed:
        raise UploadError(len(result.failed))
    return len(result.transferred)


def fetch_result(root: Path, target: str, echo: Echo) -> bool:
    """Bring a stage's outputs from the default remote, where it has those of the same inputs and the disk has not.

    Raises: InputError for what DVC refuses, and errors of the remote.
    """
    from dvc.exceptions import CheckoutError, DownloadError
    from dvc.repo import lock_repo
    from dvc.stage.cache import RunCacheNotFoundError

    with chdir(root), _without_log(), open_repo(root) as repo, lock_repo(repo):
        (stage,) = repo.stage.collect(target)
        if not stage.changed():
            return False
        is_named = _is_locked(stage)
        if is_named:
            with suppress(CheckoutError, DownloadError):
                repo.pull(targets=[target])
                if not stage.changed():
                    return True
        if not _has_inputs(stage):
            return False
        with suppress(RunCacheNotFoundError):
            repo.stage_cache.restore(stage, dry=True)
            return False  # on this disk
        local = repo.cache.legacy
        for odb in _run_caches(repo):
            _copy_entries(stage, odb, local)
        if is_named or _entries(stage, local):
            stage.remove_outs()  # as DVC does before a stage; it replaces no file that it has never seen
            with suppress(RunCacheNotFoundError):
                repo.stage_cache.restore(stage, pull=True)
                return True
            echo(f"{target}: DVC's remote has a result of the same inputs, but lacks files of it")
    return False


@contextmanager
def _without_log() -> Iterator[None]:
    """Without DVC's lines on each file that the remote lacks: what follows from them is said in one."""
    loggers = [logging.getLogger(name) for name in ("dvc", "dvc_data", "dvc_objects")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def results_in_remote(root: Path, targets: Collection[str]) -> list[str]:
    """The stages whose results of the same inputs the default remote names, but not this disk; nothing changes.

    Whether all their files are there too is seen when they are fetched. A remote that fails is reported.
    """
    from dvc.repo import lock_repo

    if not targets or remote_name(root) is None:
        return []
    try:
        with chdir(root), open_repo(root, read_only=True) as repo, lock_repo(repo):
            return [target for target in targets if _is_in_remote(repo, *repo.stage.collect(target))]
    except Exception as error:  # noqa: BLE001 - as in RemoteResults.fetch
        reason = reason_of(error) or type(error).__name__
        print(f"DVC's remote: {reason}; not known which results it has", file=sys.stderr, flush=True)
        return []


def _is_in_remote(repo: Any, stage: Any) -> bool:
    from dvc.stage.cache import RunCacheNotFoundError

    results = []
    if _is_locked(stage):
        results.append([out.hash_info.value for out in stage.outs if out.use_cache])
    if _has_inputs(stage):
        with suppress(RunCacheNotFoundError):
            repo.stage_cache.restore(stage, dry=True)
            return False
        for odb in _run_caches(repo):
            for path in _entries(stage, odb).values():
                with odb.fs.open(path, encoding="utf-8") as file:
                    results.append([out["md5"] for out in yaml.safe_load(file)["outs"]])
    remote = repo.cloud.get_remote_odb(None)
    return any(all(remote.exists(value) for value in hashes) for hashes in results)


def _is_locked(stage: Any) -> bool:
    """Whether dvc.lock has the stage's result of the same inputs, as in a fresh clone."""
    return all(out.hash_info for out in stage.outs) and not stage.changed(allow_missing=True)


def _has_inputs(stage: Any) -> bool:
    """Whether the run cache can have results of a stage: its dependencies, which are hashed now, exist."""
    from dvc.dependency.base import DependencyDoesNotExistError

    with suppress(DependencyDoesNotExistError):
        stage.save_deps()
        return _run_key(stage) is not None
    return False


def _run_caches(repo: Any) -> list[Any]:
    """The remote's run cache; none where DVC supports none there: HTTP, and remotes with versions of the cloud."""
    from dvc.config import RemoteConfigError

    with suppress(RemoteConfigError):
        odb = repo.cloud.get_remote_odb(None, hash_name="md5-dos2unix")
        return [] if odb.fs.protocol in ("http", "https") else [odb]
    return []


def _run_key(stage: Any) -> str | None:
    """The run cache's hash of a stage's command, dependencies, parameters and paths of outputs.

    None where DVC saves no run: without one of these, or with an output that stays while the stage runs.
    """
    from dvc.stage.serialize import to_single_stage_lockfile
    from dvc.utils import dict_sha256

    if stage.always_changed or not (stage.cmd and stage.deps and stage.outs):
        return None
    if not all(each.hash_info for each in stage.deps) or any(each.persist for each in stage.outs):
        return None
    entry = to_single_stage_lockfile(stage)
    entry["outs"] = [out["path"] for out in entry["outs"]]
    return str(dict_sha256(entry, exclude=["size", "nfiles"]))


def _entries(stage: Any, odb: Any) -> dict[str, str]:
    """Path of each entry of a stage and its inputs in the run cache of a cache or remote, by name."""
    key = _run_key(stage)
    folder = odb.fs.join(odb.path, "runs", key[:2], key) if key else ""
    return {odb.fs.name(path): path for path in odb.fs.find(folder)} if key else {}


def _copy_entries(stage: Any, source: Any, target: Any) -> int:
    """Copy the run cache's entries of a stage and its inputs that the target lacks; returns their number."""
    from dvc.fs import generic

    entries, present = _entries(stage, source), _entries(stage, target)
    for name in entries.keys() - present:
        path = target.fs.join(target.path, source.fs.relpath(entries[name], source.path))
        generic.copy(source.fs, entries[name], target.fs, path)
    return len(entries.keys() - present)
