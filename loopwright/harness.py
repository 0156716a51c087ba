"""`loopwright harness`: a registered model on the tasks that others compare models with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from components.config.paths import Paths, find_root
from loopwright.output import Json, print_json, print_table


def harness(
    model: Annotated[
        str, typer.Argument(metavar="NAME@ALIAS", help="Which decoder; NAME/VERSION works too.")
    ] = "agent@champion",
    tasks: Annotated[
        list[str] | None, typer.Option("--task", metavar="TASK", help="A task of lm-evaluation-harness; repeat.")
    ] = None,
    include: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder with task files of your own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows of each task at most.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask through the model's chat template.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows answered side by side.")] = 32,
    as_json: Json = False,
) -> None:
    """Evaluate a registered decoder with lm-evaluation-harness (extra lm-eval); most of its tasks fetch their data."""
    if not tasks:
        raise typer.BadParameter("name at least one", param_hint="--task")
    from components.evaluation.harness import run_tasks
    from components.tracking.registry import resolve

    version = resolve(model, Paths(find_root()).home)
    results = run_tasks(version.folder, tasks, include, limit, chat, batch_size)
    if as_json:
        print_json({"model": str(version), "results": results})
        return
    print_table(
        ("task", "figure", "value"),
        [(task, name, value) for task, figures in results.items() for name, value in figures.items()],
    )
