"""Stage: tokenize datasets into rows, in bounded memory: packed (packing.py) or of variable length, by family."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from components.config.params import InputError
from components.config.paths import CONFIG
from components.datasets.formats import batched, read_info, read_rows, refuse_other_kinds, write_json
from components.datasets.images import complete_messages
from components.media.messages import pictures_of
from components.runtime.stage import StageRun
from components.token_rows.augmentation import Piece, copy_augmented_rows, with_token_noise
from components.token_rows.packing import RowWriter, fill_rows, id_type, pack_rows, write_rows_file
from components.token_rows.picture_rows import PictureWriter
from components.token_rows.text_rows import prepare_encoder, prepare_encoder_decoder, section_of, tuned_tokenizer
from components.tokenization.chat_tokenizer import ChatTokenizer, read_json
from components.tokenization.hf_tokenizer import load_chat_tokenizer

BATCH = 512
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*")


def prepare(run: StageRun) -> None:
    """Write a folder per objective of the family into `data/tokens/FAMILY`.

    Raises: InputError when a dataset is of the wrong kind or leaves nothing to learn.
    """
    documents = _folders(run, f"pretrain.{run.family}")
    match run.family:
        case "decoder":
            metrics = _prepare_decoder(run, documents, _folders(run, "tune"))
        case "encoder":
            metrics = prepare_encoder(run, documents, _folders(run, "classifier"))
        case "encoder_decoder":
            metrics = prepare_encoder_decoder(run, documents, _folders(run, "summarizer"))
    write_json(run.paths.metrics / f"{run.name}.json", metrics)
    run.tracker.metrics({f"{name}.{key}": float(value) for name, row in metrics.items() for key, value in row.items()})


def _prepare_decoder(run: StageRun, documents: list[Path], conversations: list[Path]) -> dict[str, dict[str, int]]:
    tokenizer = load_chat_tokenizer(run.paths.tokenizer(run.family))
    metrics = {"pretrain": _prepare_documents(run, tokenizer, documents)}
    run.progress(1, 2, rows=metrics["pretrain"]["train_rows"])
    tokenizer, image_size = with_sight(run, load_chat_tokenizer(tuned_tokenizer(run)), conversations)
    metrics["tune"] = _prepare_conversations(run, tokenizer, conversations, image_size)
    run.progress(2, 2, rows=metrics["tune"]["train_rows"])
    return metrics


def _folders(run: StageRun, section: str) -> list[Path]:
    folders = [run.paths.collected / name for name in run.params.datasets[section]]
    for folder in folders:
        info = read_info(folder)
        refuse_other_kinds(section, info.name, info.kind)
    return folders


def _prepare_documents(run: StageRun, tokenizer: ChatTokenizer, folders: list[Path]) -> dict[str, int]:
    rows = _Rows(run, tokenizer, "pretrain")
    for split in ("train", "test"):
        writer = rows.writer(split)
        for folder in folders:
            fill_rows(_documents(tokenizer, folder, split), writer)
        if split == "train":
            share = run.params.prepare.decoder.copy_rate
            names = _names(folders)
            for row in copy_augmented_rows(
                names, tokenizer, int(writer.rows * share / (1 - share)), writer.seq_len, run.params.seed
            ):
                writer.add(row)
    return rows.close({})


def with_sight(run: StageRun, tokenizer: ChatTokenizer, folders: list[Path]) -> tuple[ChatTokenizer, int]:
    """A tokenizer that has image tokens where a dataset has pictures, and their size in pixels, else 0."""
    if not any(read_info(folder).kind == "images" for folder in folders):
        return tokenizer, 0
    imported = read_json(tuned_tokenizer(run) / CONFIG).get("vision_config")
    if imported:
        return tokenizer, int(imported["image_size"])
    vision = run.params.model.vision
    return tokenizer.with_images((vision.image_size // vision.patch_size) ** 2), vision.image_size


def _prepare_conversations(
    run: StageRun, tokenizer: ChatTokenizer, folders: list[Path], image_size: int
) -> dict[str, int]:
    rows = _Rows(run, tokenizer, "tune", image_size)
    too_long = 0
    for split in ("train", "test"):
        for folder in folders:
            if read_info(folder).kind == "images":
                too_long += pack_rows(_picture_conversations(tokenizer, folder, split, rows), rows.writer(split))
                continue
            pieces = _conversations(tokenizer, folder, split)
            if split == "train":
                pieces = _with_noisy_copies(pieces, run, tokenizer)
            too_long += pack_rows(pieces, rows.writer(split))
    return rows.close({"too_long": too_long})


def _documents(tokenizer: ChatTokenizer, folder: Path, split: str) -> Iterator[Piece]:
    for batch in batched((row["text"] for row in read_rows(folder, split, ["text"])), BATCH):
        for ids in tokenizer.encode_batch(batch):
            yield [tokenizer.document_id, *ids, tokenizer.end_id], [0] + [1] * (len(ids) + 1)


def _conversations(tokenizer: ChatTokenizer, folder: Path, split: str) -> Iterator[Piece]:
    chats = ((row["messages"], row["tools"]) for row in read_rows(folder, split, ["messages", "tools"]))
    for batch in batched(chats, BATCH):
        yield from tokenizer.encode_chats(batch)


def _picture_conversations(tokenizer: ChatTokenizer, folder: Path, split: str, rows: _Rows) -> Iterator[Piece]:
    assert rows.pictures is not None
    for batch in batched(read_rows(folder, split, ["id", "images", "messages", "tools"]), BATCH):
        chats = [(complete_messages(row), row["tools"]) for row in batch]
        for (messages, _), piece in zip(chats, tokenizer.encode_chats(chats), strict=True):
            yield rows.pictures.piece(piece, pictures_of(messages))


def _with_noisy_copies(pieces: Iterator[Piece], run: StageRun, tokenizer: ChatTokenizer) -> Iterator[Piece]:
    """The conversations, and a share of them repeated with token noise in their copied spans."""
    random = np.random.default_rng(run.params.seed)
    for ids, mask in pieces:
        yield ids, mask
        if random.random() < run.params.prepare.decoder.token_noise_rate:
            noisy = with_token_noise(ids, random, tokenizer)
            if noisy:
                yield noisy, mask


def _names(folders: list[Path], limit: int = 5_000) -> list[str]:
    """Names of the training text itself, so that copied spans look like those of prompts."""
    names: dict[str, None] = {}
    for folder in folders:
        for row in read_rows(folder, "train", ["text"]):
            names.update(dict.fromkeys(name for name in _NAME.findall(row["text"][:4_000]) if len(name) > 5))
            if len(names) >= limit:
                return list(names)[:limit]
    return list(names)


class _Rows:
    """The writers of one objective's folder and, at the end, its `rows.json`."""

    def __init__(self, run: StageRun, tokenizer: ChatTokenizer, objective: str, image_size: int = 0) -> None:
        self._folder = run.paths.tokens(run.family) / objective
        self._folder.mkdir(parents=True, exist_ok=True)
        self._section = section_of(run, objective)
        self._tokenizer, self._seq_len = tokenizer, run.params.prepare.decoder.seq_len
        self._writers: dict[str, RowWriter] = {}
        self.pictures = PictureWriter(self._folder, tokenizer, image_size) if image_size else None

    def writer(self, split: str) -> RowWriter:
        if split not in self._writers:
            self._writers[split] = RowWriter(
                self._folder, split, self._seq_len, id_type(self._tokenizer), self.pictures
            )
        return self._writers[split]

    def close(self, dropped: dict[str, int]) -> dict[str, int]:
        for writer in self._writers.values():
            writer.close()
        train = self._writers["train"]
        if not train.learned:
            reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
            raise InputError(
                f"params.yaml: {self._section}.dataset: nothing to learn in its rows of {train.seq_len} tokens"
                f" ({reasons or 'it is empty'}); add rows or raise prepare.decoder.seq_len"
            )
        pictures = self.pictures.close() if self.pictures is not None else None
        write_rows_file(self._folder, self._tokenizer, train.seq_len, self._writers, pictures)
        counts = {
            f"{split}_{name}": getattr(writer, name)
            for split, writer in self._writers.items()
            for name in ("rows", "tokens", "learned")
        }
        return counts | dropped
