"""`loopwright run` and `improve`: the pipeline and one round of continual learning, as Prefect flow runs."""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from components.config.params import InputError, Refused, load_params, moved_project, read_value
from components.config.paths import Paths, find_root, writing
from loopwright.output import Json, print_json, print_table, say

if TYPE_CHECKING:
    from flows.orchestration.run_stage import StageFailed
    from flows.pipeline import Report
    from flows.release import Release


def run(
    scale: Annotated[str | None, typer.Option(help="smoke, laptop, gpu or cluster; written to params.yaml.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Written to params.yaml; may be given again."),
    ] = None,
    until: Annotated[str | None, typer.Option(metavar="STAGE", help="Stop after this stage, without release.")] = None,
    force: Annotated[bool, typer.Option(help="Run every stage, although up to date.")] = False,
    as_json: Json = False,
) -> None:
    """Bring every stage of dvc.yaml up to date as one Prefect flow run, then release the models."""
    root = find_root()
    signal.signal(signal.SIGTERM, interrupt)
    echo = Terminal(as_json)
    params = Paths(root).params
    overrides = _overrides(scale, set_ or [])
    _write_params(params, overrides | moved_project(params, overrides), echo)
    from flows.orchestration.run_stage import StageFailed
    from flows.pipeline import ReleaseRefused, RunOptions, run_pipeline

    try:
        report = run_pipeline(RunOptions(root, until, force, echo))
    except StageFailed as error:
        raise told(error) from error
    except ReleaseRefused as refused:
        if not as_json:
            _summarise(refused.report)
        raise
    except KeyboardInterrupt:
        say('run: stopped; "loopwright run" goes on from the last checkpoint')
        sys.exit(130)
    if as_json:
        print_json(asdict(report))
    else:
        _summarise(report)


def improve(
    force: Annotated[
        bool, typer.Option("--force", help="Also without new feedback, and every stage from its beginning.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Curate what people said, train from the champion, put both before the gate, promote or refuse (exit 3)."""
    from flows.improve import improve as run_improvement
    from flows.orchestration.run_stage import StageFailed

    signal.signal(signal.SIGTERM, interrupt)
    try:
        done = run_improvement(find_root(), force, Terminal(as_json))
    except StageFailed as failure:
        raise told(failure) from failure
    except KeyboardInterrupt:
        say('improve: stopped; "loopwright improve" goes on from the last checkpoint')
        sys.exit(130)
    if as_json:
        print_json(asdict(done))
        return
    print(f"{done.outcome}: {done.reason}")
    if done.release:
        print(f"champion  {done.champion}, score {done.release.score:.4f}\nbento     {done.release.bento}")


def told(failure: StageFailed) -> Exception:
    """A stage's failure as the error whose exit code it has."""
    return (Refused if failure.exit_code == 3 else InputError)(str(failure))


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _overrides(scale: str | None, assignments: list[str]) -> dict[str, Any]:
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


def _write_params(path: Path, overrides: dict[str, Any], echo: Callable[[str], None]) -> None:
    """Write overrides into params.yaml, once they are known to be valid; comments stay."""
    valid = load_params(path, overrides).model_dump(mode="json", by_alias=True)
    if not overrides:
        return
    from ruamel.yaml import YAML

    text = YAML()
    text.preserve_quotes = True
    text.width = 120
    values = text.load(path.read_text(encoding="utf-8"))
    changed = False
    for dotted in overrides:
        *sections, key = dotted.split(".")
        # As validated: YAML reads 1e-3 as text, the configuration as a number.
        value, lock_owner = valid, values
        for section in sections:
            value, lock_owner = value[section], _section(lock_owner, section)
        value, before = value[key], lock_owner.get(key, "unset")
        if before != value:
            echo(f"params.yaml: {dotted}: {before} → {value}")
            lock_owner[key] = _written(value)
            changed = True
    if changed:
        whole = path.resolve()  # a link stays one
        scratch = whole.with_name(f".{path.name}.new")
        try:
            with writing(path):
                with scratch.open("w", encoding="utf-8") as file:
                    text.dump(values, file)
                shutil.copymode(whole, scratch)
                scratch.replace(whole)
        finally:
            scratch.unlink(missing_ok=True)


def _written(value: Any) -> Any:
    """A value as it is to stand there: a list on one line, a text that YAML 1.1 would read otherwise in quotes."""
    from ruamel.yaml.comments import CommentedSeq
    from ruamel.yaml.scalarstring import SingleQuotedScalarString

    if isinstance(value, list):
        listed = CommentedSeq(map(_written, value))
        listed.fa.set_flow_style()
        return listed
    return SingleQuotedScalarString(value) if isinstance(value, str) and yaml.safe_load(value) != value else value


def _section(values: Any, name: str) -> Any:
    if values.get(name) is None:
        values[name] = {}
    section = values[name]
    if hasattr(section, "fa") and not section:
        # `model: {}` grows into a block, one key a line, like its neighbours.
        section.fa.set_block_style()
    return section


class Terminal:
    """Prints what the run says; progress lines of a stage overwrite each other where a person looks on."""

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


def _summarise(report: Report) -> None:
    print()
    print_table(
        ("stage", "outcome", "seconds"), [(row.name, row.outcome, f"{row.seconds:.1f}") for row in report.stages]
    )
    print()
    for release in report.releases:
        _present(release)
    for refusal in report.refusals:
        print(f"refused   {refusal}\n")
    if report.releases:
        print('Next: "loopwright serve" and "loopwright chat", or "loopwright registry list"')
    elif not report.refusals:
        print('Next: "loopwright run" for the stages that follow and the release')
    print(f"Done in {report.seconds:.1f} s")


def _present(release: Release) -> None:
    columns = ("held-out suite", "score", *(["baseline"] if release.baselines else []))
    print_table(columns, [(name, value, *_of(release.baselines, name)) for name, value in release.scores.items()])
    print(f"\nchampion  {release.version} ({release.outcome}), score {release.score:.4f}")
    print(f"bento     {release.bento}")
    print(f"asked     {release.question}\nanswered  {release.answer}\n")


def _of(baselines: dict[str, float], suite: str) -> list[float | None]:
    return [baselines.get(suite)] if baselines else []
