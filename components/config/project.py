"""A project: the module with a team's own datasets, tools and suites (docs/your-project.md).

params.yaml names it as `project`. Only this file imports it, by name, and reads the attributes of `Project` from it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from components.config.errors import InputError

if TYPE_CHECKING:
    from components.config.model_settings import CollectConfig

Kind = Literal["documents", "conversations", "preferences", "labelled_texts", "text_pairs", "images"]
"""Kinds of datasets; their columns: components/datasets/formats.py."""

DEFAULT_PROJECT = "examples.stdlib_agent"
"""The project where params.yaml names none, and the tools of models that were saved without their tools."""


@dataclass(frozen=True)
class Collecting:
    """The settings with which a project collects its datasets."""

    settings: CollectConfig
    seed: int
    files: Path
    """Folder of the files that its tools read (`Project.tool_files`)."""


@dataclass(frozen=True)
class Rows:
    """The rows of one dataset, in the columns of its kind (`components/datasets/formats.py`); each read once."""

    train: Iterable[dict[str, Any]]
    test: Iterable[dict[str, Any]]
    """Held out; `suite` names the suite that a row belongs to."""
    validation: Iterable[dict[str, Any]] = ()
    """Rows by which training chooses its best weights; of labelled texts and text pairs."""
    sources: Sequence[dict[str, str]] = ()
    """Origins of the rows: `{"name", "sha256"}`."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Rows left out, by reason."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Metrics for data/metrics/collect.json beside the number of rows."""


@dataclass(frozen=True)
class Project:
    """The attributes of a project's module; those with a default are optional."""

    name: str
    """Of the module."""
    datasets: Mapping[str, Kind]
    """Kind of each dataset that it collects, by name."""
    rows: Callable[[str, Collecting], Rows]
    """The rows of the dataset of a name."""
    tools: Callable[[Path], Sequence[Any]]
    """The agent's tools, given the folder of their files: functions, or `Tool.of(function, permissions=[...])`."""
    smoke_questions: Mapping[str, str]
    """By registered model (agent, classifier, summarizer): the question of its smoke test before promotion."""
    scales: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Defaults for params.yaml, as in components/config/scales.yaml: under `all`, and under the name of a scale."""
    tool_files: Callable[[Collecting], None] | None = None
    """Writes the files that the tools read into `Collecting.files`."""
    response_formats: bool = False
    """Whether its conversations train the response format that a system message asks for."""
    description: str = ""
    """What its models are for, in their model cards; else the first paragraph of the module's docstring."""
    licences: Mapping[str, str] = field(default_factory=dict)
    """Licence of each dataset by name, as an SPDX identifier where there is one; stated in model cards."""


def load_project(name: str, root: Path | None = None) -> Project:
    """Import a project's module, from the folder `root` where it is not installed.

    Raises: InputError when there is no such module, or it lacks a part.
    """
    if root is not None and str(root.resolve()) not in sys.path:
        sys.path.append(str(root.resolve()))
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise InputError(f"params.yaml: project: {name!r}: no module {error.name!r} here") from None
        raise InputError(f"params.yaml: project: {name!r} imports {error.name!r}, which is not installed") from error
    parts = {part.name: getattr(module, part.name) for part in fields(Project)[1:] if hasattr(module, part.name)}
    parts.setdefault("description", " ".join((module.__doc__ or "").partition("\n\n")[0].split()))
    needed = [part.name for part in fields(Project)[1:] if part.default is part.default_factory is MISSING]
    if missing := [part for part in needed if part not in parts]:
        raise InputError(
            f"params.yaml: project: {name!r} has no {', '.join(missing)}; a project's module has {', '.join(needed)}"
            " (docs/your-project.md)"
        )
    for part in ("datasets", "smoke_questions", "scales"):
        if not isinstance(parts.get(part, {}), Mapping):
            raise InputError(f"params.yaml: project: {name}.{part}: {type(parts[part]).__name__} is not a dict")
    return Project(name, **parts)


def module_path(name: str, root: Path) -> str | None:
    """The folder or file of a module below `root`, relative to it; None where it is not below it."""
    path = Path(*name.split("."))
    if (root / path / "__init__.py").is_file():
        return path.as_posix()
    return path.with_suffix(".py").as_posix() if (root / path.with_suffix(".py")).is_file() else None
