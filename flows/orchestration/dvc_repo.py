"""The project's DVC repository: which stages are out of date, and folders under version control."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, chdir, contextmanager, suppress
from dataclasses import dataclass
from graphlib import TopologicalSorter
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from components.config.params import InputError
from components.config.paths import Paths, disk_trouble, writing
from components.runtime.checkpoint_folders import restore_lock_files
from components.runtime.files import replace_file, write_text
from components.runtime.process import alive, has_git
from components.runtime.stage import PIPELINE, outs, read_stages
from flows.orchestration.dvc_command import write_in_one_step

LOCAL_REMOTE = "local"
"""The remote in the state folder."""


@dataclass(frozen=True)
class StageState:
    """A stage of dvc.yaml and why it is out of date."""

    name: str
    needs: tuple[str, ...]
    """Stages whose outputs it reads."""
    reasons: tuple[str, ...]
    """What `dvc status` says of it; empty when it is up to date."""
    after: tuple[str, ...] = ()
    """Stages out of date on whose outputs it depends: it is out of date too if these change them."""

    @property
    def is_due(self) -> bool:
        """Whether a run comes to it; DVC then decides whether it executes."""
        return bool(self.reasons or self.after)

    def describe(self, width: int) -> str:
        """Its state in a line of at most `width` characters: as many reasons or stages as fit, and how many more."""
        if not self.is_due:
            return "up to date"
        names = self.reasons or self.after
        begin = "" if self.reasons else "up to date until after "
        for shown in range(len(names), 0, -1):
            more = [f"and {len(names) - shown} more"] if shown < len(names) else []
            line = begin + ", ".join([*names[:shown], *more])
            if len(line) <= width:
                return line
        return f"{line[: width - 1]}…"


def configure(root: Path) -> None:
    """Point DVC's caches and its remote at the state folder; without git, let DVC version alone.

    Nothing absolute is written that a copy of the project would take along: DVC would go on in the original.
    """
    from configobj import ConfigObj, ConfigObjError

    home = Paths(root).home
    os.environ["DVC_SITE_CACHE_DIR"] = str(home / "dvc")
    # DVC itself lets everybody write there, and unpickles what it reads.
    (home / "dvc" / "repo").mkdir(mode=0o700, parents=True, exist_ok=True)
    (root / ".dvc").mkdir(exist_ok=True)
    remote = home / "dvc-remote"
    url = os.path.relpath(remote, root / ".dvc") if home.is_relative_to(root) else str(remote)
    # Not by DVC, which writes ASCII alone (and reads the file as what it is).
    try:
        local = ConfigObj(str(root / ".dvc" / "config.local"), encoding="utf-8")
    except (ConfigObjError, UnicodeDecodeError) as error:
        raise InputError(f".dvc/config.local: {' '.join(str(error).split())}; correct it, or remove it") from None
    before = local.dict()
    local.setdefault("core", {})["no_scm"] = str(not has_git(root)).lower()
    local["core"].pop("site_cache_dir", None)  # absolute, by versions before this one
    local.setdefault(f'remote "{LOCAL_REMOTE}"', {})["url"] = url
    if local.dict() != before:
        content = BytesIO()
        local.write(content)  # by itself it writes in place
        replace_file(root / ".dvc" / "config.local", lambda file: file.write(content.getvalue()))


def stage_states(
    root: Path, force: bool = False, until: str | None = None, pipeline: str = PIPELINE, read_only: bool = False
) -> list[StageState]:
    """The stages of a dvc.yaml in the order they run, each with the reasons why it is out of date.

    With `read_only`, neither the project nor the state folder changes.

    Raises: InputError when DVC cannot read what it versions, or `until` is no stage.
    """
    logging.getLogger("dvc").setLevel(logging.ERROR)  # it warns of locks that killed processes left, and removes them
    # DVC names stages and files as seen from the current folder.
    with chdir(root), open_repo(root, read_only=read_only) as repo:
        if not read_only:
            _remove_broken_lock(repo)
            with repo.lock:
                for file in restore_lock_files(Paths(root)):
                    print(f"{file}: was torn; restored as it was when the last stage began", file=sys.stderr)
        needs = _graph(repo, root, pipeline)
        changed = {name.rpartition(":")[2]: why for name, why in repo.status(pipeline).items()}
    states: dict[str, StageState] = {}
    for name in _up_to(needs, until):
        reasons = ["--force"] if force else list(_reasons(changed.get(name, [])))
        stale: list[str] = []
        for needed in (states[needed] for needed in needs[name] if needed in states):
            stale += [*needed.after, *([needed.name] if needed.reasons else [])]
        after = () if force else tuple(name for name in states if name in stale)
        states[name] = StageState(name, tuple(needs[name]), tuple(reasons), after)
    return list(states.values())


def _remove_broken_lock(repo: Any) -> None:
    """Remove DVC's lock file where nobody that it names is alive, or a process that was killed left half of it.

    DVC itself refuses the latter for ever, and takes a process that nobody has waited for (a zombie) for a living one.
    The file is read and written under the repository's lock, so nobody writes it meanwhile.
    """
    path = Path(repo.tmp_dir) / "rwlock"
    with suppress(FileNotFoundError), repo.lock:
        try:
            locks = json.loads(path.read_text(encoding="utf-8"))
            owners = [*locks["write"].values(), *(owner for owners in locks["read"].values() for owner in owners)]
        except (ValueError, KeyError, AttributeError):
            path.unlink()
            return
        if not any(alive(owner["pid"]) for owner in owners if owner):
            path.unlink()


def _graph(repo: Any, root: Path, pipeline: str) -> dict[str, list[str]]:
    """Stages of a dvc.yaml in the order they run, each with those of it that it depends on."""
    from dvc.stage import PipelineStage

    graph = repo.index.graph
    declared = list(read_stages(root, pipeline))
    stages = {stage.name: stage for stage in graph if isinstance(stage, PipelineStage) and stage.name in declared}
    needs = {
        name: [needed.name for needed in graph.successors(stages[name]) if needed in stages.values()]
        for name in sorted(stages, key=declared.index)
    }
    return {name: needs[name] for name in TopologicalSorter(needs).static_order()}


def _up_to(needs: Mapping[str, list[str]], until: str | None) -> list[str]:
    if until is None:
        return list(needs)
    selected = {name for name in needs if until in (name, name.partition("@")[0])}
    if not selected:
        raise InputError(f"--until: {until!r} is no stage of dvc.yaml; one of {', '.join(needs)}")
    for name in reversed(list(needs)):
        if name in selected:
            selected.update(needs[name])
    return [name for name in needs if name in selected]


def _reasons(changes: list[Any]) -> Iterator[str]:
    """DVC's status of one stage as short phrases, such as `data/added modified`."""
    for change in changes:
        if isinstance(change, str):
            yield change
            continue
        for paths in change.values():
            for path, state in paths.items():
                if isinstance(state, dict):
                    yield from (f"{path}: {key} {how}" for key, how in state.items())
                else:
                    yield f"{path} {state}"


def check_versioning(root: Path, folder: Path) -> None:
    """Raises: InputError when DVC could not version a folder, whatever it held."""
    for part in (folder, *folder.parents):
        if part != root and part.is_relative_to(root) and part.is_symlink():
            name, target = part.relative_to(root), part.resolve()
            raise InputError(
                f"{name}: is a link to {target}, and DVC versions nothing behind a link; move it back here, and keep"
                f' DVC\'s cache there instead: "dvc cache dir --local {target}/dvc-cache" and'
                ' "dvc config --local cache.type reflink,symlink"'
            )
    with open_repo(root, folder):
        pass


def version_data(root: Path, folder: Path) -> str:
    """Put a folder under DVC's version control (`NAME.dvc` beside it) and return its hash.

    Raises: InputError when DVC cannot, as while another process holds its lock.
    """
    with open_repo(root, folder) as repo:
        repo.scm_context.quiet = True  # DVC's advice on git would stand in the middle of a command's answer
        added = repo.add([str(folder)])
        return str(added[0].outs[0].hash_info.value)


def push_folder(root: Path, folder: Path) -> None:
    """Send a versioned folder to DVC's remote, from where other hosts fetch it.

    Raises: InputError when DVC cannot.
    """
    with chdir(root), open_repo(root, folder) as repo:
        repo.push(targets=[f"{folder.relative_to(root)}.dvc"])


def fetch_version(root: Path, folder: Path, version: str) -> None:
    """Replace a folder by a version of it, from DVC's cache or remote; `version` is what `version_data` returned.

    Where neither has it, there is no folder then; where files of it are missing, the folder stays as it is.

    Raises: InputError when DVC cannot, as while its remote does not answer.
    """
    from dvc.exceptions import CheckoutError, DownloadError

    content = f"outs:\n- md5: {version}\n  hash: md5\n  path: {folder.name}\n"
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_text(folder.parent / f"{folder.name}.dvc", content)
    with chdir(root), open_repo(root, folder) as repo, suppress(CheckoutError):
        try:
            repo.pull(targets=[f"{folder.relative_to(root)}.dvc"], force=True)
        except DownloadError:
            has_list = False
            with suppress(Exception):  # each kind of remote has errors of its own
                has_list = repo.cloud.get_remote_odb(None).exists(version)
            if not has_list:  # it does not answer
                raise


def fetch_missing(root: Path, pipeline: str, collected: Path) -> None:
    """Bring what the stages of a pipeline read and other stages wrote, where it is not on this disk, from the remote.

    Their dependencies name the validations of datasets; what they read is in `collected`.

    Raises: InputError when the remote lacks something.
    """
    written = {out for stage in read_stages(root, PIPELINE).values() for out in outs(stage)}
    read = {dep for stage in read_stages(root, pipeline).values() for dep in stage.get("deps", [])}
    read.add(str(collected.relative_to(root)))
    targets = sorted(
        dep for dep in read if not (root / dep).exists() and any(Path(dep).is_relative_to(out) for out in written)
    )
    if targets and (root / "dvc.lock").is_file():
        with chdir(root), open_repo(root) as repo:
            repo.pull(targets=targets)


def cache_folder(root: Path) -> Path:
    """The folder of DVC's cache, which its configuration may have moved."""
    with open_repo(root, read_only=True) as repo:
        return Path(repo.cache.local_cache_dir)


def prune_cache(root: Path, retained: Collection[str], days: float, dry_run: bool) -> list[tuple[str, int]]:
    """Remove objects of DVC's cache that nothing refers to: neither the files of this working tree, nor branches and
    tags of git, nor `retained`, hashes of outs. Returns hashes and bytes.

    DVC's lock is held, under which it stores an out and writes dvc.lock.
    """
    if not (root / ".dvc").is_dir():
        return []
    logging.getLogger("dvc").setLevel(logging.ERROR)  # it warns of each out that was never made
    with chdir(root), open_repo(root) as repo, repo.lock:
        is_git = has_git(root)
        by_remote = repo.used_objs(all_branches=is_git, all_tags=is_git, skip_failed=True)
        used = {info.value for infos in by_remote.values() for info in infos} | set(retained)
        # Metrics are in git; DVC restores an earlier result of a stage only where the cache has them too.
        for _ in repo.brancher(all_branches=is_git, all_tags=is_git):
            used |= {out.hash_info.value for out in repo.index.outs if not out.use_cache}
        objects = Path(repo.cache.local.path)
        for name in [name for name in used if name and name.endswith(".dir")]:
            with suppress(FileNotFoundError):  # in a remote alone
                listed = json.loads((objects / name[:2] / name[2:]).read_text(encoding="utf-8"))
                used |= {entry["md5"] for entry in listed}
        before = time.time() - days * 86_400
        sizes = []
        for path in sorted(objects.glob("??/*")):
            name, state = path.parent.name + path.name, path.stat()
            if name not in used and state.st_mtime <= before:
                sizes.append((name, state.st_size))
                if not dry_run:
                    path.unlink()
        return sizes


@contextmanager
def open_repo(root: Path, folder: Path | None = None, read_only: bool = False) -> Iterator[Any]:
    """The project's DVC repository; errors name `folder`, where they concern one.

    Raises: InputError for what DVC refuses.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    write_in_one_step()
    with ExitStack() as stack:
        try:
            stack.enter_context(writing(root / ".dvc"))
            if read_only:
                repo = _read_only_repo(root, Path(stack.enter_context(TemporaryDirectory(prefix="loopwright-"))))
            else:
                configure(root)
                repo = Repo(str(root))
            yield stack.enter_context(repo)
        except DvcException as error:
            raise dvc_error(error, str(folder.relative_to(root)) if folder else None) from error


def _read_only_repo(root: Path, scratch: Path) -> Any:
    """A DVC repository that keeps its lock files, its cache of file hashes and its .gitignore entries in `scratch`."""
    from dvc.repo import Repo
    from dvc.repo.scm_context import SCMContext
    from dvc.scm import SCM

    tmp, hashes, btime = scratch / "tmp", scratch / "hashes", root / ".dvc" / "tmp" / "btime"
    tmp.mkdir()
    with suppress(OSError):  # a file that another process removes meanwhile: DVC hashes more files then
        shutil.copytree(Paths(root).home / "dvc", hashes)
        shutil.copy2(btime, tmp)  # its time is part of the name under which DVC finds the cache
    read_only = {"tmp_dir": str(tmp), "scm_context": SCMContext(SCM(str(root), no_scm=True))}
    variable, before = "DVC_SITE_CACHE_DIR", os.environ.get("DVC_SITE_CACHE_DIR")
    os.environ[variable] = str(hashes)
    try:
        return type("ReadOnlyRepo", (Repo,), read_only)(str(root), config={"core": {"no_scm": not has_git(root)}})
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def dvc_error(error: Exception, place: str | None = None) -> InputError:
    """What DVC refuses, in one line: the file and the place in it, DVC's words, and the remedy."""
    from dvc.config import ConfigError
    from dvc.lock import LockError

    if isinstance(error, LockError):
        return InputError(f"{place or '.dvc'}: another process works with DVC here; try again when it has ended")
    if trouble := disk_trouble(error):
        return InputError(trouble)
    reason = " ".join(str(error).split()).removesuffix(".")
    if place:
        return InputError(f"{place}: DVC: {reason}")
    if isinstance(error, ConfigError):
        return InputError(f".dvc/config: DVC: {reason}; correct it there or in .dvc/config.local")
    file = str(getattr(error, "path", "") or getattr(error, "relpath", "")).removeprefix("./")
    cause, details = error.__cause__, []
    if mark := getattr(cause, "problem_mark", None):  # of the YAML parser
        details = [f"line {mark.line + 1}, column {mark.column + 1}: {getattr(cause, 'problem', '')}"]
    for invalid in getattr(cause, "errors", ()):  # of the schema
        details.append(f"{'.'.join(str(part) for part in invalid.path)}: {invalid.error_message}")
    remedy = f"correct {file or 'dvc.yaml'}"
    if file.endswith("dvc.lock"):
        remedy = f'remove {file}, and "loopwright run" writes it anew'
    elif file.endswith(".dvc"):
        remedy = f"restore {file} from git, or add the dataset again"
    return InputError(f"{file or 'dvc.yaml'}: {', '.join(details) or f'DVC: {reason}'}; {remedy}")
