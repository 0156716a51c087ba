"""Hugging Face model folders of every family, read and written with the names of `formats.py`.

Weights are safetensors, one file or shards with an index; pickles are refused, for reading one executes code.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from weakref import WeakValueDictionary

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from components.config.params import InputError
from components.models.adapters import attach_adapter, write_adapter
from components.models.base_store import BASE, BUNDLED, base_folder, is_adapter, read_base
from components.models.config_fields import Fields
from components.models.decoder import Decoder, DecoderConfig
from components.models.encoder import Encoder, classifier_from
from components.models.formats import FORMATS, architecture_of, hub_tensors, tied_names
from components.models.lora import lora_of, merge_lora
from components.models.vision import VisionLanguageModel, VisionTower
from components.models.vision_formats import current_name, processor_files
from components.models.weight_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    SHARD_BYTES,
    WEIGHTS,
    names_in,
    weight_files,
    write_json,
    write_weights,
)
from components.runtime.files import sync

TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
"""Files that a folder may have beside its tokenizer.json."""
M = TypeVar("M", bound=nn.Module)
_BASES: WeakValueDictionary[tuple[str, torch.dtype, str], nn.Module] = WeakValueDictionary()
"""Bases of the adapters that are loaded, by digest, dtype and device."""

DECODER_MODELS = (Decoder, VisionLanguageModel)
DTYPES = ("F32", "F16", "BF16", "F64")
"""Types of weights, as safetensors names them."""


class TensorLocation(NamedTuple):
    """The file of a tensor, and its name there."""

    file: Path
    name: str


def save_model(
    model: nn.Module,
    folder: Path,
    tokenizer_folder: Path | None = None,
    files: Mapping[str, Path | str] | None = None,
    shard_bytes: int = SHARD_BYTES,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write a model folder that `transformers` loads, all of it or nothing; of a model with LoRA its adapter (PEFT).

    Weights are in the dtype of the folder that the model was read from, fp32 where it was none.

    `files` are added, by their path in the folder: paths are copied, texts are written. `generation` goes into
    generation_config.json.

    Raises: InputError when the disk is full or the folder cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.glob(f".{folder.name}-*"):  # by a process that was killed while it saved
            shutil.rmtree(left)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as name:
            temporary = Path(name) / folder.name
            temporary.mkdir()
            dtype = _stored_dtype(model)
            if lora_of(model) is not None:
                write_adapter(model, temporary)
            else:
                tensors = hub_tensors(model)
                weights = ((name, weight.detach().to(dtype).contiguous().cpu()) for name, weight in tensors)
                write_weights(weights, temporary, shard_bytes)
            if tokenizer_folder is not None:
                shutil.copyfile(tokenizer_folder / "tokenizer.json", temporary / "tokenizer.json")
                for filename in TOKENIZER_FILES:
                    if (tokenizer_folder / filename).is_file():
                        shutil.copyfile(tokenizer_folder / filename, temporary / filename)
            _write_configs(model, temporary, generation or {})
            for filename, source in (files or {}).items():
                (temporary / filename).parent.mkdir(exist_ok=True)
                if isinstance(source, Path) and source.is_dir():
                    shutil.copytree(source, temporary / filename)
                elif isinstance(source, Path):
                    shutil.copyfile(source, temporary / filename)
                else:
                    (temporary / filename).write_text(source, encoding="utf-8")
            sync(*temporary.iterdir(), temporary)
            _swap(temporary, folder, Path(name) / "old")
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be written: {error.strerror or error}; free space or choose another place"
        ) from error


def load_model(folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> nn.Module:
    """Read a folder of any architecture in `FORMATS`, sharded or not, or an adapter's folder.

    Models with adapters of one base share its weights, which are read once for all that are loaded at the same time.

    Raises: InputError when the folder is not such a model, or tensors are missing, unknown, misshapen or corrupt.
    """
    if is_adapter(folder):
        model = _with_shared_base(folder, dtype, device)
        attach_adapter(model, folder)
        return model
    model, pairs, absent = _opened(folder, dtype, device)
    for file, targets in pairs.items():
        with safe_open(str(file), framework="pt") as tensors:
            for name, target in targets.items():
                target.copy_(tensors.get_tensor(name))
    _initialize([absent[name] for name in sorted(absent)])
    return model


def check_model(folder: Path) -> nn.Module:
    """The model of a folder without its weights, after a check of the name and shape of each.

    Its memory is allocated and never touched, so that a model larger than the machine's can be inspected.

    Raises: InputError as `load_model`.
    """
    if is_adapter(folder):
        model = check_model(base_folder(folder))
        attach_adapter(model, folder)
        return model
    return _opened(folder, torch.float32, None)[0]


def _with_shared_base(folder: Path, dtype: torch.dtype, device: torch.device | str | None) -> nn.Module:
    """A model with the weights of an adapter's base: the same tensors as in others of that base."""
    key = (read_base(folder).weights_sha256, dtype, str(device or "cpu"))
    base = _BASES.get(key)
    if base is None:
        base = load_model(base_folder(folder), dtype, device)
        base.requires_grad_(False)
        _BASES[key] = base
    if isinstance(base, Encoder) and (labels := read_architecture(folder)[1].labels):
        return classifier_from(base, labels)
    model = sharing(base)
    model.__dict__["base"] = base  # alive for as long as one of its models is
    return model


def sharing(model: M) -> M:
    """Another model with the same tensors."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})


def _opened(
    folder: Path, dtype: torch.dtype, device: torch.device | str | None
) -> tuple[nn.Module, dict[Path, dict[str, Tensor]], dict[str, Tensor]]:
    """A model without weights; the target of each tensor of each file; and optional weights that the folder lacks."""
    architecture, fields = _read_fields(folder)
    form = FORMATS[architecture]
    config = form.read(fields)
    files = weight_files(folder)
    locations = {_current_name(name): TensorLocation(file, name) for file in files for name in names_in(file)}
    if form.base and not any(name.startswith(form.prefix) for name in locations):
        form = FORMATS[form.base]
        config = form.read(fields)
    config = form.settle(config, locations)
    layers = max(getattr(config, name, 0) for name in ("num_layers", "num_decoder_layers"))
    if layers > len(locations):
        raise InputError(f"{fields.path}: {layers:,} layers: the weights have {len(locations)} tensors")
    try:
        with torch.device(device or "cpu"), _SkipInitialization():
            model = form.model(config).to(dtype)
    except (ArithmeticError, RuntimeError, ValueError, TypeError, AssertionError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"{fields.path}: a model of this shape cannot be made: {reason}") from None
    targets = dict(hub_tensors(model, form))
    absent = {name: targets[name] for name in targets.keys() - locations.keys() if name.startswith(form.optional)}
    extra = {name for name in locations.keys() - targets.keys() if name.endswith((*form.ignored, *tied_names(model)))}
    _compare(folder, targets.keys() - absent.keys(), locations.keys() - extra)
    pairs: dict[Path, dict[str, Tensor]] = {file: {} for file in files}
    for name, target in targets.items():
        if name not in absent:
            pairs[locations[name].file][locations[name].name] = target
    for file, file_targets in pairs.items():
        _compare_shapes(file, file_targets)
    _check_tied(fields.path, model, targets, locations)
    return model, pairs, absent


def _check_tied(
    path: Path, model: nn.Module, targets: Mapping[str, Tensor], locations: Mapping[str, TensorLocation]
) -> None:
    """Raises: InputError when a head that config.json ties to the embedding has weights of its own."""
    for head in locations.keys() & set(tied_names(model)):
        embedding = model.get_parameter("embed.weight").data_ptr()
        name = next(name for name, target in targets.items() if target.data_ptr() == embedding)
        if not torch.equal(*(_tensor(locations[each]) for each in (head, name))):
            raise InputError(f"{path}: tie_word_embeddings is true, but {head} is not {name}; set it to false")


def _tensor(location: TensorLocation) -> Tensor:
    with safe_open(str(location.file), framework="pt") as tensors:
        tensor: Tensor = tensors.get_tensor(location.name)
        return tensor


def merge_folder(folder: Path, scratch: Path) -> Path:
    """An adapter's folder as a plain model folder within `scratch`: merged, in the base's dtype, other files copied.

    Raises: InputError as `load_model` and `save_model`.
    """
    model = load_model(folder)
    merge_lora(model)
    target, own = scratch / "merged", {ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE, BUNDLED, "config.json"}
    files: dict[str, Path | str] = {file.name: file for file in folder.iterdir() if file.name not in own}
    save_model(model, target, folder, files)
    return target


def save_decoder(
    model: Decoder, folder: Path, tokenizer_folder: Path | None = None, files: Mapping[str, Path | str] | None = None
) -> None:
    """`save_model` of a decoder."""
    save_model(model, folder, tokenizer_folder, files)


def load_decoder(folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Decoder:
    """`load_model` of a folder that must hold a decoder."""
    read_config(folder)
    model = load_model(folder, dtype, device)
    assert isinstance(model, Decoder)
    return model


def read_config(folder: Path) -> DecoderConfig:
    """Shape of the decoder in a folder.

    Raises: InputError when its config.json is missing, broken or asks for what our decoder does not support.
    """
    architecture, fields = _read_fields(folder)
    form = FORMATS[architecture]
    if form.model not in DECODER_MODELS:
        decoders = [name for name, each in FORMATS.items() if each.model in DECODER_MODELS]
        raise InputError(f"{fields.path}: architecture {architecture} is no decoder; one of {', '.join(decoders)}")
    config = form.read(fields)
    assert isinstance(config, DecoderConfig)
    return config


def read_architecture(folder: Path) -> tuple[str, Any]:
    """The architecture of a model folder and our configuration of it, without its weights.

    Raises: InputError as `load_model` does for config.json.
    """
    architecture, fields = _read_fields(folder)
    return architecture, FORMATS[architecture].read(fields)


def _initialize(weights: Sequence[Tensor]) -> None:
    """Initialize weights that a folder lacks, with a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    for weight in weights:
        std = 0.0 if weight.dim() == 1 else 0.02
        weight.copy_(torch.empty(weight.shape).normal_(generator=generator) * std)


class _SkipInitialization(TorchFunctionMode):
    """Skips initialization of weights, which are read right after (torch's meta device costs seconds of imports)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return (kwargs or {}).get("tensor", args[0] if args else None)
        return func(*args, **(kwargs or {}))


def _read_fields(folder: Path) -> tuple[str, Fields]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        architecture = (config.get("architectures") or ["none"])[0]
    except FileNotFoundError:
        raise InputError(f"{path}: not found; a model folder has config.json and {WEIGHTS}") from None
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise InputError(f"{path}: not a readable model configuration: {error}") from None
    if architecture not in FORMATS:
        raise InputError(f"{path}: architectures: {architecture} is not supported; one of {', '.join(FORMATS)}")
    fields = Fields(path, config)
    if config.get("quantization_config"):
        raise InputError(f"{path}: quantization_config: quantized weights are not supported; use the unquantized model")
    return architecture, fields


def _write_configs(model: nn.Module, folder: Path, generation: Mapping[str, Any]) -> None:
    architecture = architecture_of(model)
    special = _special_ids(folder)
    written = FORMATS[architecture].write(model.config)
    written.pop("dtype", None)  # newer writers' word for torch_dtype
    dtype = str(_stored_dtype(model)).removeprefix("torch.")
    config = written | {"architectures": [architecture], "torch_dtype": dtype}
    write_json(folder / "config.json", config | special)
    if isinstance(model, VisionLanguageModel):
        for name, content in processor_files(model.config).items():
            write_json(folder / name, content)
    if not isinstance(model, Encoder | VisionTower):
        start = {"decoder_start_token_id": config["decoder_start_token_id"]} if "d_model" in config else {}
        write_json(folder / "generation_config.json", special | start | {"do_sample": False, **generation})


def _stored_dtype(model: nn.Module) -> torch.dtype:
    """That of the folder a model was read from; fp32 for one of our own."""
    source: Mapping[str, Any] = getattr(model.config, "source", None) or {}
    name = source.get("dtype") or source.get("torch_dtype")
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(str(name), torch.float32)


def _special_ids(folder: Path) -> dict[str, int]:
    """`eos_token_id` and `pad_token_id` as the tokenizer files of this folder have them."""
    if not (folder / "tokenizer.json").is_file():
        return {}
    files = [folder / name for name in ("tokenizer_config.json", "special_tokens_map.json")]
    named = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")).get("added_tokens", [])
    ids = {token["content"]: int(token["id"]) for token in added}
    special = {}
    for name, usual in (("eos_token", ("</s>",)), ("pad_token", ("[PAD]", "<pad>"))):
        tokens = [token for config in named if (token := config.get(name))] or usual
        texts = (token["content"] if isinstance(token, dict) else token for token in tokens)
        if (text := next((text for text in texts if text in ids), None)) is not None:
            special[f"{name}_id"] = ids[text]
    return special


def _current_name(name: str) -> str:
    """The present name of a tensor: the first BERTs have TensorFlow's names of a norm's two vectors."""
    name = current_name(name)
    return re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))


def _compare_shapes(file: Path, targets: Mapping[str, Tensor]) -> None:
    with safe_open(str(file), framework="pt") as tensors:
        for name, target in targets.items():
            stored = tensors.get_slice(name)
            if (dtype := stored.get_dtype()) not in DTYPES:
                raise InputError(f"{file}: {name}: type {dtype} is not supported; one of {', '.join(DTYPES)}")
            shape = tuple(stored.get_shape())
            if shape != tuple(target.shape):
                raise InputError(
                    f"{file}: {name}: shape {shape} does not fit config.json, which asks for {tuple(target.shape)}"
                )


def _compare(folder: Path, expected: Any, actual: Any) -> None:
    for problem, names in (("missing", expected - actual), ("unknown", actual - expected)):
        if names:
            some = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            raise InputError(f"{folder}: {len(names)} tensors {problem}: {some}; the weights do not fit config.json")


def _swap(new: Path, target: Path, old: Path) -> None:
    """Rename `new` to `target`; what was there moves to `old`."""
    if target.exists():
        target.rename(old)
    new.rename(target)
    sync(target.parent)
