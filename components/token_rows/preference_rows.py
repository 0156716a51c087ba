"""Preferences as rows of tokens: one sequence a row, so that a row has a log-probability of its own.

    train.ids.bin, train.segments.bin, train.mask.bin    as `prepare` writes them
    train.roles.bin                                      what each row is, uint8

A pair is two rows, the chosen answer and then the rejected one. An unpaired label is its own row and, where there are
several votes, its prompt with another one's answer: KTO estimates its KL term on those.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from enum import IntEnum
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from components.config.params import InputError
from components.datasets.formats import Row
from components.token_rows.augmentation import Piece
from components.token_rows.batches import Batch, Indices, TokenRows
from components.token_rows.packing import RowWriter, id_type, write_rows_file
from components.tokenization.chat_tokenizer import ChatTokenizer

BATCH = 512


class Role(IntEnum):
    """What a row of a batch is there for."""

    SFT = 0
    CHOSEN = 1
    """Followed by its REJECTED row."""
    REJECTED = 2
    LIKED = 3
    DISLIKED = 4
    MISMATCHED = 5
    """A prompt with another one's answer; nothing is learned from it."""
    REPLAY = 6
    """An earlier conversation: what the reference model says of it is to stay."""


def write_preferences(
    folder: Path, split: str, tokenizer: ChatTokenizer, rows: Iterable[Row], seq_len: int
) -> dict[str, int]:
    """Tokenize rows of kind `preferences` into the files above; returns the counts of `pairs`, `votes`, `too_long`."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = RowWriter(folder, split, seq_len, id_type(tokenizer))
    roles: list[Role] = []
    votes: list[tuple[Role, Answer]] = []
    counts = {"pairs": 0, "votes": 0, "too_long": 0}
    for row, answers in encode_preferences(tokenizer, rows):
        if any(len(answer) > seq_len for answer in answers.values()):
            counts["too_long"] += 1
        elif len(answers) == 2:
            counts["pairs"] += 1
            for role in (Role.CHOSEN, Role.REJECTED):
                writer.add([answers[role].piece()])
                roles.append(role)
        else:
            votes += [(Role.LIKED if row["chosen"] else Role.DISLIKED, answer) for answer in answers.values()]
    counts["votes"] = len(votes)
    for number, (role, answer) in enumerate(votes):
        writer.add([answer.piece()])
        roles.append(role)
        other = votes[(number + 1) % len(votes)][1]
        if len(votes) > 1:
            writer.add([answer.instead(other, seq_len)])
            roles.append(Role.MISMATCHED)
    writer.close()
    np.array(roles, "uint8").tofile(folder / f"{split}.roles.bin")
    write_rows_file(folder, tokenizer, seq_len, {split: writer})
    return counts


class Answer:
    """One answer to one prompt: ids, and which of them the model wrote in this answer."""

    def __init__(self, prompt: list[int], ids: list[int], mask: list[int]) -> None:
        self.prompt, self.ids, self.mask = prompt, ids, mask

    def __len__(self) -> int:
        return len(self.prompt) + len(self.ids)

    def piece(self) -> Piece:
        return [*self.prompt, *self.ids], [0] * len(self.prompt) + self.mask

    def instead(self, other: Answer, seq_len: int) -> Piece:
        """This prompt with another one's answer, as far as it fits."""
        ids, mask = Answer(self.prompt, other.ids, other.mask).piece()
        return ids[:seq_len], mask[:seq_len]


def encode_preferences(tokenizer: ChatTokenizer, rows: Iterable[Row]) -> Iterator[tuple[Row, dict[Role, Answer]]]:
    """Each row with its answers; turns of the prompt are the context of an answer and not learned."""
    upcoming = iter(rows)
    while batch := list(islice(upcoming, BATCH)):
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
        """The rows that belong together: a pair, or an unpaired label with its mismatched row."""
        units: list[list[int]] = []
        for row, role in enumerate(self.roles.tolist()):
            if role in (Role.REJECTED, Role.MISMATCHED):
                units[-1].append(row)
            else:
                units.append([row])
        return units

    def batch(self, rows: Indices) -> Batch:
        """The batch of `TokenRows`, with `role` (R,) int64 and `reference` (R,) float32."""
        marks = {
            "role": torch.from_numpy(self.roles[rows].astype(np.int64)),
            "reference": torch.from_numpy(self.reference[rows]),
        }
        return self.tokens.batch(rows) | marks


class AlignRows:
    """Packed conversations, earlier ones to keep, and preferences as one set of units to draw from."""

    def __init__(self, sft: TokenRows | None, replay: TokenRows | None, preferences: PreferenceRows | None) -> None:
        given = [part for part in (sft, replay, preferences.tokens if preferences else None) if part is not None]
        if not given:
            raise InputError("AlignRows: neither conversations nor preferences; there is nothing to learn from")
        self._packed = [
            (role, rows) for role, rows in ((Role.SFT, sft), (Role.REPLAY, replay)) if rows is not None and len(rows)
        ]
        self._preferences = preferences
        self._units = preferences.units() if preferences else []
        self.folder, self.seq_len, self.vocab_size = given[0].folder, given[0].seq_len, given[0].vocab_size

    def __len__(self) -> int:
        return sum(len(rows) for _, rows in self._packed) + len(self._units)

    def lengths(self, indices: Indices) -> Indices:
        """All the same: units of all kinds come in the order in which they are drawn."""
        return np.full(len(indices), self.seq_len)

    def batch(self, indices: Indices, step: int = 0) -> Batch:
        """The units of these numbers, a pair's rows one after the other, no wider than the longest row needs."""
        parts: list[Batch] = []
        first = 0
        for role, packed in self._packed:
            here = indices[(indices >= first) & (indices < first + len(packed))] - first
            first += len(packed)
            if len(here):
                marks = {"role": torch.full((len(here),), int(role)), "reference": torch.zeros(len(here))}
                parts.append(packed.batch(here) | marks)
        rows = [row for unit in indices[indices >= first] for row in self._units[unit - first]]
        if self._preferences and rows:
            parts.append(self._preferences.batch(np.array(rows, np.int64)))
        return trimmed({name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def trimmed(batch: Mapping[str, Any]) -> Batch:
    """The batch without the columns that are padding in every row."""
    width = int((batch["segment_ids"] != 0).any(0).nonzero().max()) + 1
    return {name: value[:, :width] if value.dim() == 2 else value for name, value in batch.items()}
