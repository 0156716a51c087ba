"""`loopwright package`, `import`, `export` and `harness`: models to and from the registry, and on public benchmarks."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from components.config.params import FAMILY_OF_SECTION, InputError, load_params
from components.config.paths import Paths, find_root, writing
from components.models.base_store import base_folder, is_adapter
from components.models.weight_files import ADAPTER_CONFIG
from components.runtime.files import copy_folder, write_text
from components.runtime.process import limited_to
from loopwright.output import Json, print_json, print_table, say

ExportFormat = Literal["hf", "gguf", "peft"]
Quantization = Literal["f16", "q8_0"]


def package(
    model: Annotated[
        str, typer.Argument(metavar="NAME@ALIAS", help="Which model; NAME/VERSION works too.")
    ] = "agent@champion",
    as_json: Json = False,
) -> None:
    """Build the Bento of a registered model, weights included, and print its tag."""
    from flows.bento import package as build

    paths = Paths(find_root())
    tag = build(paths, model)
    if as_json:
        print_json({"tag": tag, "serve": f"loopwright serve --bento {tag}", "home": str(paths.home / "bento")})
    else:
        print(tag)


def import_(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A model folder in Hugging Face's format, or a .gguf.")],
    name: Annotated[str | None, typer.Option(help="Name in the registry; that of the folder or file if left out.")] = (
        None
    ),
    base: Annotated[
        str, typer.Option(metavar="NAME@ALIAS", help="Base of an adapter that does not name it itself.")
    ] = "",
    time_limit: Annotated[float, typer.Option(metavar="SECONDS", min=1, help="Time that the check may take.")] = 3600,
    as_json: Json = False,
) -> None:
    """Check a model folder, a PEFT adapter or a GGUF file and register it; a `base` in params.yaml may then name it."""
    if name is None:
        name = re.sub(r"[^a-z0-9._-]+", "-", path.resolve().name.removesuffix(".gguf").lower()).strip("._-")[:63]
    # What MLflow and BentoML both accept.
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", name):
        allowed = "1 to 63 letters, digits, '.', '_' and '-', a letter or digit first and last"
        raise InputError(f"--name: {name!r}: not a valid model name; allowed are {allowed}")
    from components.feedback.store import shared_registry
    from components.inference.cache_plan import check_memory, serving_note
    from components.tracking.model_import import import_model, inspect_model, unpacked

    paths = Paths(find_root())
    serve = load_params(paths.params).serve
    with ExitStack() as stack:
        with limited_to(time_limit, str(path)):
            folder = stack.enter_context(unpacked(path, paths.home, base))
            model = inspect_model(folder)
            if serve.backend == "engine":
                check_memory(folder)
        version = import_model(folder, model, name, shared_registry(paths.home), paths, path)
    if left_out := version.tags.get("tools_left_out"):
        say(
            f"{path}: its tools {left_out} are left out: an import runs no code, and their source differs from"
            " that of the project in params.yaml"
        )
    if as_json:
        print_json({"model": str(version), "aliases": list(version.aliases), **asdict(model)})
        return
    if model.family == "decoder" and (
        note := serving_note(version.folder, serve.max_running, serve.max_context_tokens)
    ):
        print(f"Served on this machine: {note}")
    section = next(name for name, family in FAMILY_OF_SECTION.items() if family == model.family)
    print(f"{version}: {model.architecture}, {model.parameters:,} parameters, {model.vocab_size:,} tokens")
    print(f'Next: "loopwright run --set {section}.base={version}"')


def export(
    model: Annotated[str, typer.Argument(metavar="NAME@ALIAS", help="Which model; NAME/VERSION works too.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Target folder; must be empty or not exist.")],
    form: Annotated[
        ExportFormat,
        typer.Option("--format", help="hf: for transformers and vLLM; gguf: for llama.cpp; peft: the adapter alone."),
    ] = "hf",
    quantization: Annotated[Quantization, typer.Option(help="Of the matrices in a GGUF file.")] = "f16",
    as_json: Json = False,
) -> None:
    """Copy a registered model to a folder that transformers, vLLM and others load, or write it as a GGUF file.

    An adapter is merged into its base, unless the format is peft.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: is not an empty folder; choose another, or empty it first")
    folder = folder.resolve()  # behind a link the folder is replaced, not the link
    from components.tracking.model_card import CARD
    from components.tracking.registry import resolve

    version = resolve(model, Paths(find_root()).home)
    if form == "peft" and not is_adapter(version.folder):
        raise InputError(f"{version}: has weights of its own and is no adapter; export it with --format hf")
    if form == "peft" or (form == "hf" and not is_adapter(version.folder)):
        adapter = {"base_model_name_or_path": str(base_folder(version.folder))} if form == "peft" else {}
        copy_folder(version.folder, folder)
        if adapter:
            config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
            write_text(folder / ADAPTER_CONFIG, json.dumps(config | adapter, indent=2) + "\n")
    else:
        from components.models.checkpoint import merge_folder

        with writing(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
        with writing(folder), tempfile.TemporaryDirectory(dir=folder.parent, prefix=".exporting-") as scratch:
            whole = merge_folder(version.folder, Path(scratch)) if is_adapter(version.folder) else version.folder
            if form == "hf":
                copy_folder(whole, folder)
            else:
                _write_gguf(whole, folder, f"{version.name}-{quantization}.gguf", quantization)
            if (version.folder / CARD).is_file():
                shutil.copyfile(version.folder / CARD, folder / CARD)
    files = sorted(file.name for file in folder.iterdir())
    if as_json:
        print_json({"model": str(version), "folder": str(folder), "files": files})
    else:
        print(f"{version} is in {folder}: {', '.join(files)}")


def _write_gguf(source: Path, folder: Path, name: str, quantization: Quantization) -> None:
    from components.models.gguf_export import pack_gguf
    from components.tokenization.gguf_tokenizer import pack_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    try:
        pack_gguf(source, folder / name, quantization, partial(pack_tokenizer, source))
    except BaseException:
        (folder / name).unlink(missing_ok=True)
        raise


def harness(
    model: Annotated[
        str, typer.Argument(metavar="NAME@ALIAS", help="Which decoder; NAME/VERSION works too.")
    ] = "agent@champion",
    tasks: Annotated[
        list[str] | None, typer.Option("--task", metavar="TASK", help="A task of lm-evaluation-harness; repeat.")
    ] = None,
    include: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder with task files of your own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows of each task at most.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Apply the model's chat template.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per batch.")] = 32,
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
