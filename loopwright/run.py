"""`loopwright run` and `improve`: the pipeline and one round of continual learning, as Prefect flow runs."""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from components.config.params import InputError, Refused, load_params, moved_project, read_value
from components.config.paths import Paths, find_root
from components.runtime.params_file import write_params
from loopwright.output import Json, print_json, print_table, say

if TYPE_CHECKING:
    from flows.orchestration.run_stage import StageFailed
    from flows.pipeline import RunReport
    from flows.release import Release


def run(
    scale: Annotated[str | None, typer.Option(help="smoke, laptop, gpu or cluster; written to params.yaml.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Written to params.yaml; repeatable."),
    ] = None,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="Stop after this stage, without release.")] = None,
    force: Annotated[bool, typer.Option(help="Run every stage, although up to date.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would run, why and for how long; change nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Bring every stage of dvc.yaml up to date as one Prefect flow run, then release the models."""
    root = find_root()
    echo = Terminal(as_json)
    params = Paths(root).params
    overrides = read_overrides(scale, set_ or [])
    if dry_run:
        if overrides:
            raise InputError("--dry-run: changes no file, and --scale and --set do; write them into params.yaml first")
        _print_plan(root, until, force, as_json)
        return
    write_params(params, overrides | moved_project(params, overrides), echo)
    from flows.orchestration.run_stage import StageFailed
    from flows.pipeline import ReleaseRefused, RunOptions, run_pipeline

    try:
        with interruptible('run: stopped; "loopwright run" goes on from the last checkpoint'):
            report = run_pipeline(RunOptions(root, until, force, echo))
    except StageFailed as error:
        raise stage_error(error) from error
    except ReleaseRefused as refused:
        if not as_json:
            _print_report(refused.report)
        raise
    if as_json:
        print_json(asdict(report))
    else:
        _print_report(report)


def _print_plan(root: Path, until: str | None, force: bool, as_json: bool) -> None:
    """Print each stage, why it would run or whether DVC's remote has its result, and the seconds its last one took."""
    from components.runtime.checkpoint_folders import History
    from flows.orchestration.dvc_remote import results_in_remote
    from flows.orchestration.dvc_repo import stage_states

    load_params(Paths(root).params)
    states = stage_states(root, force, until, read_only=True)
    seconds = {state.name: History.read(state.name, Paths(root)).seconds for state in states}
    in_remote = [] if force else results_in_remote(root, [state.name for state in states if state.reasons])
    due = [state.name for state in states if state.is_due and state.name not in in_remote]
    total = sum(seconds[name] or 0.0 for name in due)
    unknown = [name for name in due if seconds[name] is None]
    if as_json:
        stages = [
            {
                "name": state.name,
                "runs": "no" if state.name not in due else "yes" if state.reasons else "maybe",
                "in_remote": state.name in in_remote,
                "reasons": list(state.reasons),
                "after": list(state.after),
                "seconds": seconds[state.name] if state.name in due else None,
            }
            for state in states
        ]
        print_json({"stages": stages, "seconds": total, "never_timed": unknown})
        return
    width = max(40, shutil.get_terminal_size().columns - max(len(state.name) for state in states) - 14)
    prefix = "result in DVC's remote: "
    descriptions = [
        prefix + state.describe(width - len(prefix)) if state.name in in_remote else state.describe(width)
        for state in states
    ]
    rows = zip(states, descriptions, strict=True)
    print_table(
        ("stage", "last took", "state"), [(state.name, _duration(seconds[state.name]), text) for state, text in rows]
    )
    print(f"\n{len(due)} of {len(states)} stages may run, {_duration(total)} at most by their last results", end="")
    print(f"; not known of {len(unknown)} that never ran here" if unknown else "")


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    unit, size = ("s", 1) if seconds < 120 else ("min", 60) if seconds < 7200 else ("h", 3600)
    return f"{seconds / size:.0f} {unit}"


def improve(
    force: Annotated[
        bool, typer.Option("--force", help="Also without new feedback, and every stage from the start.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be trained on; change nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Curate user feedback, train from the champion, compare the two, promote or refuse (exit 3)."""
    from flows.improve import improve as run_improvement
    from flows.orchestration.run_stage import StageFailed

    try:
        with interruptible('improve: stopped; "loopwright improve" goes on from the last checkpoint'):
            improvement = run_improvement(find_root(), force, Terminal(as_json), dry_run)
    except StageFailed as failure:
        raise stage_error(failure) from failure
    if as_json:
        print_json(asdict(improvement))
        return
    print(f"{improvement.outcome}: {improvement.reason}")
    if release := improvement.release:
        print(f"champion  {improvement.champion}, score {release.score:.4f}\nbento     {release.bento}")


def stage_error(failure: StageFailed) -> Exception:
    """A stage's failure as the exception that ends the command with the stage's exit code."""
    return (Refused if failure.exit_code == 3 else InputError)(str(failure))


@contextmanager
def interruptible(message: str) -> Iterator[None]:
    """Let SIGTERM end a block as Ctrl-C does: with a message on stderr and exit code 130."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        say(message)
        sys.exit(130)


def read_overrides(scale: str | None, assignments: list[str]) -> dict[str, Any]:
    """`section.key` → value, read as YAML, of `--scale` and every `--set`."""
    overrides: dict[str, Any] = {"scale": scale} if scale else {}
    for assignment in assignments:
        dotted, equals, value = assignment.partition("=")
        if not equals or not dotted.strip():
            raise InputError(
                f"--set: {assignment!r}: expected SECTION.KEY=VALUE, such as pretrain.decoder.max_steps=100"
            )
        try:
            overrides[dotted.strip()] = read_value(dotted.strip(), value)
        except yaml.YAMLError as error:
            raise InputError(f"--set: {assignment!r}: not a YAML value: {' '.join(str(error).split())}") from None
    return overrides


class Terminal:
    """Prints the lines of a run; on a terminal, progress lines of a stage overwrite each other."""

    def __init__(self, as_json: bool) -> None:
        self._out = sys.stderr if as_json else sys.stdout
        self._inside = False

    def __call__(self, line: str) -> None:
        from components.runtime.stage import PROGRESS

        progress = bool(PROGRESS.fullmatch(line)) and self._out.isatty()
        line = line[: shutil.get_terminal_size().columns - 1] if progress else line
        clear = "\r\x1b[K" if self._inside else ""
        self._out.write(f"{clear}{line}" + ("" if progress else "\n"))
        self._out.flush()
        self._inside = progress


def _print_report(report: RunReport) -> None:
    print()
    print_table(
        ("stage", "outcome", "seconds"), [(row.name, row.outcome, f"{row.seconds:.1f}") for row in report.stages]
    )
    print()
    for release in report.releases:
        _print_release(release)
    for refusal in report.refusals:
        print(f"refused   {refusal}\n")
    if report.releases:
        print('Next: "loopwright serve" and "loopwright chat", or "loopwright registry list"')
    elif not report.refusals:
        print('Next: "loopwright run" for the stages that follow and the release')
    print(f"Done in {report.seconds:.1f} s")


def _print_release(release: Release) -> None:
    columns = ("held-out suite", "score", *(["baseline"] if release.baselines else []))
    baselines = release.baselines
    rows = [(name, score, *([baselines.get(name)] if baselines else [])) for name, score in release.scores.items()]
    print_table(columns, rows)
    print(f"\nchampion  {release.version} ({release.outcome}), score {release.score:.4f}")
    print(f"bento     {release.bento}")
    print(f"asked     {release.question}\nanswered  {release.answer}\n")
