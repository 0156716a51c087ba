"""Rows of tokens of unlike length on disk, and as batches padded to the longest of each.

    train.ids.bin  train.segments.bin ...   raw little-endian arrays, one number per token, row after row
    train.ids.ends.bin                      where each row ends in that array (uint64); fields of a group share it
    train.label.bin                         one number per row
    rows.json                               for readers: rows per split, vocab_size, ids of special tokens

B rows, S and T the longest source and target of a batch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from components.config.params import InputError
from components.token_rows.batches import IGNORED, Batch, Indices

Numbers = npt.NDArray[np.int64]
_ENDS = np.dtype("<u8")
SPECIAL = 2
"""`starts` of a token that is in no word; else 1 where a word starts, and 0 within."""
NO_PAIR = 2
"""`random` of a row that has one segment alone; else 1 where the second is of another document."""


class VariableLengthWriter:
    """Append rows of one split. `tokens` maps each per-token field to its type, `numbers` each per-row field.

    A field named `a.b` has the lengths of the field `a`.
    """

    def __init__(self, folder: Path, split: str, tokens: Mapping[str, str], numbers: Mapping[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._types = {name: np.dtype(kind).newbyteorder("<") for name, kind in {**tokens, **numbers}.items()}
        lengths = {f"{name}.ends": _ENDS for name in tokens if "." not in name}
        self._files = {name: (folder / f"{split}.{name}.bin").open("wb") for name in (*self._types, *lengths)}
        self._ends = dict.fromkeys(lengths, 0)
        self.rows = 0
        self.tokens = 0

    def add(self, **row: Sequence[int] | int) -> None:
        """One row, by field; a dot in a field's name is written as two underscores."""
        for key, value in row.items():
            name = key.replace("__", ".")
            self._files[name].write(np.asarray(value, self._types[name]).tobytes())
            if f"{name}.ends" in self._ends and not isinstance(value, int):
                self._ends[f"{name}.ends"] += len(value)
                self._files[f"{name}.ends"].write(np.uint64(self._ends[f"{name}.ends"]).astype(_ENDS).tobytes())
                self.tokens += len(value)
        self.rows += 1

    def close(self) -> None:
        for file in self._files.values():
            file.close()


class VariableLengthRows:
    """One split of a folder that `VariableLengthWriter` wrote; rows are read from disk when asked for."""

    measured = "ids"
    """The field by which rows count as long or short."""

    def __init__(self, folder: Path, split: str) -> None:
        try:
            self.info: dict[str, Any] = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f'{folder}: no token rows; run "loopwright run --until prepare"') from None
        self.folder, self.split = folder, split
        self.seq_len, self.vocab_size = int(self.info["seq_len"]), int(self.info["vocab_size"])
        self.pad_id = int(self.info["special"]["pad"])
        self.count = int(self.info["rows"].get(split, 0))
        self._ends: dict[str, Numbers] = {}
        self._arrays: dict[str, npt.NDArray[Any]] = {}
        for name, kind in self.info["fields"].items() if self.count else ():
            self._arrays[name] = self._map(name, np.dtype(kind).newbyteorder("<"))
        for name in self.info["ragged"] if self.count else ():
            ends = self._map(f"{name}.ends", _ENDS).astype(np.int64)
            self._ends[name] = np.concatenate([np.zeros(1, np.int64), ends])
            if len(ends) != self.count or ends[-1] != len(self._arrays[name]):
                raise InputError(f'{folder}: rows of {split} are incomplete; run "loopwright run --until prepare"')

    def __len__(self) -> int:
        return self.count

    def field(self, name: str, index: int) -> Numbers:
        """The numbers of one row."""
        ends = self._ends[name.partition(".")[0]]
        found: Numbers = np.asarray(self._arrays[name][ends[index] : ends[index + 1]]).astype(np.int64)
        return found

    def numbers(self, name: str) -> Numbers:
        """A per-row field of all rows (N,)."""
        return np.asarray(self._arrays[name]).astype(np.int64) if self.count else np.zeros(0, np.int64)

    def lengths(self, indices: Indices | None = None) -> Numbers:
        """How many tokens each row has, or each of these: what to sort by where batches shall pad little."""
        if not self.count:
            return np.zeros(0, np.int64)
        ends = self._ends[self.measured]
        return np.diff(ends) if indices is None else ends[indices + 1] - ends[indices]

    def _map(self, name: str, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        path = self.folder / f"{self.split}.{name}.bin"
        if not path.is_file():
            raise InputError(f'{path}: not found; run "loopwright run --until prepare"')
        return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)


def padded(rows: Sequence[npt.NDArray[Any]], fill: int) -> Numbers:
    """Rows of unlike length as one array (B, T), filled behind their ends."""
    out = np.full((len(rows), max(map(len, rows), default=0)), fill, np.int64)
    for place, row in enumerate(rows):
        out[place, : len(row)] = row
    return out


def tensors(arrays: Mapping[str, npt.NDArray[Any]]) -> Batch:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class SentencePairs(VariableLengthRows):
    """`[CLS] A [SEP] B [SEP]`, B what follows A or a passage of another document: what BERT is pretrained on.

    Nothing is masked here; `words` of a row numbers its tokens' words, so that whole words can be.
    """

    def ids(self, index: int) -> Numbers:
        return self.field("ids", index)

    def words(self, index: int) -> Numbers:
        """The number of each token's word (T,); -1 at special tokens."""
        starts = self.field("ids.starts", index)
        return np.where(starts == SPECIAL, -1, np.cumsum(starts == 1))

    def batch(self, indices: Indices, step: int = 0) -> Batch:
        """input_ids, token_type_ids, attention_mask and words (B, T); next_sentence_labels (B,).

        As Hugging Face has them: 0 where B follows A, 1 where it is of another document, IGNORED without a B.
        """
        rows = [int(index) for index in indices]
        ids = [self.ids(row) for row in rows]
        follows = self.numbers("random")[rows]
        return tensors(
            {
                "input_ids": padded(ids, self.pad_id),
                "token_type_ids": padded([self.field("ids.segments", row) for row in rows], 0),
                "attention_mask": padded([np.ones_like(row) for row in ids], 0),
                "words": padded([self.words(row) for row in rows], -1),
                "next_sentence_labels": np.where(follows == NO_PAIR, IGNORED, follows),
            }
        )


class Chunks(VariableLengthRows):
    """Running text of documents, each ended by `</s>`, cut into pieces of seq_len tokens: T5 hides spans of them."""

    def ids(self, index: int) -> Numbers:
        return self.field("ids", index)

    def batch(self, indices: Indices, step: int = 0) -> Batch:
        """input_ids and attention_mask (B, T): the text, nothing hidden."""
        ids = [self.ids(int(index)) for index in indices]
        mask = padded([np.ones_like(row) for row in ids], 0)
        return tensors({"input_ids": padded(ids, self.pad_id), "attention_mask": mask})


class LabelledRows(VariableLengthRows):
    """Texts with the number of their label: what a classifier learns from."""

    @property
    def labels(self) -> list[str]:
        """Names, in the order of their numbers."""
        return [str(name) for name in self.info["labels"]]

    def batch(self, indices: Indices, step: int = 0) -> Batch:
        """input_ids, token_type_ids and attention_mask (B, T); labels (B,)."""
        ids = [self.field("ids", int(index)) for index in indices]
        inputs = padded(ids, self.pad_id)
        return tensors(
            {
                "input_ids": inputs,
                "token_type_ids": np.zeros_like(inputs),
                "attention_mask": padded([np.ones_like(row) for row in ids], 0),
                "labels": self.numbers("label")[np.asarray(indices)],
            }
        )


class TextPairRows(VariableLengthRows):
    """Sources with what is to be written of them."""

    measured = "source"

    def batch(self, indices: Indices, step: int = 0) -> Batch:
        """input_ids and attention_mask (B, S); decoder_input_ids, decoder_attention_mask and labels (B, T).

        The decoder reads the target shifted right behind a padding token, as T5 does.
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
            "input_ids": padded(sources, pad_id),
            "attention_mask": padded([np.ones(len(row), np.int64) for row in sources], 0),
            "decoder_input_ids": shifted,
            "decoder_attention_mask": (labels != IGNORED).astype(np.int64),
            "labels": labels,
        }
    )
