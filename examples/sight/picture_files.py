"""The pictures inside installed packages: easy-VQA, silhouettes of animals, and scikit-learn's digits.

Of easy-vqa and animal-shape-mnist only the files are read; their code is not run.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import json
import pickle
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from components.config.errors import InputError
from components.datasets.formats import in_test_split

ANIMALS = ("bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra")
"""Names of the classes of animal-shape-mnist, in the order of its labels."""
Grey = npt.NDArray[np.uint8]
"""(height, width), 0 is the ground and 255 the object."""


@dataclass(frozen=True)
class VqaPicture:
    """A picture of easy-VQA with its questions."""

    name: str
    content: bytes
    """A PNG file."""
    questions: tuple[tuple[str, str], ...]
    """Pairs of question and answer."""


@dataclass(frozen=True)
class Stamps:
    """Small pictures of objects, to be drawn into larger ones, by the object's name."""

    train: dict[str, list[Grey]]
    test: dict[str, list[Grey]]
    source: dict[str, str]
    """Name and SHA-256 of what they were read from."""


@cache
def easy_vqa(split: str) -> tuple[VqaPicture, ...]:
    """The pictures of easy-VQA's official split `train` or `test`.

    Raises: InputError when the package is not installed.
    """
    folder = _package("easy_vqa", "easy-vqa") / "data" / split
    questions: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for question, answer, number in json.loads((folder / "questions.json").read_text(encoding="utf-8")):
        questions[number].append((question, answer))
    return tuple(
        VqaPicture(f"{split}/{number}", (folder / "images" / f"{number}.png").read_bytes(), tuple(questions[number]))
        for number in sorted(questions)
    )


def easy_vqa_source() -> dict[str, str]:
    """Name and SHA-256 of all pictures and questions of easy-VQA."""
    digest = hashlib.sha256()
    for split in ("train", "test"):
        for picture in easy_vqa(split):
            digest.update(picture.content)
            digest.update(json.dumps(picture.questions).encode())
    return {"name": "easy-vqa", "sha256": digest.hexdigest()}


@cache
def silhouettes(share: float, seed: int) -> Stamps:
    """The silhouettes of animal-shape-mnist, 28 x 28, of which `share` is held out; equal pictures are on one side.

    Raises: InputError when the package is not installed.
    """
    folder = _package("animal_shape_mnist", "animal-shape-mnist") / "data" / "Animal Shape"
    contents = [(folder / f"animal_{part}_version_3.gz").read_bytes() for part in ("data", "label")]
    pictures, labels = (_unpickled_array(gzip.decompress(content)) for content in contents)
    source = {"name": "animal-shape-mnist", "sha256": hashlib.sha256(b"".join(contents)).hexdigest()}
    names = [ANIMALS[label] for label in labels]
    return _split(list(pictures), names, share, f"silhouettes:{seed}", source)


@cache
def digits(share: float, seed: int) -> Stamps:
    """scikit-learn's 1,797 handwritten digits, 8 x 8, of which `share` is held out; equal pictures are on one side."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    pictures = np.round(loaded.images * (255 / 16)).astype(np.uint8)
    source = {"name": "scikit-learn digits", "sha256": hashlib.sha256(pictures.tobytes()).hexdigest()}
    return _split(list(pictures), [str(label) for label in loaded.target], share, f"digits:{seed}", source)


def _split(pictures: list[Grey], names: list[str], share: float, key: str, source: dict[str, str]) -> Stamps:
    stamps = Stamps(defaultdict(list), defaultdict(list), source)
    for picture, name in zip(pictures, names, strict=True):
        digest = hashlib.sha256(picture.tobytes()).hexdigest()
        side = stamps.test if in_test_split(f"{key}:{digest}", share) else stamps.train
        side[name].append(picture)
    return stamps


def _package(module: str, distribution: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f'{distribution}: is not installed; run pip install "loopwright[sight]"')
    return Path(next(iter(spec.submodule_search_locations)))


class _ArrayUnpickler(pickle.Unpickler):
    """Reads a pickled NumPy array, and runs nothing else that a pickle can name."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return lambda kind, shape, code: kind.__new__(kind, shape, code)
        raise InputError(f"animal-shape-mnist: its pickle names {module}.{name}; install the locked version")


def _unpickled_array(content: bytes) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = _ArrayUnpickler(io.BytesIO(content)).load()
    return array
