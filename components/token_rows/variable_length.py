"""Token rows of variable length, as variable_length_writer.py lays them out, as batches padded to the longest row.

B rows, S and T the longest source and target of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from components.config.params import InputError
from components.token_rows.batches import IGNORED, Batch, Indices, read_rows_file
from components.token_rows.variable_length_writer import ENDS, NO_PAIR, SPECIAL

Numbers = npt.NDArray[np.int64]


class VariableLengthRows:
    """One split of a folder that `VariableLengthWriter` wrote, memory-mapped."""

    measured = "ids"
    """The field whose length is that of a row."""

    def __init__(self, folder: Path, split: str) -> None:
        self.info = read_rows_file(folder)
        self.folder, self.split = folder, split
        self.seq_len, self.vocab_size = int(self.info["seq_len"]), int(self.info["vocab_size"])
        self.pad_id = int(self.info["special"]["pad"])
        self.count = int(self.info["rows"].get(split, 0))
        self._ends: dict[str, Numbers] = {}
        self._arrays: dict[str, npt.NDArray[Any]] = {}
        for name, kind in self.info["fields"].items() if self.count else ():
            self._arrays[name] = self._map(name, np.dtype(kind).newbyteorder("<"))
        for name in self.info["ragged"] if self.count else ():
            ends = self._ends[name] = self._map(f"{name}.ends", ENDS)
            if len(ends) != self.count or ends[-1] != len(self._arrays[name]):
                raise InputError(f'{folder}: rows of {split} are incomplete; run "loopwright run --until prepare"')

    def __len__(self) -> int:
        return self.count

    def field(self, name: str, index: int) -> Numbers:
        """The numbers of one row."""
        ends = self._ends[name.partition(".")[0]]
        start = ends[index - 1] if index else 0
        numbers: Numbers = np.asarray(self._arrays[name][start : ends[index]]).astype(np.int64)
        return numbers

    def ids(self, index: int) -> Numbers:
        """Token ids of one row."""
        return self.field("ids", index)

    def numbers(self, name: str, indices: Sequence[int] | Indices | None = None) -> Numbers:
        """A per-row field of all rows, or of these (N,); other rows are not read."""
        if not self.count:
            return np.zeros(0, np.int64)
        column = self._arrays[name]
        return np.asarray(column if indices is None else column[np.asarray(indices)]).astype(np.int64)

    def lengths(self, indices: Indices | None = None) -> Numbers:
        """Tokens of each row, or of each of these."""
        if not self.count:
            return np.zeros(0, np.int64)
        ends = self._ends[self.measured]
        if indices is None:
            return np.diff(ends, prepend=0)
        order = np.asarray(indices)
        return np.asarray(ends[order] - np.where(order > 0, ends[order - 1], 0))

    def _map(self, name: str, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        path = self.folder / f"{self.split}.{name}.bin"
        if not path.is_file():
            raise InputError(f'{path}: not found; run "loopwright run --until prepare"')
        return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)


def padded(rows: Sequence[npt.NDArray[Any]], fill: int) -> Numbers:
    """Rows of different lengths as one array (B, T), filled after their ends."""
    out = np.full((len(rows), max(map(len, rows), default=0)), fill, np.int64)
    for index, row in enumerate(rows):
        out[index, : len(row)] = row
    return out


def inputs(rows: Sequence[npt.NDArray[Any]], pad_id: int) -> dict[str, Numbers]:
    """input_ids and attention_mask (B, T)."""
    mask = padded([np.ones(len(row), np.int64) for row in rows], 0)
    return {"input_ids": padded(rows, pad_id), "attention_mask": mask}


def tensors(arrays: Mapping[str, npt.NDArray[Any]]) -> Batch:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class SentencePairs(VariableLengthRows):
    """`[CLS] A [SEP] B [SEP]`, B the continuation of A or a passage of another document: BERT's pretraining rows.

    Nothing is masked here; `words` numbers the words of a row's tokens, for whole-word masking.
    """

    def words(self, index: int) -> Numbers:
        """The number of each token's word (T,); -1 at special tokens."""
        starts = self.field("ids.starts", index)
        return np.where(starts == SPECIAL, -1, np.cumsum(starts == 1))

    def batch(self, indices: Indices, step: int = 0) -> Batch:
        """input_ids, token_type_ids, attention_mask and words (B, T); next_sentence_labels (B,).

        As Hugging Face has them: 0 where B follows A, 1 where it is of another document, IGNORED without a B.
        """
        rows = [int(index) for index in indices]
        follows = self.numbers("random", rows)
        return tensors(
            {
                **inputs([self.ids(row) for row in rows], self.pad_id),
                "token_type_ids": padded([self.field("ids.segments", row) for row in rows], 0),
                "words": padded([self.words(row) for row in rows], -1),
                "next_sentence_labels": np.where(follows == NO_PAIR, IGNORED, follows),
            }
        )


class Chunks(VariableLengthRows):
    """Running text of documents, each ended by `</s>`, cut into rows of seq_len tokens: T5's pretraining rows."""

    def batch(self, indices: Indices, step: int = 0) -> Batch:
        """input_ids and attention_mask (B, T), without corruption."""
        return tensors(inputs([self.ids(int(index)) for index in indices], self.pad_id))


class LabelledRows(VariableLengthRows):
    """Texts with the number of their label."""

    @property
    def labels(self) -> list[str]:
        """Names, in the order of their numbers."""
        return [str(name) for name in self.info["labels"]]

    def batch(self, indices: Indices, step: int = 0) -> Batch:
        """input_ids, token_type_ids and attention_mask (B, T); labels (B,)."""
        arrays = inputs([self.ids(int(index)) for index in indices], self.pad_id)
        labels = self.numbers("label", indices)
        return tensors({**arrays, "token_type_ids": np.zeros_like(arrays["input_ids"]), "labels": labels})


class TextPairRows(VariableLengthRows):
    """Sources and targets."""

    measured = "source"

    def batch(self, indices: Indices, step: int = 0) -> Batch:
        """input_ids and attention_mask (B, S); decoder_input_ids, decoder_attention_mask and labels (B, T).

        The decoder's input is the target shifted right after a padding token, as in T5.
        """
        sources = [self.field("source", int(index)) for index in indices]
        return seq2seq(sources, [self.field("target", int(index)) for index in indices], self.pad_id)


def seq2seq(sources: Sequence[npt.NDArray[Any]], targets: Sequence[npt.NDArray[Any]], pad_id: int) -> Batch:
    """The batch of an encoder-decoder: see `TextPairRows.batch`."""
    labels = padded(targets, IGNORED)
    shifted = np.full_like(labels, pad_id)
    shifted[:, 1:] = np.where(labels[:, :-1] == IGNORED, pad_id, labels[:, :-1])
    return tensors(
        {
            **inputs(sources, pad_id),
            "decoder_input_ids": shifted,
            "decoder_attention_mask": (labels != IGNORED).astype(np.int64),
            "labels": labels,
        }
    )
