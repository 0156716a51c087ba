"""The models that fine-tuning starts from, where params.yaml names one: fetched before DVC looks at what is stale."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from components.config.model_settings import Family
from components.config.params import FAMILY_OF_SECTION, InputError, load_params
from components.config.paths import Paths
from components.runtime.stage import digest
from components.tracking.registry import Registry, is_empty
from flows.orchestration.flow_run import Echo

ORIGIN = "origin.json"


def fetch_base_models(paths: Paths, echo: Echo) -> None:
    """Put each model that a section's `base` names into data/imported, and take away what none names any more.

    Raises: InputError when there is no such model, or it is of another family than the section trains.
    """
    params = load_params(paths.params)
    for section, config in params.fine_tuned.items():
        _bring(section, FAMILY_OF_SECTION[section], config.base, paths, echo)


def _bring(section: str, family: Family, base: str, paths: Paths, echo: Echo) -> None:
    place = paths.imported(family)
    if not base:
        if (place / "config.json").is_file():
            from components.tracking.model_import import clear

            clear(place)
            echo(f"{section}.base: none; {section} starts from the pretrained one again")
        return
    folder, origin = _find(f"params.yaml: {section}.base: {base}", base, paths)
    if (place / "config.json").is_file() and _read(place / ORIGIN) == origin:
        return
    from components.tracking.model_import import inspect_model, place_model

    found = inspect_model(folder)
    if found.family != family:
        raise InputError(f"params.yaml: {section}.base: {base}: {found.architecture} is no {family}; name one that is")
    place_model(folder, place, dict(origin))
    echo(f"{section}.base: {base} ({found.architecture}, {found.parameters:,} parameters) fetched")


def _find(where: str, base: str, paths: Paths) -> tuple[Path, Mapping[str, str]]:
    """The folder that `base` names, and what tells it from others."""
    folder = (paths.root / base).expanduser()
    if (folder / "config.json").is_file():
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


def _read(path: Path) -> Mapping[str, str]:
    read: Mapping[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return read
