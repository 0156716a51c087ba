"""`loopwright predict`: batch inference on files, without an endpoint."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from components.config.params import load_params
from components.config.paths import CONFIG, Paths, find_root
from components.runtime.model_tasks import TASKS, task_of
from components.runtime.process import file_lock
from loopwright.output import Json, print_json, say
from loopwright.run import interruptible

if TYPE_CHECKING:
    from components.prediction.predict import Model

Task = Literal["chat", "classify", "summarize", "embed"]


def predict(
    source: Annotated[
        str, typer.Argument(help="JSON lines, CSV or Parquet: a file, a folder of files, or s3://BUCKET/NAME.")
    ],
    to: Annotated[str, typer.Option(metavar="DIR", help="Folder for the answers, or s3://BUCKET/NAME.")],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME@ALIAS|NAME/VERSION|FOLDER",
            help="Which model; a folder's tools are run. Default: the task's champion, agent@champion without a task.",
        ),
    ] = None,
    task: Annotated[Task | None, typer.Option(help="Default: what the model does; embed: vectors of texts.")] = None,
    column: Annotated[
        str | None, typer.Option(help="Column that is answered; default: messages, prompt, text or source.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Processes that divide the shards; default: run.workers.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Answer, classify, summarize or embed every row of files; the same command goes on where one was stopped."""
    paths = Paths(find_root())
    params = load_params(paths.params, {"run.workers": workers} if workers else None)
    source, to = (name if "://" in name else str(Path(name).resolve()) for name in (source, to))
    lock = f"predict-{hashlib.sha256(to.encode()).hexdigest()[:16]}"
    with file_lock(paths.home / "stages", lock), interruptible("predict: stopped; run it again to go on"):
        from components.prediction.predict import predict as answer

        summary = answer(source, to, _model(model, task, paths), params.run, column, _report)
    if as_json:
        print_json(asdict(summary))
        return
    files = f"{summary.files} file{'s' * (summary.files > 1)}"
    print(f"{summary.rows:,} rows by {summary.model}, {summary.errors:,} without an answer: {files} in {summary.to}")


def _model(name: str | None, task: Task | None, paths: Paths) -> Model:
    from components.prediction.predict import Model

    serve = load_params(paths.params).serve
    name = name or f"{_NAMES[task or 'chat']}@champion"
    if (Path(name) / CONFIG).is_file():
        folder, name = Path(name).resolve(), name
    else:
        from components.tracking.registry import resolve

        version = resolve(name, paths.home)
        folder, name = version.folder, str(version)
    return Model(folder, name, task or task_of(folder), serve, paths.root)


_NAMES: dict[Task, str] = {**{task: name for name, task in TASKS.items()}, "embed": "classifier"}
"""The registered model of each task."""


def _report(done: int, total: int, line: dict[str, Any]) -> None:
    without = f"  {line['errors']} without an answer" if line["errors"] else ""
    say(f"predict  {done}/{total}  {line['key']}  {line['rows']} rows{without}")
