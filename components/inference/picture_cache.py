"""Pictures in continuous batching: each is encoded once, and its embeddings are remembered by its digest."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from components.config.errors import InputError
from components.media.pictures import Picture, resized
from components.models.vision import VisionLanguageModel, normalized

MAX_BYTES = 256 << 20
"""Of the embeddings that are remembered."""


class Prompted(Protocol):
    """A row whose prompt is read."""

    ids: list[int]
    pictures: Sequence[Picture]
    cached: int


class PictureCache:
    """The embeddings of a model's pictures; the least recently used go first."""

    def __init__(self, model: VisionLanguageModel) -> None:
        self._model = model
        self._embeddings: OrderedDict[str, Tensor] = OrderedDict()
        self.encoded = 0
        """Pictures that the tower has read."""

    def key(self, prompt: Sequence[int], pictures: Sequence[Picture]) -> list[int]:
        """A prompt with a picture's digest in place of its image tokens: equal where keys and values are.

        Raises: InputError when the image tokens are not those of these pictures.
        """
        config = self._model.config
        places = [position for position, number in enumerate(prompt) if number == config.image_token_id]
        if len(places) != len(pictures) * config.vision.num_patches:
            raise InputError(f"prompt: {len(places)} image tokens are not those of {len(pictures)} pictures")
        key = list(prompt)
        for count, position in enumerate(places):
            key[position] = -1 - int(pictures[count // config.vision.num_patches].digest[:15], 16)
        return key

    @torch.inference_mode()
    def inputs(self, tokens: npt.NDArray[np.int64], rows: Sequence[Prompted]) -> Tensor | None:
        """Embeddings (B, T, D) of the tokens (B, T) that rows read next; None where no picture is among them."""
        image_id, device = self._model.config.image_token_id, self._model.embed.weight.device
        if not (tokens == image_id).any():
            return None
        parts = []
        for row, part in zip(rows, tokens, strict=True):
            if count := int((part == image_id).sum()):
                first = row.ids[: row.cached].count(image_id)
                patches = self._model.config.vision.num_patches
                shown = row.pictures[first // patches : -(-(first + count) // patches)]
                start = first % patches
                parts.append(torch.cat([self._embedding(picture) for picture in shown])[start : start + count])
        return self._model.embedded(torch.from_numpy(tokens).to(device), torch.cat(parts))

    def _embedding(self, picture: Picture) -> Tensor:
        """(N, D); pictures are encoded each for itself, so that none depends on others."""
        if picture.digest not in self._embeddings:
            weight = self._model.embed.weight
            pixels = torch.from_numpy(resized(picture, self._model.config.vision.image_size).copy()).unsqueeze(0)
            values = normalized(pixels).to(device=weight.device, dtype=weight.dtype)
            self._embeddings[picture.digest] = self._model.encode_pictures(values)[0]
            self.encoded += 1
            while len(self._embeddings) > 1 and sum(each.nbytes for each in self._embeddings.values()) > MAX_BYTES:
                self._embeddings.popitem(last=False)
        self._embeddings.move_to_end(picture.digest)
        return self._embeddings[picture.digest]
