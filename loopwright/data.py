"""`loopwright data`: list, show, add and validate datasets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from components.config.params import InputError, load_params
from components.config.paths import Paths, find_root, writing
from components.config.project import load_project
from components.runtime.object_store import local_files
from components.runtime.process import has_git, limited_to
from loopwright.output import Json, print_json, print_table, say
from loopwright.user_data import erase_user, export_user

if TYPE_CHECKING:
    from components.datasets.formats import DatasetInfo, Kind
    from components.validation.report import ValidationReport
    from components.validation.validate import Validator

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Datasets: list, show, add, validate; records of a person.",
    rich_markup_mode=None,
)

_VALUE_CHARS = 160


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List the built-in datasets and those that were added."""
    paths = Paths(find_root())
    datasets = [_summary(paths, name) for name in _names(paths)]
    if as_json:
        print_json(datasets)
        return
    columns = ("kind", "rows", "origin", "validation")
    rows = [(row["name"], *(_text(row[column]) for column in columns)) for row in datasets]
    print_table(("dataset", *columns), rows)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A name from `loopwright data list`.")],
    rows: Annotated[int, typer.Option(min=0, max=1000, help="How many of its first rows to show.")] = 3,
    as_json: Json = False,
) -> None:
    """Show one dataset: rows per split, what was dropped, sources, first rows, whether it is valid."""
    from components.datasets.formats import read_rows

    paths = Paths(find_root())
    folder = _folder(paths, name)
    first = [_without_files(row) for _, row in zip(range(rows), read_rows(folder, "train"), strict=False)]
    shown = {**_summary(paths, name), "first_rows": first}
    if as_json:
        print_json(shown)
        return
    for key, value in shown.items():
        if key not in ("sources", "first_rows"):
            print(f"{key:<12} {_text(value)}")
    for source in shown["sources"][:5]:
        print(f"{'source':<12} {source['name']}  sha256 {source['sha256'][:12]}")
    if len(shown["sources"]) > 5:
        print(f"{'':<12} and {len(shown['sources']) - 5} more")
    for row in first:
        print()
        for line in _lines(row):
            print(f"  {line}")


@app.command()
def add(
    kind: Annotated[
        str, typer.Argument(help="documents, conversations, preferences, labelled_texts, text_pairs or images.")
    ],
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILE...", help="Of the formats in docs/formats.md, or s3://BUCKET/NAME: a file, folder or pattern."
        ),
    ],
    name: Annotated[str, typer.Option(help="Name of the new dataset.")],
    text_column: Annotated[str | None, typer.Option(help="Column that holds the text; `a.b` reaches into `a`.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column that holds the label.")] = None,
    source_column: Annotated[str | None, typer.Option(help="Column that holds the source of a pair.")] = None,
    target_column: Annotated[str | None, typer.Option(help="Column that holds the target of a pair.")] = None,
    role: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=ROLE", help="Role that a turn's name stands for, as bing=assistant; repeatable."),
    ] = None,
    image_folder: Annotated[
        Path | None,
        typer.Option(help="Where relative paths of pictures begin; else where the file is that names them."),
    ] = None,
    quarantine: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Of images: leave out rows that break a rule, and write them here with why."),
    ] = None,
    licence: Annotated[str, typer.Option(help="Licence, as an SPDX identifier; stated in model cards.")] = "",
    replace: Annotated[bool, typer.Option("--replace", help="Replace a dataset of that name.")] = False,
    time_limit: Annotated[
        float, typer.Option(metavar="SECONDS", min=1, help="Time that reading and validating may take.")
    ] = 3600,
    as_json: Json = False,
) -> None:
    """Read files into a dataset, validate it and put it under version control; keep all of it or nothing."""
    from components.datasets.conversations import named_roles
    from components.datasets.importers import Columns, adding, undo_killed
    from components.datasets.importers import add as add_files
    from components.datasets.quarantine import Quarantine
    from flows.orchestration.dvc_repo import check_versioning

    paths = Paths(find_root())
    check = partial(_check_added, paths, load_params(paths.params).validate_.max_failed_share)

    def failing(rows: Sequence[Mapping[str, Any]]) -> Mapping[int, str]:
        return _validator(paths.expectations).failing_rows([dict(row) for row in rows], "images")

    check_versioning(paths.root, paths.added / name)
    columns = Columns(text_column, label_column, source_column, target_column, named_roles(role or []), image_folder)
    undo_killed(paths.added, paths.home / "stages")
    is_adding = adding(paths.home / "stages", name)
    left_out_rows = Quarantine(quarantine, failing) if quarantine else nullcontext()
    names, version = built_in(paths), partial(_version, paths, name)
    limited = limited_to(time_limit, ", ".join(files))
    with is_adding, writing(paths.added), limited, left_out_rows as left_out, local_files(files, paths.home) as local:
        info = add_files(kind, local, name, paths.added, columns, replace, check, names, version, left_out, licence)
    if as_json:
        print_json({**asdict(info), "folder": str(paths.added / name), "version": f"data/added/{name}.dvc"})
    else:
        _print_added(name, info, quarantine)


def _check_added(paths: Paths, max_failed_share: float, folder: Path) -> ValidationReport:
    """Validate a dataset; the outcome is recorded when it is valid, as else nothing of it stays."""
    from components.validation.validate import Validator

    say("validating; Great Expectations takes some seconds to start")
    report = Validator(paths.expectations, max_failed_share, paths.home).check(folder)
    return _record_validation(paths, folder, report) if report.success else report


def _print_added(name: str, info: DatasetInfo, quarantine: Path | None) -> None:
    dropped = f" ({_counted(info.dropped)} dropped)" if info.dropped else ""
    print(f"{name}: {_counted(info.rows)} rows of kind {info.kind}{dropped}; valid")
    if info.dropped.get("quarantined"):
        print(f"left out, with reasons: {quarantine}")
    print(f"train on it: {_TRAIN_ON[info.kind].format(name)}")


@app.command()
def validate(
    name: Annotated[str | None, typer.Argument(help="One dataset; without it, all of them.")] = None,
    as_json: Json = False,
) -> None:
    """Validate datasets against the expectations of their kind; exit code 3 when one fails."""
    from components.validation.report import refusal
    from components.validation.validate import Validator

    paths = Paths(find_root())
    folders = [_folder(paths, name)] if name else list(_folders(paths))
    if not folders:
        raise InputError('data: no dataset yet; run "loopwright run --until collect" or "loopwright data add"')
    docs = paths.home / "docs" / "validation"
    say("validating; Great Expectations takes some seconds to start")
    validator = Validator(paths.expectations, load_params(paths.params).validate_.max_failed_share, paths.home)
    reports = [_record_validation(paths, folder, validator.check(folder, docs)) for folder in folders]
    refused = refusal(reports, str(docs / "index.html")) if any(report.failed for report in reports) else None
    if as_json:
        outcome = {"error": refused, "exit_code": 3} if refused else {}
        print_json({**outcome, "docs": str(docs / "index.html"), "datasets": [report.to_json() for report in reports]})
    else:
        rows = [
            (report.dataset, report.kind, _counted(report.rows), len(report.checks), len(report.failed))
            for report in reports
        ]
        print_table(("dataset", "kind", "rows", "checks", "failed"), rows)
    if refused:
        say(refused)
        raise typer.Exit(3)


app.command("export-user")(export_user)
app.command("erase-user")(erase_user)


@cache
def _validator(expectations: Path) -> Validator:
    """Great Expectations takes some seconds to start."""
    from components.validation.validate import Validator

    return Validator(expectations)


_TRAIN_ON = {
    "documents": "loopwright run --set pretrain.decoder.dataset={}",
    "conversations": "loopwright run --set tune.dataset={}",
    "labelled_texts": "loopwright run --set classifier.dataset={}",
    "text_pairs": "loopwright run --set summarizer.dataset={}",
    "images": "loopwright run --set tune.dataset={}",
    "preferences": 'set align.dataset to {} in params.yaml, then run "loopwright improve --force"',
}
"""The command that trains on a dataset of each kind."""


def built_in(paths: Paths) -> Mapping[str, Kind]:
    """The datasets that the project collects itself."""
    return load_project(load_params(paths.params).project, paths.root).datasets


def _names(paths: Paths) -> list[str]:
    added = {path.parent.name for path in paths.added.glob("*/dataset.json")}
    pointers = {path.stem for path in paths.added.glob("*.dvc")}
    return [*built_in(paths), *sorted(added | pointers)]


def _folders(paths: Paths) -> Iterator[Path]:
    for name in _names(paths):
        for parent in (paths.collected, paths.added):
            if (parent / name / "dataset.json").is_file():
                yield parent / name
                break


def _folder(paths: Paths, name: str) -> Path:
    """Where a dataset lies: as it was added, or as `collect` wrote it."""
    folder = (paths.collected if name in built_in(paths) else paths.added) / name
    if (folder / "dataset.json").is_file():
        return folder
    if name in built_in(paths):
        raise InputError(f'{name}: not collected yet; run "loopwright run --until collect"')
    if (paths.added / f"{name}.dvc").is_file():
        raise InputError(f'{name}: its data is not in this checkout; run "dvc pull data/added/{name}.dvc"')
    raise InputError(f"{name}: no such dataset; known: {', '.join(_names(paths))}")


def _summary(paths: Paths, name: str) -> dict[str, Any]:
    """What `list` and `show` print of a dataset, also where its data is not in this checkout."""
    from components.datasets.formats import read_info

    own = built_in(paths)
    summary: dict[str, Any] = {"name": name, "kind": own.get(name), "origin": "built in" if name in own else "added"}
    try:
        folder = _folder(paths, name)
    except InputError as error:
        missing = str(error).removeprefix(f"{name}: ")
        nothing: dict[str, Any] = {"rows": {}, "dropped": {}, "sources": [], "licence": "", "folder": None}
        return {**summary, **nothing, "validation": missing}
    info = read_info(folder)
    collected = paths.collected / name / "dataset.json"
    split = {} if name in own or not collected.is_file() else {"collected": read_info(collected.parent).rows}
    return {
        **summary,
        "kind": info.kind,
        "rows": info.rows,
        **split,
        "dropped": info.dropped,
        "sources": info.sources,
        "licence": info.licence,
        "folder": str(folder.relative_to(paths.root)),
        "validation": _validation(paths, folder),
    }


def _record_validation(paths: Paths, folder: Path, report: ValidationReport) -> ValidationReport:
    """Store the outcome with the digest of the files that were validated, and return it."""
    from components.datasets.formats import write_json
    from components.runtime.stage import digest

    outcome = {"digest": digest(folder), "success": report.success, "failed": len(report.failed)}
    write_json(paths.home / "validation" / f"{report.dataset}.json", outcome)
    return report


def _validation(paths: Paths, folder: Path) -> str:
    """The outcome of the last validation of these very files, by the command or by the stage."""
    from components.runtime.stage import digest

    file = paths.home / "validation" / f"{folder.name}.json"
    outcome = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    if outcome and outcome["digest"] == digest(folder):
        return "passed" if outcome["success"] else f"failed ({outcome['failed']} checks)"
    result = paths.validation / "result.json"
    if folder.parent == paths.collected and result.is_file():
        for report in json.loads(result.read_text(encoding="utf-8")):
            if report["dataset"] == folder.name:
                return "passed" if report["success"] else "failed"
    return "changed since it was validated" if outcome else "not validated yet"


def _version(paths: Paths, name: str) -> None:
    """Put the dataset under DVC's version control, and say which files to commit to git."""
    from flows.orchestration.dvc_repo import version_data

    pointer = f"data/added/{name}.dvc"
    version_data(paths.root, paths.added / name)
    in_git = has_git(paths.root)
    advice = f"git add {pointer} data/added/.gitignore" if in_git else f"no git here, so back {pointer} up yourself"
    say(f"version recorded in {pointer}; {advice}")


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def _text(value: Any) -> Any:
    return _counted(value) if isinstance(value, Mapping) else value


def _without_files(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row, its pictures by size and digest."""
    if not row.get("images"):
        return dict(row)
    files = [{"bytes": len(image), "sha256": hashlib.sha256(image).hexdigest()} for image in row["images"]]
    return {**row, "images": files}


def _lines(row: Mapping[str, Any]) -> Iterator[str]:
    """A row as text: a line per column, and a line per turn of a conversation."""
    for name, value in row.items():
        if name == "images":
            yield f"{name:<8} {len(value)} of {sum(image['bytes'] for image in value):,} bytes"
            continue
        if not isinstance(value, list):
            yield f"{name:<8} {_cut(value)}"
            continue
        if name != "messages":
            yield f"{name}:"
        for message in value:
            yield f"{message['role']:<10} {_cut(message['content'])}".rstrip()
            for call in message.get("tool_calls") or []:
                yield f"{'':<10} calls {call['function']['name']} {_cut(call['function']['arguments'])}"


def _cut(value: Any) -> str:
    text = "" if value is None else " ".join(str(value).split())
    return text if len(text) <= _VALUE_CHARS else f"{text[:_VALUE_CHARS]}… ({len(text):,} characters)"
