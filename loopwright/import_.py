"""`loopwright import`: a Hugging Face model folder into the registry."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from components.config.params import FAMILY_OF_SECTION, InputError, load_params
from components.config.paths import Paths, find_root
from loopwright.output import Json, print_json, say


def import_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A Llama-, Qwen3-, BERT- or T5-format model folder.")],
    name: Annotated[str, typer.Option(help="Name in the registry.")],
    as_json: Json = False,
) -> None:
    """Check a Hugging Face model folder and register it; a section's `base` in params.yaml may then name it."""
    # What MLflow and BentoML both take.
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", name):
        allowed = "1 to 63 letters, digits, '.', '_' and '-', a letter or digit first and last"
        raise InputError(f"--name: {name!r}: is no name for a model; allowed are {allowed}")
    from components.inference.cache_plan import serving_note
    from components.tracking.model_import import import_model, inspect_model
    from components.tracking.registry import Registry

    found = inspect_model(folder)
    paths = Paths(find_root())
    serve = load_params(paths.params).serve
    version = import_model(folder, found, name, Registry(paths.home), paths)
    if left_out := version.tags.get("tools_left_out"):
        say(
            f"{folder}: its tools {left_out} are left out: an import runs no code, and theirs is not that of the"
            " project in params.yaml"
        )
    if as_json:
        print_json({"model": str(version), "aliases": list(version.aliases), **asdict(found)})
        return
    if found.family == "decoder" and (note := serving_note(folder, serve.max_running, serve.max_context_tokens)):
        print(f"Served on this machine: {note}")
    section = next(name for name, family in FAMILY_OF_SECTION.items() if family == found.family)
    print(f"{version}: {found.architecture}, {found.parameters:,} parameters, {found.vocab_size:,} tokens")
    print(f'Next: "loopwright run --set {section}.base={version} --set {section}.lora_rank=8"')
