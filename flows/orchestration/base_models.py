"""The base models of fine-tuning that params.yaml names: fetched before DVC decides which stages are out of date."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from components.config.model_settings import Family
from components.config.params import FAMILY_OF_SECTION, InputError, load_params
from components.config.paths import CONFIG, ORIGIN, Paths
from components.runtime.stage import digest
from components.tracking.registry import Registry, is_empty
from flows.orchestration.flow_run import Echo


def fetch_base_models(paths: Paths, echo: Echo) -> None:
    """Put each model that a section's `base` names into data/imported, and remove those that none names.

    Raises: InputError when there is no such model, or its family is not the section's.
    """
    params = load_params(paths.params)
    for section, config in params.fine_tuned.items():
        _fetch(section, FAMILY_OF_SECTION[section], config.base, paths, echo)


def _fetch(section: str, family: Family, base: str, paths: Paths, echo: Echo) -> None:
    folder = paths.imported(family)
    if not base:
        if (folder / CONFIG).is_file():
            from components.tracking.model_import import clear

            clear(folder)
            echo(f"{section}.base: none; {section} starts from the pretrained model again")
        return
    source, origin = _find(f"params.yaml: {section}.base: {base}", base, paths)
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
    place_model(source, folder, dict(origin))
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
