"""Writes values into `params.yaml`, whose comments and order stay."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import yaml

from components.config.params import load_params
from components.runtime.files import write_text


def write_params(path: Path, overrides: dict[str, Any], echo: Callable[[str], None]) -> None:
    """Write overrides into params.yaml once they are validated; comments stay."""
    valid = load_params(path, overrides).model_dump(mode="json", by_alias=True)
    if not overrides:
        return
    from ruamel.yaml import YAML

    yaml_file = YAML()
    yaml_file.preserve_quotes = True
    yaml_file.width = 120
    values = yaml_file.load(path.read_text(encoding="utf-8"))
    changed = False
    for dotted in overrides:
        *sections, key = dotted.split(".")
        # As validated: YAML reads 1e-3 as text, the configuration as a number.
        value, target = valid, values
        for section in sections:
            value, target = value[section], _section(target, section)
        value, before = value[key], target.get(key, "unset")
        if before != value:
            echo(f"params.yaml: {dotted}: {before} → {value}")
            target[key] = _as_yaml(value)
            changed = True
    if changed:
        stream = StringIO()
        yaml_file.dump(values, stream)
        write_text(path, stream.getvalue())


def _as_yaml(value: Any) -> Any:
    """A value as ruamel writes it: a list on one line, a string that YAML 1.1 would read as another type in quotes."""
    from ruamel.yaml.comments import CommentedSeq
    from ruamel.yaml.scalarstring import SingleQuotedScalarString

    if isinstance(value, list):
        sequence = CommentedSeq(map(_as_yaml, value))
        sequence.fa.set_flow_style()
        return sequence
    return SingleQuotedScalarString(value) if isinstance(value, str) and yaml.safe_load(value) != value else value


def _section(values: Any, name: str) -> Any:
    if values.get(name) is None:
        values[name] = {}
    section = values[name]
    if hasattr(section, "fa") and not section:
        # `model: {}` grows into a block, one key a line, like its neighbours.
        section.fa.set_block_style()
    return section
