"""The pipeline: Prefect tasks built from dvc.yaml, one per stage, each brought up to date in turn.

DVC says in this process what is out of date and why; what runs, runs in a process of its own
(flows/orchestration/run_stage.py). The models' release follows (flows/release.py).
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any
from uuid import UUID

from components.config.params import InputError, Refused, load_params
from components.config.paths import Paths, disk_trouble, writing
from components.runtime.process import file_lock, git, has_git
from components.runtime.stage import PIPELINE, PROGRESS, read_stages, warn_on_failure
from flows.orchestration.base_models import fetch_base_models
from flows.orchestration.flow_run import FlowRun, run_flow
from flows.orchestration.run_stage import StageResult, reproduce
from flows.release import Release, Releases, look_at_releases, release

_SECONDS_BETWEEN_ARTIFACTS = 2.0
_REASONS_SHOWN = 3


@dataclass(frozen=True)
class StageState:
    """A stage of dvc.yaml and why it is out of date."""

    name: str
    needs: tuple[str, ...]
    """Stages whose outputs it reads."""
    reasons: tuple[str, ...]
    """Empty when it is up to date."""
    force: bool = False
    """Its outputs must be made anew, although DVC sees no change."""


@dataclass
class Report:
    """What a run did."""

    stages: list[StageResult] = field(default_factory=list)
    releases: list[Release] = field(default_factory=list)
    """The champion of each model that the stages make; none when the run stopped at an earlier stage."""
    refusals: list[str] = field(default_factory=list)
    """What the gate said of the models that it refused."""
    flow_run: str | None = None
    """Prefect's id; None when nothing was to do."""
    seconds: float = 0.0


class ReleaseRefused(Refused):
    """The gate refused some of the models; the others were released."""

    def __init__(self, report: Report) -> None:
        super().__init__("; ".join(report.refusals))
        self.report = report


@dataclass(frozen=True)
class RunOptions:
    """What is asked of a run."""

    root: Path
    until: str | None = None
    """Stop after this stage, without a release."""
    force: bool = False
    """Run every stage, although up to date, and without earlier checkpoints."""
    echo: Callable[[str], None] = print
    """Told each line for the terminal."""

    @property
    def paths(self) -> Paths:
        return Paths(self.root)


def configure(root: Path) -> None:
    """Point DVC's caches and its remote at the state folder; without git, let DVC version alone.

    Nothing absolute is written that a copy of the project would take along: DVC would go on in the original.
    """
    from configobj import ConfigObj, ConfigObjError

    home = Paths(root).home
    os.environ["DVC_SITE_CACHE_DIR"] = str(home / "dvc")
    (root / ".dvc").mkdir(exist_ok=True)
    remote = home / "dvc-remote"
    url = os.path.relpath(remote, root / ".dvc") if home.is_relative_to(root) else str(remote)
    # Not by DVC, which writes ASCII alone (and reads the file as what it is).
    try:
        local = ConfigObj(str(root / ".dvc" / "config.local"), encoding="utf-8")
    except (ConfigObjError, UnicodeDecodeError) as error:
        raise InputError(f".dvc/config.local: {' '.join(str(error).split())}; put it right, or remove it") from None
    before = local.dict()
    local.setdefault("core", {})["no_scm"] = str(not has_git(root)).lower()
    local["core"].pop("site_cache_dir", None)  # absolute, by versions before this one
    local.setdefault('remote "local"', {})["url"] = url
    if local.dict() != before:
        local.write()


def look(root: Path, force: bool = False, until: str | None = None, pipeline: str = PIPELINE) -> list[StageState]:
    """The stages of a dvc.yaml in the order they run, each with the reasons why it is out of date.

    Raises: InputError when dvc.yaml cannot be read, or `until` is none of its stages.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    configure(root)
    logging.getLogger("dvc").setLevel(logging.ERROR)  # it warns of locks that killed processes left, and removes them
    try:
        # DVC names stages and files as seen from the current folder.
        with chdir(root), Repo() as repo:
            _remove_broken_lock(repo)
            needs = _needs(repo, root, pipeline)
            changed = {name.rpartition(":")[2]: why for name, why in repo.status(pipeline).items()}
    except DvcException as error:
        raise _told("dvc.yaml", error) from error
    other_python = _other_python(root)
    states: dict[str, StageState] = {}
    for name in _until(needs, until):
        reasons = ["--force"] if force else list(_reasons(changed.get(name, [])))
        if name == "collect" and other_python:
            reasons.append(other_python)
        reasons += [f"after {needed}" for needed in needs[name] if needed in states and states[needed].reasons]
        again = force or (name == "collect" and bool(other_python))
        states[name] = StageState(name, tuple(needs[name]), tuple(reasons), again)
    return list(states.values())


def _remove_broken_lock(repo: Any) -> None:
    """Remove DVC's lock file where a process that was killed left half of it: DVC itself refuses it for ever.

    It is read and written under the repository's lock, so nobody writes it meanwhile.
    """
    path = Path(repo.tmp_dir) / "rwlock"
    with suppress(FileNotFoundError), repo.lock:
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            path.unlink()


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
    with _repo(root, folder):
        pass


def version_data(root: Path, folder: Path) -> str:
    """Put a folder under DVC's version control (`NAME.dvc` beside it) and return its hash.

    Raises: InputError when DVC cannot, as while another process holds its lock.
    """
    with _repo(root, folder) as repo:
        repo.scm_context.quiet = True  # DVC's advice on git would stand in the middle of a command's answer
        added = repo.add([str(folder)])
        return str(added[0].outs[0].hash_info.value)


@contextmanager
def _repo(root: Path, folder: Path) -> Iterator[Any]:
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with writing(root / ".dvc"):
            configure(root)
            with Repo(str(root)) as repo:
                yield repo
    except DvcException as error:
        raise _told(str(folder.relative_to(root)), error) from error


def _told(where: str, error: Exception) -> InputError:
    """What DVC says is wrong, in one line; with more where it does not say what helps."""
    from dvc.lock import LockError

    if isinstance(error, LockError):
        return InputError(f"{where}: another process works with DVC here; try again when it has ended")
    return InputError(disk_trouble(error) or f"{where}: DVC: {' '.join(str(error).split())}")


def run_pipeline(order: RunOptions) -> Report:
    """Bring every stage up to date as one Prefect flow run, then release the models.

    Raises: InputError, StageFailed, ReleaseRefused.
    """
    report, started = Report(), time.monotonic()
    try:
        git(order.root, "rev-parse", "HEAD")
    except InputError as error:
        order.echo(str(error))
    try:
        with file_lock(order.paths.home / "stages", "run"):
            fetch_base_models(order.paths, order.echo)
            states = look(order.root, order.force, order.until)
            if any(state.reasons for state in states) or not _all_released(order, report):
                _run_as_flow(order, states, report)
            else:
                report.stages = [StageResult(state.name, "up to date", 0.0) for state in states]
                _end(report)
    finally:
        report.seconds = time.monotonic() - started
    return report


def _run_as_flow(order: RunOptions, states: list[StageState], report: Report) -> None:
    scale = load_params(order.paths.params).scale
    body = partial(_bring_and_release, order, states, report)
    run_flow("pipeline", order.paths.home, order.echo, body, scale=scale, until=order.until, force=order.force)


def _end(report: Report) -> None:
    """Raises: ReleaseRefused where a model was refused."""
    if report.refusals:
        raise ReleaseRefused(report)


def _all_released(order: RunOptions, report: Report) -> bool:
    """Whether no model waits for its release; the report then says what became of them."""
    found = Releases() if order.until else look_at_releases(order.paths)
    if not found.pending:
        report.releases, report.refusals = found.champions, found.refusals
    return not found.pending


def _needs(repo: Any, root: Path, pipeline: str) -> dict[str, list[str]]:
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


def _until(needs: Mapping[str, list[str]], until: str | None) -> list[str]:
    if until is None:
        return list(needs)
    wanted = {name for name in needs if until in (name, name.partition("@")[0])}
    if not wanted:
        raise InputError(f"--until: {until!r} is no stage of dvc.yaml; one of {', '.join(needs)}")
    for name in reversed(list(needs)):
        if name in wanted:
            wanted.update(needs[name])
    return [name for name in needs if name in wanted]


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


def _other_python(root: Path) -> str:
    """Why `collect` is out of date although no file changed: it reads the interpreter it runs under."""
    path = Paths(root).metrics / "collect.json"
    read = json.loads(path.read_text(encoding="utf-8")).get("python") if path.is_file() else None
    if read in (None, sys.version):
        return ""
    return f"python {sys.version.split()[0]}, collected with {read.split()[0]}"


def _bring_and_release(order: RunOptions, states: list[StageState], report: Report, run: FlowRun) -> None:
    bring_up_to_date(order, states, report, run)
    if order.until is None:
        found = release(order.paths, order.echo, run.id)
        report.releases, report.refusals = found.champions, found.refusals
        _end(report)


def bring_up_to_date(order: RunOptions, states: list[StageState], report: Report, run: FlowRun) -> None:
    """Inside a flow run: the stages one after another; the first that fails ends it with its own message."""
    from prefect.artifacts import create_table_artifact

    report.flow_run = run.id
    ended: dict[str, Any] = {}
    try:
        for state in states:
            stage = _stage_task(order, state, report)
            waited = [ended[name] for name in state.needs if name in ended]
            ended[state.name] = stage(return_state=True, wait_for=waited)
            if not ended[state.name].is_completed():
                raise ended[state.name].result(raise_on_failure=False)
            run.note({f"stage.{state.name}": report.stages[-1].outcome})
    finally:
        rows = [{"stage": row.name, "outcome": row.outcome, "seconds": round(row.seconds, 1)} for row in report.stages]
        with warn_on_failure("Prefect artifact stages"):
            create_table_artifact(table=rows, key="stages", description="How each stage came to be up to date")


def _stage_task(order: RunOptions, state: StageState, report: Report) -> Any:
    """The Prefect task of one stage, under the stage's name."""
    from prefect import task
    from prefect.cache_policies import NO_CACHE
    from prefect.states import Completed

    def bring_up_to_date() -> Any:
        result = StageResult(state.name, "up to date", 0.0)
        if state.reasons:
            more = len(state.reasons) - _REASONS_SHOWN
            said = [*state.reasons[:_REASONS_SHOWN], *([f"and {more} more"] if more > 0 else [])]
            order.echo(f"{state.name}: {', '.join(said)}")
            result = reproduce(state.name, order.root, state.force, _StageOutput(state.name, order.echo))
        report.stages.append(result)
        order.echo(f"{state.name}: {result.outcome} ({result.seconds:.1f} s)")
        return Completed(name=result.outcome.capitalize(), message=f"{result.outcome} in {result.seconds:.1f} s")

    return task(name=state.name, task_run_name=state.name, cache_policy=NO_CACHE)(bring_up_to_date)


class _StageOutput:
    """Hears what a stage says: the terminal and Prefect's log get each line, a progress artifact the counts."""

    def __init__(self, stage: str, echo: Callable[[str], None]) -> None:
        from prefect import get_run_logger
        from prefect.artifacts import create_progress_artifact

        self._echo = echo
        self._log = get_run_logger()
        self._artifact: UUID | None = None
        with warn_on_failure(f"Prefect artifact of {stage}"):
            made = create_progress_artifact(0.0, key=f"{re.sub('[_@]', '-', stage)}-progress", description=stage)
            assert isinstance(made, UUID)
            self._artifact = made
        self._next_update = 0.0

    def __call__(self, line: str) -> None:
        self._echo(line)
        self._log.info("%s", line)
        said = PROGRESS.fullmatch(line)
        if said and (time.monotonic() >= self._next_update or said["done"] == said["total"]):
            self._update(100 * int(said["done"]) / max(1, int(said["total"])), said["facts"] or "")
            self._next_update = time.monotonic() + _SECONDS_BETWEEN_ARTIFACTS

    def _update(self, percent: float, facts: str) -> None:
        from prefect.artifacts import update_progress_artifact

        if self._artifact is not None:
            with warn_on_failure("Prefect progress artifact"):
                update_progress_artifact(self._artifact, progress=percent, description=facts)
