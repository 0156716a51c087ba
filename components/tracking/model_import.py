"""Model folders from elsewhere into the registry: checked whole, then kept as they are, tokenizer and template too.

Nothing is taken that could run: weights are safetensors, code and pickles stay behind, a model's tools among them.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.agent.saved_tools import adopt_tools, load_tools, read_agent
from components.config.model_settings import Family
from components.config.params import InputError
from components.config.paths import Paths, writing
from components.models.checkpoint import INDEX, check_model, read_architecture, weight_files
from components.models.decoder import Decoder
from components.models.encoder import Encoder, EncoderConfig
from components.models.encoder_decoder import EncoderDecoder
from components.models.sentence_pooling import MODULES, pooling_files, read_pooling
from components.tokenization.hf_tokenizer import load_chat_tokenizer
from components.tokenization.text_tokenizer import CLS, SEP, TextTokenizer
from components.tracking.registry import ModelVersion, Registry

GOVERNED = ("agent", "classifier", "summarizer")
"""Models whose champion a gate chooses."""
KEPT = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "agent.json",
    "knowledge.sqlite",
)
"""Files of a model folder that are taken along, beside its weights."""
NEEDED = {"encoder": (CLS, SEP), "encoder_decoder": ("</s>",)}
"""Tokens, beside the one that pads, without which a family reads nothing."""
FAMILIES: dict[type[Any], Family] = {Decoder: "decoder", Encoder: "encoder", EncoderDecoder: "encoder_decoder"}


@dataclass(frozen=True)
class ModelInfo:
    """What a model folder turned out to hold."""

    family: Family
    architecture: str
    parameters: int
    vocab_size: int


def inspect_model(folder: Path) -> ModelInfo:
    """Check that a folder holds a model that we can run and train, with its tokenizer.

    Raises: InputError naming what is missing, unknown, misshapen or not supported.
    """
    model: Any = check_model(folder)
    family = next(family for kind, family in FAMILIES.items() if isinstance(model, kind))
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"{folder / 'tokenizer.json'}: not found; save the model's fast tokenizer with it")
    if family == "decoder" and "source" not in read_agent(folder):
        load_tools(folder)  # of which the folder has the names alone
    if family == "encoder":
        read_pooling(folder)
    tokens = load_chat_tokenizer(folder).vocab_size if family == "decoder" else _count_tokens(folder, model.config)
    if tokens > model.config.vocab_size:
        raise InputError(
            f"{folder / 'tokenizer.json'}: {tokens} tokens are more than the vocab_size {model.config.vocab_size} of"
            " config.json; give the tokenizer that the model was trained with"
        )
    architecture = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    return ModelInfo(family, architecture, model.num_parameters, model.config.vocab_size)


def _count_tokens(folder: Path, config: Any) -> int:
    tokenizer = TextTokenizer.load(folder)
    for token in NEEDED["encoder" if isinstance(config, EncoderConfig) else "encoder_decoder"]:
        tokenizer.id_of(token)
    if isinstance(config, EncoderConfig) and config.pad_id not in (None, tokenizer.pad_id):
        raise InputError(
            f"{folder / 'config.json'}: pad_token_id: {config.pad_id} is not the tokenizer's {tokenizer.pad_id}, by"
            " which positions are counted; give the tokenizer that the model was trained with"
        )
    return tokenizer.vocab_size


def import_model(
    folder: Path, found: ModelInfo, name: str, registry: Registry, paths: Paths | None = None
) -> ModelVersion:
    """Register a model folder that was looked at; where no gate governs the name, the version is its champion.

    It is left without tools whose code is not that of the project in `paths`; the tag `tools_left_out` names them.

    Raises: InputError when the disk is full.
    """
    tags = {"imported_from": str(folder.resolve()), "architecture": found.architecture, "family": found.family}
    with writing(registry.home):
        registry.home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=registry.home, prefix=".importing-") as scratch:
            clean = Path(scratch) / name
            copy_model(folder, clean)
            if left_out := adopt_tools(clean, folder, paths):
                tags["tools_left_out"] = ", ".join(left_out)
            metrics = {"parameters": float(found.parameters)}
            version = registry.register(clean, name, metrics, tags, None)
    if name not in GOVERNED:
        registry.promote(version)
    return registry.resolve(str(version))


def copy_model(folder: Path, place: Path) -> None:
    """Copy what a model folder consists of, and nothing else that lies there.

    Raises: InputError when the disk is full or the place cannot be written.
    """
    with writing(place):
        place.mkdir(parents=True)
        for name, file in _files(folder):
            (place / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, place / name)


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Each file, behind its place in the folder."""
    yield from ((file.name, file) for file in weight_files(folder))
    yield from ((name, folder / name) for name in (*KEPT, INDEX) if (folder / name).is_file())
    if (folder / MODULES).is_file() and isinstance(read_architecture(folder)[1], EncoderConfig):
        yield from pooling_files(folder).items()


def place_model(folder: Path, place: Path, origin: dict[str, str]) -> None:
    """Put a model folder, with `origin.json` beside it, into `place`, whose files that begin with a dot stay.

    What was there goes first and config.json comes last, so that a half-placed model is none.
    """
    clear(place)
    for left in place.parent.glob(f".{place.name}-*"):  # by a process that was killed meanwhile
        shutil.rmtree(left)
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}-") as scratch:
        copied = Path(scratch) / "model"
        copy_model(folder, copied)
        (copied / "origin.json").write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
        place.mkdir(parents=True, exist_ok=True)
        for file in sorted(copied.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, place / file.name)


def clear(place: Path) -> None:
    """Take an imported model away again, config.json first."""
    for file in sorted(place.glob("[!.]*"), key=lambda file: file.name != "config.json"):
        if file.is_dir():
            shutil.rmtree(file)
        else:
            file.unlink()
