"""Preferences as rows of tokens: one sequence a row, so that a row has a log-probability of its own. Rows are as wide
as the longest.

    train.ids.bin, train.segments.bin, train.mask.bin    as `prepare` writes them
    train.roles.bin                                      `Role` of each row, uint8

A pair is two rows, the chosen answer and then the rejected one. An unpaired label is its own row and, where there are
several labels, its prompt with the answer of another label: KTO estimates its KL term on those.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from components.config.params import InputError
from components.datasets.formats import Row, batched
from components.media.messages import pictures_of
from components.token_rows.augmentation import Piece
from components.token_rows.batches import IGNORED, Batch, Indices, TokenRows
from components.token_rows.packing import RowWriter, id_type, write_rows_file
from components.token_rows.picture_rows import PictureWriter
from components.tokenization.chat_tokenizer import ChatTokenizer

BATCH = 512


class Role(IntEnum):
    """Purpose of a row of a batch."""

    SFT = 0
    CHOSEN = 1
    """Followed by its REJECTED row."""
    REJECTED = 2
    LIKED = 3
    DISLIKED = 4
    MISMATCHED = 5
    """A prompt with the answer to another; not trained on."""
    REPLAY = 6
    """An earlier conversation, on which the model is to stay near the reference model."""


def write_preferences(
    folder: Path,
    split: str,
    tokenizer: ChatTokenizer,
    rows: Iterable[Row],
    seq_len: int,
    pictures: PictureWriter | None = None,
) -> dict[str, int]:
    """Tokenize rows of kind `preferences` into the files above; returns the counts of `pairs`, `votes`, `too_long`."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces: list[tuple[Role, Piece]] = []
    labels: list[tuple[Role, Answer]] = []
    counts = {"pairs": 0, "votes": 0, "too_long": 0}
    for row, answers in encode_preferences(tokenizer, rows):
        if pictures is not None:
            for answer in answers.values():
                answer.prompt, _ = pictures.piece((answer.prompt, []), pictures_of(row["prompt"]))
        if any(len(answer) > seq_len for answer in answers.values()):
            counts["too_long"] += 1
        elif len(answers) == 2:
            counts["pairs"] += 1
            pieces += [(role, answers[role].piece()) for role in (Role.CHOSEN, Role.REJECTED)]
        else:
            labels += [(Role.LIKED if row["chosen"] else Role.DISLIKED, answer) for answer in answers.values()]
    counts["votes"] = len(labels)
    for number, (role, answer) in enumerate(labels):
        pieces.append((role, answer.piece()))
        other = labels[(number + 1) % len(labels)][1]
        if len(labels) > 1:
            pieces.append((Role.MISMATCHED, answer.replaced_by(other, seq_len)))
    width = max((len(ids) for _, (ids, _) in pieces), default=seq_len)
    writer = RowWriter(folder, split, width, id_type(tokenizer), pictures)
    for _, piece in pieces:
        writer.add([piece])
    writer.close()
    np.array([role for role, _ in pieces], "uint8").tofile(folder / f"{split}.roles.bin")
    write_rows_file(folder, tokenizer, width, {split: writer.rows}, pictures.close() if pictures is not None else None)
    return counts


class Answer:
    """One answer to one prompt: ids, and the mask of the model's own tokens in the answer."""

    def __init__(self, prompt: list[int], ids: list[int], mask: list[int]) -> None:
        self.prompt, self.ids, self.mask = prompt, ids, mask

    def __len__(self) -> int:
        return len(self.prompt) + len(self.ids)

    def piece(self) -> Piece:
        return [*self.prompt, *self.ids], [0] * len(self.prompt) + self.mask

    def replaced_by(self, other: Answer, seq_len: int) -> Piece:
        """This prompt with the answer to another, cut to `seq_len` tokens."""
        ids, mask = Answer(self.prompt, other.ids, other.mask).piece()
        return ids[:seq_len], mask[:seq_len]


def encode_preferences(tokenizer: ChatTokenizer, rows: Iterable[Row]) -> Iterator[tuple[Row, dict[Role, Answer]]]:
    """Each row with its answers; turns of the prompt are the context of an answer and not in the mask."""
    for batch in batched(rows, BATCH):
        prompts = tokenizer.encode_chats([(row["prompt"], row["tools"]) for row in batch])
        sides = [
            (number, role, row)
            for number, row in enumerate(batch)
            for role, side in ((Role.CHOSEN, "chosen"), (Role.REJECTED, "rejected"))
            if row[side]
        ]
        chats = [
            ([*row["prompt"], *row["chosen" if role is Role.CHOSEN else "rejected"]], row["tools"])
            for _, role, row in sides
        ]
        answers: list[dict[Role, Answer]] = [{} for _ in batch]
        for (number, role, _), (ids, mask) in zip(sides, tokenizer.encode_chats(chats), strict=True):
            start = len(prompts[number][0])
            answers[number][role] = Answer(ids[:start], ids[start:], mask[start:])
        yield from zip(batch, answers, strict=True)


class PreferenceRows:
    """One split of a folder that `write_preferences` wrote."""

    def __init__(self, folder: Path, split: str) -> None:
        self.tokens = TokenRows(folder, split)
        path = folder / f"{split}.roles.bin"
        self.roles = np.fromfile(path, "uint8") if path.is_file() else np.zeros(0, "uint8")
        if len(self.roles) != len(self.tokens):
            raise InputError(
                f'{path}: {len(self.roles)} roles for {len(self.tokens)} rows; run "loopwright improve --force"'
            )
        self.reference: npt.NDArray[np.float32] = np.zeros(len(self.tokens), "float32")
        """Log-probability of each row's labels under the frozen reference model; filled before training."""

    def units(self) -> list[list[int]]:
        """The rows of each pair, or unpaired label with its mismatched row."""
        units: list[list[int]] = []
        for row, role in enumerate(self.roles.tolist()):
            if role in (Role.REJECTED, Role.MISMATCHED):
                units[-1].append(row)
            else:
                units.append([row])
        return units

    def batch(self, rows: Indices) -> Batch:
        """The batch of `TokenRows`, with `role` (R,) int64 and `reference` (R,) float32."""
        extra = {
            "role": torch.from_numpy(self.roles[rows].astype(np.int64)),
            "reference": torch.from_numpy(self.reference[rows]),
        }
        return self.tokens.batch(rows) | extra


class AlignRows:
    """Packed conversations, replayed conversations and preferences as one training set of units."""

    def __init__(self, sft: TokenRows | None, replay: TokenRows | None, preferences: PreferenceRows | None) -> None:
        parts = [part for part in (sft, replay, preferences.tokens if preferences else None) if part is not None]
        if not parts:
            raise InputError("AlignRows: neither conversations nor preferences; there is nothing to learn from")
        self._packed = [
            (role, rows) for role, rows in ((Role.SFT, sft), (Role.REPLAY, replay)) if rows is not None and len(rows)
        ]
        self._preferences = preferences
        self._units = preferences.units() if preferences else []
        self.folder, self.seq_len, self.vocab_size = parts[0].folder, parts[0].seq_len, parts[0].vocab_size

    def __len__(self) -> int:
        return sum(len(rows) for _, rows in self._packed) + len(self._units)

    def lengths(self, indices: Indices) -> Indices:
        """All the same: units of all kinds stay in sampling order."""
        return np.full(len(indices), self.seq_len)

    def batch(self, indices: Indices, step: int = 0) -> Batch:
        """The units of these indices, a pair's rows one after the other, trimmed to the longest row."""
        parts: list[Batch] = []
        first = 0
        for role, packed in self._packed:
            chosen = indices[(indices >= first) & (indices < first + len(packed))] - first
            first += len(packed)
            if len(chosen):
                extra = {"role": torch.full((len(chosen),), int(role)), "reference": torch.zeros(len(chosen))}
                parts.append(packed.batch(chosen) | extra)
        rows = [row for unit in indices[indices >= first] for row in self._units[unit - first]]
        if self._preferences and rows:
            parts.append(self._preferences.batch(np.array(rows, np.int64)))
        names = {name: None for part in parts for name in part}  # pixel_values is of parts with pictures alone
        width = max(part["labels"].shape[1] for part in parts)
        parts = [_widened(part, width) for part in parts]
        return trimmed({name: torch.cat([part[name] for part in parts if name in part]) for name in names})


def _widened(batch: Batch, width: int) -> Batch:
    """The batch with columns of padding up to `width`."""
    return {
        name: F.pad(value, (0, width - value.shape[1]), value=IGNORED if name == "labels" else 0)
        if value.dim() == 2
        else value
        for name, value in batch.items()
    }


def trimmed(batch: Mapping[str, Any]) -> Batch:
    """The batch without columns that are padding in every row."""
    width = int((batch["segment_ids"] != 0).any(0).nonzero().max()) + 1
    return {name: value[:, :width] if value.dim() == 2 else value for name, value in batch.items()}
