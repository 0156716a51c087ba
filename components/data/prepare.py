"""Stage: datasets to packed rows of tokens, in bounded memory.

A row has `seq_len` tokens and holds several documents or conversations, numbered by
`segments` so that attention and positions never cross them. `mask` is 1 on the tokens to be
learned: all of a document, the model's own turns of a conversation, the repetition (not the
first occurrence) of a span in the copying practice.

    train.ids.bin  train.segments.bin  train.mask.bin    raw little-endian arrays of shape (rows, seq_len)
    rows.json                                            seq_len, dtype, vocab_size, rows per split, what was dropped
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path

import numpy as np

from components.config import InputError
from components.data.copying import Piece, copying_rows, with_noise
from components.data.datasets import Kind, read_info, read_rows, write_json
from components.data.tokenizer import ChatTokenizer
from components.stage import StageRun

BATCH = 512
OPEN_ROWS = 64
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*")


class RowWriter:
    """Append packed rows of one split to its three files."""

    def __init__(self, folder: Path, split: str, seq_len: int, dtype: str) -> None:
        names = {"ids": dtype, "segments": "uint16", "mask": "uint8"}
        self._types = {name: np.dtype(kind).newbyteorder("<") for name, kind in names.items()}
        self._files = {name: (folder / f"{split}.{name}.bin").open("wb") for name in names}
        self.seq_len = seq_len
        self.rows = 0
        self.tokens = 0
        self.learned = 0

    def add(self, pieces: list[Piece]) -> None:
        """One row; pieces that together are longer than it are cut."""
        row = {name: np.zeros(self.seq_len, kind) for name, kind in self._types.items()}
        start = 0
        for number, (ids, mask) in enumerate(pieces, start=1):
            stop = min(start + len(ids), self.seq_len)
            row["ids"][start:stop] = ids[: stop - start]
            row["mask"][start:stop] = mask[: stop - start]
            row["segments"][start:stop] = number
            start = stop
        for name, file in self._files.items():
            file.write(row[name].tobytes())
        self.rows += 1
        self.tokens += start
        self.learned += int(row["mask"].sum())

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def prepare(run: StageRun) -> None:
    """Write the folders `pretrain` and `tune` of `data/tokens/FAMILY`.

    Raises: InputError when a dataset is of the wrong kind or leaves nothing to learn.
    """
    tokenizer = ChatTokenizer.load(run.paths.tokenizer(run.family))
    documents = _folders(run, "pretrain", "documents")
    conversations = _folders(run, "tune", "conversations")
    metrics = {"pretrain": _prepare_documents(run, tokenizer, documents)}
    run.progress(1, 2, rows=metrics["pretrain"]["train_rows"])
    imported = run.paths.imported(run.family)
    spoken = ChatTokenizer.load(imported) if (imported / "config.json").is_file() else tokenizer
    metrics["tune"] = _prepare_conversations(run, spoken, conversations)
    run.progress(2, 2, rows=metrics["tune"]["train_rows"])
    write_json(run.paths.metrics / f"{run.name}.json", metrics)
    run.tracker.metrics({f"{name}.{key}": float(value) for name, row in metrics.items() for key, value in row.items()})


def id_type(tokenizer: ChatTokenizer) -> str:
    """The smallest type on disk that holds every id."""
    return "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"


def write_rows_file(folder: Path, tokenizer: ChatTokenizer, seq_len: int, writers: Mapping[str, RowWriter]) -> None:
    """`rows.json`: what a reader needs to know of the splits' arrays."""
    rows = {split: writer.rows for split, writer in writers.items()}
    facts = {"seq_len": seq_len, "vocab_size": tokenizer.vocab_size, "dtype": id_type(tokenizer)}
    write_json(folder / "rows.json", {**facts, "rows": rows})


def fill_rows(pieces: Iterable[Piece], writer: RowWriter) -> None:
    """Fill rows to the brim: a document that does not fit goes on in the next row as a new segment."""
    row: list[Piece] = []
    free = writer.seq_len
    for ids, mask in pieces:
        while ids:
            row.append((ids[:free], mask[:free]))
            ids, mask, free = ids[free:], mask[free:], free - len(row[-1][0])
            if not free:
                writer.add(row)
                row, free = [], writer.seq_len
    if row:
        writer.add(row)


def pack_rows(pieces: Iterable[Piece], writer: RowWriter) -> int:
    """Put whole pieces into the fullest open row that has room; return how many were too long for any."""
    too_long = 0
    rows: list[tuple[int, list[Piece]]] = []
    for ids, mask in pieces:
        if len(ids) > writer.seq_len:
            too_long += 1
            continue
        room = [index for index, (used, _) in enumerate(rows) if used + len(ids) <= writer.seq_len]
        best = max(room, key=lambda index: rows[index][0], default=None)
        used, held = (0, []) if best is None else rows.pop(best)
        rows.append((used + len(ids), [*held, (ids, mask)]))
        if len(rows) > OPEN_ROWS:
            writer.add(rows.pop(max(range(len(rows)), key=lambda index: rows[index][0]))[1])
    for _, held in rows:
        writer.add(held)
    return too_long


def _folders(run: StageRun, section: str, kind: Kind) -> list[Path]:
    folders = [run.paths.collected / name for name in getattr(run.params, section).datasets]
    for folder in folders:
        info = read_info(folder)
        if info.kind != kind:
            raise InputError(
                f"params.yaml: {section}.dataset: {info.name!r} holds {info.kind}; {section} learns from {kind}"
            )
    return folders


def _prepare_documents(run: StageRun, tokenizer: ChatTokenizer, folders: list[Path]) -> dict[str, int]:
    rows = _Rows(run, tokenizer, "pretrain")
    for split in ("train", "test"):
        writer = rows.writer(split)
        for folder in folders:
            fill_rows(_documents(tokenizer, folder, split), writer)
        if split == "train":
            share = run.params.prepare.copy_share
            names = _names(folders)
            for row in copying_rows(
                names, tokenizer, int(writer.rows * share / (1 - share)), writer.seq_len, run.params.seed
            ):
                writer.add(row)
    return rows.close({})


def _prepare_conversations(run: StageRun, tokenizer: ChatTokenizer, folders: list[Path]) -> dict[str, int]:
    rows = _Rows(run, tokenizer, "tune")
    too_long = 0
    for split in ("train", "test"):
        for folder in folders:
            pieces = _conversations(tokenizer, folder, split)
            if split == "train":
                pieces = _practised(pieces, run, tokenizer)
            too_long += pack_rows(pieces, rows.writer(split))
    return rows.close({"too_long": too_long})


def _documents(tokenizer: ChatTokenizer, folder: Path, split: str) -> Iterator[Piece]:
    texts = (row["text"] for row in read_rows(folder, split, ["text"]))
    while batch := list(islice(texts, BATCH)):
        for ids in tokenizer.encode_batch(batch):
            yield [tokenizer.document_id, *ids, tokenizer.end_id], [0] + [1] * (len(ids) + 1)


def _conversations(tokenizer: ChatTokenizer, folder: Path, split: str) -> Iterator[Piece]:
    chats = ((row["messages"], row["tools"]) for row in read_rows(folder, split, ["messages", "tools"]))
    while batch := list(islice(chats, BATCH)):
        yield from tokenizer.encode_chats(batch)


def _practised(pieces: Iterator[Piece], run: StageRun, tokenizer: ChatTokenizer) -> Iterator[Piece]:
    """The conversations, and a share of them once more with noise in what they copy."""
    random = np.random.default_rng(run.params.seed)
    for ids, mask in pieces:
        yield ids, mask
        if random.random() < run.params.prepare.noise_share:
            noisy = with_noise(ids, random, tokenizer)
            if noisy:
                yield noisy, mask


def _names(folders: list[Path], limit: int = 5_000) -> list[str]:
    """Names from the training text itself, so that what is copied looks like what will be asked."""
    found: dict[str, None] = {}
    for folder in folders:
        for row in read_rows(folder, "train", ["text"]):
            found.update(dict.fromkeys(name for name in _NAME.findall(row["text"][:4_000]) if len(name) > 5))
            if len(found) >= limit:
                return list(found)[:limit]
    return list(found)


class _Rows:
    """The writers of one objective's folder and, at the end, its `rows.json`."""

    def __init__(self, run: StageRun, tokenizer: ChatTokenizer, objective: str) -> None:
        self._folder = run.paths.tokens(run.family) / objective
        self._folder.mkdir(parents=True, exist_ok=True)
        self._objective, self._tokenizer, self._seq_len = objective, tokenizer, run.params.prepare.seq_len
        self._writers: dict[str, RowWriter] = {}

    def writer(self, split: str) -> RowWriter:
        if split not in self._writers:
            self._writers[split] = RowWriter(self._folder, split, self._seq_len, id_type(self._tokenizer))
        return self._writers[split]

    def close(self, dropped: dict[str, int]) -> dict[str, int]:
        for writer in self._writers.values():
            writer.close()
        train = self._writers["train"]
        if not train.learned:
            said = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
            raise InputError(
                f"params.yaml: {self._objective}.dataset: nothing to learn in its rows of {train.seq_len} tokens"
                f" ({said or 'it is empty'}); add rows or raise prepare.seq_len"
            )
        write_rows_file(self._folder, self._tokenizer, train.seq_len, self._writers)
        counts = {
            f"{split}_{name}": getattr(writer, name)
            for split, writer in self._writers.items()
            for name in ("rows", "tokens", "learned")
        }
        return counts | dropped
