"""Import of Hugging Face model folders into the registry: checked, then copied with tokenizer and chat template.

Nothing executable is copied: weights are safetensors; code and pickles, a model's tools among them, are left out.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from components.agent.saved_tools import adopt_tools, load_tools, read_agent
from components.config.model_settings import Family
from components.config.params import InputError
from components.config.paths import AGENT, CONFIG, ORIGIN, TEMPLATE, TOKENIZER, Paths, writing
from components.models.base_store import (
    BASE,
    Base,
    base_folder,
    is_adapter,
    read_base,
    store_base,
    stored_base,
)
from components.models.checkpoint import check_model, read_architecture
from components.models.decoder import Decoder
from components.models.encoder import Encoder, EncoderConfig
from components.models.encoder_decoder import EncoderDecoder
from components.models.gguf import open_gguf, unpack_gguf
from components.models.sentence_pooling import MODULES, pooling_files, read_pooling
from components.models.vision import VisionLanguageModel
from components.models.vision_formats import PREPROCESSOR, PROCESSOR, check_processor
from components.models.weight_files import ADAPTER_CONFIG, INDEX, weight_files, write_json
from components.runtime.files import scratch_folder
from components.runtime.model_tasks import TASKS
from components.tokenization.gguf_tokenizer import unpack_tokenizer
from components.tokenization.hf_tokenizer import load_chat_tokenizer
from components.tokenization.text_tokenizer import CLS, SEP, TextTokenizer
from components.tracking.registry import WEIGHTS_SHA256, ModelVersion, Registry, is_empty
from components.tracking.version_files import store_imported_card

GATED = tuple(TASKS)
"""Models whose champion the promotion gate chooses."""
FILES = (
    CONFIG,
    ADAPTER_CONFIG,
    BASE,
    "generation_config.json",
    PREPROCESSOR,
    PROCESSOR,
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    TEMPLATE,
    AGENT,
    "knowledge.sqlite",
)
"""Files of a model folder that are copied, beside its weights."""
REQUIRED_TOKENS = {"encoder": (CLS, SEP), "encoder_decoder": ("</s>",)}
"""Special tokens that a family needs, beside the padding token."""
FAMILIES: dict[type[Any], Family] = {Decoder: "decoder", Encoder: "encoder", EncoderDecoder: "encoder_decoder"}


@dataclass(frozen=True)
class ModelInfo:
    """Family, architecture and size of a model folder."""

    family: Family
    architecture: str
    parameters: int
    vocab_size: int


def inspect_model(folder: Path) -> ModelInfo:
    """Check that a folder holds a model that the platform can run and train, with its tokenizer.

    Raises: InputError naming what is missing, unknown, misshapen or not supported.
    """
    model: Any = check_model(folder)
    family = next(family for kind, family in FAMILIES.items() if isinstance(model, kind))
    if not (folder / TOKENIZER).is_file():
        raise InputError(f"{folder / TOKENIZER}: not found; save the model's fast tokenizer with it")
    if family == "decoder" and "source" not in read_agent(folder):
        load_tools(folder)  # the folder has their names alone
    if family == "encoder":
        read_pooling(folder)
    if isinstance(model, VisionLanguageModel):
        check_processor(folder)
    tokens = (
        load_chat_tokenizer(folder).vocab_size if family == "decoder" else _count_tokens(folder, family, model.config)
    )
    if tokens > model.config.vocab_size:
        raise InputError(
            f"{folder / TOKENIZER}: {tokens} tokens are more than the vocab_size {model.config.vocab_size} of"
            " config.json; give the tokenizer that the model was trained with"
        )
    architecture = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["architectures"][0]
    return ModelInfo(family, architecture, model.num_parameters, model.config.vocab_size)


def _count_tokens(folder: Path, family: Family, config: Any) -> int:
    tokenizer = TextTokenizer.load(folder)
    for token in REQUIRED_TOKENS[family]:
        try:
            tokenizer.id_of(token)
        except InputError as error:
            raise InputError(f"{folder}/{error}") from None
    if family == "encoder" and config.pad_id not in (None, tokenizer.pad_id):
        raise InputError(
            f"{folder / CONFIG}: pad_token_id: {config.pad_id} is not the tokenizer's {tokenizer.pad_id}, by"
            " which positions are counted; give the tokenizer that the model was trained with"
        )
    return tokenizer.vocab_size


@contextmanager
def unpacked(path: Path, home: Path, base: str = "") -> Iterator[Path]:
    """A model folder, or what a GGUF file or an adapter becomes in the state folder `home` while the block runs.

    `base`: of an adapter that does not name its base itself, NAME@ALIAS or NAME/VERSION.

    Raises: InputError when the file is damaged or not supported, the base is missing, or the disk is full.
    """
    if base and not is_adapter(path):
        raise InputError(f"--base: {base}: {path} is no adapter (no {ADAPTER_CONFIG} there); leave --base out")
    if path.suffix != ".gguf" and not is_adapter(path):
        yield path
        return
    if not path.exists():
        raise InputError(f"{path}: not found; give a GGUF file or a model folder")
    with writing(home), scratch_folder(home, "import") as scratch:
        if is_adapter(path):
            _complete_adapter(path, base, Registry(home), scratch)
        else:
            file = open_gguf(path)
            unpack_gguf(file, scratch)
            unpack_tokenizer(file.metadata, path, scratch)
        yield scratch


def _complete_adapter(path: Path, base: str, registry: Registry, folder: Path) -> None:
    """Write an adapter's own files, and those of its base that it lacks, except for the weights."""
    if base:
        version = registry.resolve(base)
        record, source = store_base(version.folder, registry.home, str(version)), version.folder
        if (path / BASE).is_file() and (own := read_base(path)).weights_sha256 != record.weights_sha256:
            raise InputError(f"{path}: is an adapter of {own.source}, whose weights are not those of --base {base}")
    else:
        record = _named_base(path, registry)
        registered = registry.with_weights(record.weights_sha256)
        source = registered.folder if registered else stored_base(record.weights_sha256, registry.home)
    if is_adapter(source):
        raise InputError(f"--base: {base}: is an adapter itself; name the model that this one was trained on")
    for part in (source, path):
        for name in FILES:
            if (part / name).is_file():
                shutil.copyfile(part / name, folder / name)
    for file in weight_files(path):
        shutil.copyfile(file, folder / file.name)
    write_json(folder / BASE, asdict(record))


def _named_base(path: Path, registry: Registry) -> Base:
    """The base that an adapter's folder names: by digest, or in PEFT's configuration as a folder or a version."""
    if (path / BASE).is_file():
        registry.fetch_base(read_base(path).weights_sha256)
        base_folder(path)
        return read_base(path)
    try:
        name = str(json.loads((path / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path / ADAPTER_CONFIG}: not a readable adapter configuration: {error!r}") from None
    if (Path(name) / CONFIG).is_file():
        return store_base(Path(name), registry.home, name)
    version = None if is_empty(registry.home) or name.count("/") > 1 else registry.find(name)
    if version is None:
        raise InputError(
            f"{path / ADAPTER_CONFIG}: base_model_name_or_path: {name!r}: no folder here and no registered model;"
            " import the base first and give it with --base NAME@ALIAS"
        )
    return store_base(version.folder, registry.home, str(version))


def import_model(
    folder: Path,
    info: ModelInfo,
    name: str,
    registry: Registry,
    paths: Paths | None = None,
    source: Path | None = None,
) -> ModelVersion:
    """Register an inspected model folder; a model without a promotion gate becomes champion.

    `source` is the file that the folder was unpacked from.

    Tools whose source is not that of the project in `paths` are left out; the tag `tools_left_out` names them.

    Raises: InputError when the disk is full.
    """
    tags = {
        "imported_from": str((source or folder).resolve()),
        "architecture": info.architecture,
        "family": info.family,
    }
    with writing(registry.home), scratch_folder(registry.home, "import") as scratch:
        clean = scratch / name
        copy_model(folder, clean)
        if left_out := adopt_tools(clean, folder, paths):
            tags["tools_left_out"] = ", ".join(left_out)
        metrics = {"parameters": float(info.parameters)}
        version = registry.register(clean, name, metrics, tags, None)
    store_imported_card(version, folder)
    if digest := version.tags.get(WEIGHTS_SHA256):
        with writing(registry.home):  # for adapters of it
            store_base(version.folder, registry.home, str(version), digest)
    if name not in GATED:
        registry.promote(version, detail="imported")
    return registry.resolve(str(version))


def copy_model(folder: Path, place: Path) -> None:
    """Copy the files of a model, and no others of its folder.

    Raises: InputError when the disk is full or the place cannot be written.
    """
    with writing(place):
        place.mkdir(parents=True)
        for name, file in _files(folder):
            (place / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, place / name)


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Each file with its path in the folder."""
    yield from ((file.name, file) for file in weight_files(folder))
    yield from ((name, folder / name) for name in (*FILES, INDEX) if (folder / name).is_file())
    if (folder / MODULES).is_file() and isinstance(read_architecture(folder)[1], EncoderConfig):
        yield from pooling_files(folder).items()


def place_model(folder: Path, place: Path, origin: dict[str, str], template: str | None = None) -> None:
    """Copy a model, with `origin.json`, into the folder `place`, whose hidden files stay.

    `template` replaces its chat template.

    Older files are removed first and config.json is written last: without it an interrupted copy is no model.
    """
    clear(place)
    for left in place.parent.glob(f".{place.name}-*"):  # by a process that was killed
        shutil.rmtree(left)
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}-") as scratch:
        copied = Path(scratch) / "model"
        copy_model(folder, copied)
        if template is not None:
            (copied / TEMPLATE).write_text(template, encoding="utf-8")
        (copied / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
        place.mkdir(parents=True, exist_ok=True)
        for file in sorted(copied.iterdir(), key=lambda file: file.name == CONFIG):
            os.replace(file, place / file.name)


def clear(place: Path) -> None:
    """Remove an imported model, config.json first."""
    for file in sorted(place.glob("[!.]*"), key=lambda file: file.name != CONFIG):
        if file.is_dir():
            shutil.rmtree(file)
        else:
            file.unlink()
