"""Packed token rows as batches: memory-mapped rows, and a sampler without stored order.

The rows of step s are a pure function of (seed, s), so the state of the sampler is the step number.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from components.config.params import InputError
from components.media.pictures import Pixels
from components.token_rows.picture_rows import ImageTokens, PictureReader

IGNORED = -100
"""Label of a position without a target."""
PIXELS = "pixel_values"
"""In a batch: the pictures of its rows, in order; no entry for each row."""
IMAGE_FIELDS = tuple(field.name for field in fields(ImageTokens))
Batch = dict[str, Tensor]
Indices = npt.NDArray[np.int64]


class Rows(Protocol):
    """The rows of a training set."""

    folder: Path
    seq_len: int
    vocab_size: int

    def __len__(self) -> int: ...

    def lengths(self, indices: Indices) -> Indices:
        """Tokens of each of these rows: micro-batches hold rows of similar length."""

    def batch(self, indices: Indices, step: int = 0) -> Batch:
        """The rows of a step, by index: random corruption of a row is a function of seed, step and row."""


def count_tokens(batch: Batch) -> int:
    """Tokens of a batch without padding."""
    masks = ("segment_ids", "attention_mask", "decoder_attention_mask")  # not zero where a token is no padding
    return sum(int((batch[name] != 0).sum()) for name in masks if name in batch)


def read_rows_file(folder: Path) -> dict[str, Any]:
    """`rows.json` of a folder of token rows.

    Raises: InputError when there is none.
    """
    try:
        info: dict[str, Any] = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f'{folder}: no token rows; run "loopwright run --until prepare"') from None
    return info


class TokenRows:
    """Packed rows of one split of a folder that `prepare` wrote, memory-mapped."""

    def __init__(self, folder: Path, split: str) -> None:
        info = read_rows_file(folder)
        self.folder, self.split = folder, split
        self.seq_len, self.vocab_size = int(info["seq_len"]), int(info["vocab_size"])
        self.count = int(info["rows"].get(split, 0))
        self._ids = self._map("ids", np.dtype(info["dtype"]).newbyteorder("<"))
        self._segments = self._map("segments", np.dtype("<u2"))
        self._mask = self._map("mask", np.dtype("u1"))
        self.images = ImageTokens(**{name: int(info[name]) for name in IMAGE_FIELDS}) if "image_id" in info else None
        """How pictures stand in these rows; None of rows of text alone."""
        if self.images is not None:
            self.pictures = self._map("pictures", np.dtype("<i4"))
            self._reader = PictureReader(folder)

    def _map(self, name: str, dtype: np.dtype[np.generic]) -> npt.NDArray[np.generic]:
        path = self.folder / f"{self.split}.{name}.bin"
        shape = (self.count, self.seq_len)
        if not self.count:
            return np.zeros(shape, dtype)
        size = path.stat().st_size if path.is_file() else 0
        if size != self.count * self.seq_len * dtype.itemsize:
            expected = self.count * self.seq_len * dtype.itemsize
            raise InputError(f'{path}: {size} bytes, expected {expected}; run "loopwright run --until prepare"')
        return np.memmap(path, dtype=dtype, mode="r", shape=shape)

    def __len__(self) -> int:
        return self.count

    def lengths(self, indices: Indices) -> Indices:
        """All the same."""
        return np.full(len(indices), self.seq_len)

    def batch(self, indices: Indices, step: int = 0) -> Batch:
        """input_ids, labels, segment_ids and position_ids, each (B, T) int64.

        labels[t] is the token after t where both are of one document and the mask has that token, else IGNORED.
        Where there are pictures, pixel_values (P, H, W, 3) uint8 has those of all rows, in order.
        """
        order = np.asarray(indices)
        ids = self._ids[order].astype(np.int64)
        segments = self._segments[order].astype(np.int64)
        masked = self._mask[order] != 0
        labels = np.full_like(ids, IGNORED)
        targets = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0) & masked[:, 1:]
        labels[:, :-1][targets] = ids[:, 1:][targets]
        arrays = {"input_ids": ids, "labels": labels, "segment_ids": segments, "position_ids": _positions(segments)}
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if self.images is not None and len(numbers := self.pictures_of(order)):
            batch[PIXELS] = torch.from_numpy(np.stack([self.pixels(number) for number in numbers]))
        return batch

    def pictures_of(self, indices: Indices) -> Indices:
        """The numbers of the pictures in these rows, in order."""
        assert self.images is not None
        numbers = self.pictures[np.asarray(indices)].astype(np.int64).ravel()
        return numbers[numbers > 0][:: self.images.image_tokens] - 1

    def pixels(self, number: int) -> Pixels:
        """A picture (H, W, 3)."""
        return self._reader.pixels(number)

    def segments_in(self, row: int) -> int:
        """Documents of a row; they are numbered from 1."""
        return int(self._segments[row].max())

    def segment(self, row: int, number: int) -> tuple[Indices, Indices]:
        """Ids of a document of a row, and the pictures of its image tokens, counted from 1; 0 elsewhere."""
        chosen = self._segments[row] == number
        return self._ids[row][chosen].astype(np.int64), self.pictures[row][chosen].astype(np.int64)

    def masked_tokens(self) -> tuple[int, int]:
        """The numbers of tokens in the mask, and of all tokens without padding."""
        masked = tokens = 0
        for start in range(0, self.count, 4096):
            real = self._segments[start : start + 4096] != 0
            tokens += int(real.sum())
            masked += int(((self._mask[start : start + 4096] != 0) & real).sum())
        return masked, tokens


def _positions(segments: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Positions from the start of each document of a row."""
    index = np.broadcast_to(np.arange(segments.shape[1], dtype=np.int64), segments.shape)
    starts = np.zeros_like(segments)
    starts[:, 1:] = np.where(segments[:, 1:] != segments[:, :-1], index[:, 1:], 0)
    return index - np.maximum.accumulate(starts, axis=1)


class Sampler:
    """Every row once per epoch, in a new pseudo-random order each epoch.

    The order is a Feistel permutation with cycle walking: row i of an epoch is computed, not stored.
    """

    ROUNDS = 6

    def __init__(self, rows: int, seed: int) -> None:
        if rows < 1:
            raise InputError("Sampler: 0 rows; there is nothing to learn from")
        self.rows, self.seed = rows, seed
        self._half_bits = max(1, ((rows - 1).bit_length() + 1) // 2)

    def step(self, step: int, batch_size: int) -> Indices:
        """Row numbers of one step's batch; batches run on over the ends of epochs."""
        drawn = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
        epochs, indices = drawn // self.rows, drawn % self.rows
        chosen = np.empty_like(drawn)
        for epoch in np.unique(epochs):
            in_epoch = epochs == epoch
            chosen[in_epoch] = self._permute(indices[in_epoch], int(epoch))
        return chosen

    def _permute(self, indices: Indices, epoch: int) -> Indices:
        keys = np.random.default_rng([self.seed, epoch]).integers(0, 2**63, size=self.ROUNDS, dtype=np.uint64)
        values = self._feistel(indices.astype(np.uint64), keys)
        while (outside := values >= self.rows).any():  # the cipher's range is up to four times the rows
            values[outside] = self._feistel(values[outside], keys)
        return values.astype(np.int64)

    def _feistel(self, values: npt.NDArray[np.uint64], keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        bits, mask = np.uint64(self._half_bits), np.uint64(2**self._half_bits - 1)
        left, right = values >> bits, values & mask
        for key in keys:
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        return (left << bits) | right
