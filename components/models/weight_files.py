"""The safetensors files of a Hugging Face model folder: one file, or shards with an index.

Pickles are refused, for reading one executes code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from components.config.params import InputError

if TYPE_CHECKING:
    from torch import Tensor

SHARD_BYTES = 5 * 10**9
"""Weights above this are written as several files."""
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""PEFT's configuration and weights of an adapter."""


def write_weights(tensors: Iterable[tuple[str, Tensor]], folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors under their Hugging Face names, one file's worth in memory at a time.

    Raises: OSError when the disk refuses.
    """
    from safetensors.torch import save as safetensors_bytes  # imports torch, which readers of names need not

    shards: list[list[str]] = []
    part: dict[str, Tensor] = {}
    size = total = 0

    def write() -> None:
        nonlocal size
        (folder / f"shard-{len(shards)}").write_bytes(safetensors_bytes(part, {"format": "pt"}))
        shards.append(list(part))
        part.clear()
        size = 0

    for name, tensor in tensors:
        if part and size + tensor.nbytes > shard_bytes:
            write()
        part[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    write()
    count = len(shards)
    files = [WEIGHTS] if count == 1 else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    for number, file in enumerate(files):
        (folder / f"shard-{number}").rename(folder / file)
    if count > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model folder's own weights, in order of name; of an adapter, its pairs.

    Raises: InputError when one is missing, or weights are pickles.
    """
    index = folder / INDEX
    files = [folder / (ADAPTER_WEIGHTS if (folder / ADAPTER_CONFIG).is_file() else WEIGHTS)]
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            files = sorted(folder / Path(name).name for name in names)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"{index}: not a readable shard index: {error}") from None
    for file in files:
        if not file.is_file():
            pickled = any(folder.glob("pytorch_model*.bin"))
            hint = "pickled weights are refused; convert them to safetensors" if pickled else "the folder is incomplete"
            raise InputError(f"{file}: not found; {hint}")
    return files


def weights_digest(folder: Path) -> str:
    """SHA-256 of a model folder's weights: of the one file, or of the shards' digests one after another."""
    digests = []
    for path in weight_files(folder):
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def cached_digest(folder: Path) -> str:
    """`weights_digest`, computed again when a file has changed."""
    states = [file.stat() for file in weight_files(folder)]
    return _digest_of_state(folder, tuple((state.st_size, state.st_mtime_ns) for state in states))


@lru_cache(maxsize=64)
def _digest_of_state(folder: Path, _state: tuple[tuple[int, int], ...]) -> str:
    return weights_digest(folder)


def check_digest(folder: Path, sha256: str, name: str) -> None:
    """Raises: InputError when a model's weights are not those with which it was registered."""
    if (actual := cached_digest(folder)) != sha256:
        raise InputError(
            f"{name}: {folder}: its weights have the SHA-256 {actual[:12]}…, and were registered with {sha256[:12]}…;"
            " restore them from a backup"
        )


def names_in(file: Path) -> list[str]:
    try:
        with safe_open(str(file), framework="pt") as tensors:
            return list(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: corrupt: {error}; fetch or train it again") from None


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
