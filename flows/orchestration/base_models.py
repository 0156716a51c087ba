"""The base models of fine-tuning that params.yaml names: fetched before DVC decides which stages are out of date."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from components.config.model_settings import Family, TuneConfig
from components.config.params import FAMILY_OF_SECTION, InputError, load_params
from components.config.paths import CONFIG, ORIGIN, Paths
from components.config.project import Project, load_project
from components.datasets.formats import read_rows
from components.runtime.stage import digest
from components.tracking.registry import Registry, is_empty
from flows.orchestration.flow_run import Echo

TWO_TURNS = [{"role": role, "content": "words"} for role in ("user", "assistant", "user", "assistant")]


def fetch_base_models(paths: Paths, echo: Echo) -> None:
    """Put each model that a section's `base` names into data/imported, and remove those that none names.

    Raises: InputError when there is no such model, its family is not the section's, or its chat template does not suit
    the conversations.
    """
    params = load_params(paths.params)
    for section, config in params.fine_tuned.items():
        template = None
        if isinstance(config, TuneConfig):
            template = _Template(config, load_project(params.project, paths.root), paths)
        _fetch(section, FAMILY_OF_SECTION[section], config.base, template, paths, echo)


class _Template:
    """The chat template that `tune.template` chooses for the base."""

    def __init__(self, config: TuneConfig, project: Project, paths: Paths) -> None:
        self._base, self._setting, self._datasets = config.base, config.template, config.datasets
        self._project, self._paths = project, paths
        self._file = None if config.template in ("auto", "own") else (paths.root / config.template).expanduser()
        if self._file is not None and not self._file.is_file():
            raise InputError(
                f"params.yaml: tune.template: {config.template}: no such file; write auto, own, or a template's path"
            )

    @property
    def origin(self) -> dict[str, str]:
        """What the fetched folder depends on."""
        digests = {} if self._file is None else {"template_sha256": digest(self._file)}
        return {"template": self._setting, **digests}

    def choose(self, source: Path, echo: Echo) -> str | None:
        """The template that replaces the base's; None: its own.

        Raises: InputError when the template cannot be used, or knows no tools and the conversations have calls.
        """
        from components.tokenization.hf_tokenizer import load_chat_tokenizer

        template = None if self._file is None else self._file.read_text(encoding="utf-8")
        tokenizer = load_chat_tokenizer(source, template)
        tokenizer.encode_chat(TWO_TURNS)  # what `prepare` would refuse is refused here
        if self._setting == "auto" and not tokenizer.knows_tools:
            tokenizer = tokenizer.with_tools()
            template = tokenizer.template
            echo(
                f"tune.template: auto: the chat template of {self._base} knows no tools; declarations, calls"
                f" ({tokenizer.call_format.open}) and results are put into its messages"
            )
        if not tokenizer.knows_tools and (name := self._with_calls()):
            raise InputError(
                f"params.yaml: tune.template: {self._setting}: the chat template knows no tools that can be read back,"
                f" and the conversations of {name} call some; write tune.template: auto, or the path of one that does"
            )
        return template

    def _with_calls(self) -> str | None:
        """The first dataset whose conversations may have calls: the project's own, or an added one that has some."""
        for name in self._datasets:
            folder = self._paths.collected / name
            if name in self._project.datasets or any(map(_has_calls, read_rows(folder, "train", ["messages"]))):
                return name
        return None


def _has_calls(row: Mapping[str, Sequence[Mapping[str, object]]]) -> bool:
    return any(message["tool_calls"] for message in row["messages"])


def _fetch(section: str, family: Family, base: str, template: _Template | None, paths: Paths, echo: Echo) -> None:
    folder = paths.imported(family)
    if not base:
        if (folder / CONFIG).is_file():
            from components.tracking.model_import import clear

            clear(folder)
            echo(f"{section}.base: none; {section} starts from the pretrained model again")
        return
    source, identity = _find(f"params.yaml: {section}.base: {base}", base, paths)
    origin = {**identity, **(template.origin if template else {})}
    written = folder / ORIGIN
    current = json.loads(written.read_text(encoding="utf-8")) if written.is_file() else {}
    if (folder / CONFIG).is_file() and current == origin:
        return
    from components.tracking.model_import import inspect_model, place_model

    model = inspect_model(source)
    if model.family != family:
        raise InputError(
            f"params.yaml: {section}.base: {base}: {model.architecture} is no {family}; name a model that is"
        )
    place_model(source, folder, origin, template.choose(source, echo) if template else None)
    echo(f"{section}.base: {base} ({model.architecture}, {model.parameters:,} parameters) fetched")


def _find(where: str, base: str, paths: Paths) -> tuple[Path, Mapping[str, str]]:
    """The folder that `base` names, and its origin: path and digest, or registered version."""
    folder = (paths.root / base).expanduser()
    if (folder / CONFIG).is_file():
        return folder, {"folder": base, "sha256": digest(folder)}
    if "/" in base and not is_version(base):
        raise InputError(f"{where}: no model folder (no config.json there), and no NAME@ALIAS or NAME/VERSION")
    if is_empty(paths.home):
        raise InputError(f'{where}: nothing is registered yet; run "loopwright import DIR --name NAME"')
    version = Registry(paths.home).resolve(base)
    return version.folder, {"version": str(version)}


def is_version(base: str) -> bool:
    """Whether this reads as NAME/VERSION."""
    name, _, version = base.partition("/")
    return bool(name) and version.isdigit()
