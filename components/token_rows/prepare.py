"""Stage: tokenize datasets into rows, shard by shard: packed (packing.py) or of variable length, by family."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from components.config.params import InputError
from components.config.paths import CONFIG
from components.datasets.formats import (
    batched,
    read_info,
    read_rows,
    read_shard,
    refuse_other_kinds,
    shards,
    write_json,
)
from components.datasets.images import complete_messages
from components.media.messages import pictures_of
from components.runtime.shards import Output, Result, Shard, run_shards
from components.runtime.stage import StageRun
from components.token_rows.augmentation import Piece, copy_augmented_rows, with_token_noise
from components.token_rows.packing import RowWriter, fill_rows, id_type, join_rows, pack_rows, write_rows_file
from components.token_rows.picture_rows import PictureWriter
from components.token_rows.text_rows import (
    SPLITS,
    prepare_encoder,
    prepare_encoder_decoder,
    section_of,
    tuned_tokenizer,
)
from components.tokenization.chat_tokenizer import ChatTokenizer, read_json
from components.tokenization.hf_tokenizer import load_chat_tokenizer

BATCH = 512
ROWS_PER_SHARD = 50_000
"""Rows of copy augmentation in one shard."""
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


def _folders(run: StageRun, section: str) -> list[Path]:
    folders = [run.paths.collected / name for name in run.params.datasets[section]]
    for folder in folders:
        info = read_info(folder)
        refuse_other_kinds(section, info.name, info.kind)
    return folders


def _prepare_decoder(run: StageRun, documents: list[Path], conversations: list[Path]) -> dict[str, dict[str, int]]:
    pretrain = _document_shards(run, documents)
    tune, image_tokens = _conversation_shards(run, conversations)
    outputs = run_shards(run, [*pretrain, *tune])
    rows = sum(output.result["splits"].get("train", {"rows": 0})["rows"] for output in outputs[: len(pretrain)])
    copied = _copy_shards(run, documents, rows)
    done = len(outputs)
    augmented = run_shards(run, copied, done, done + len(copied))
    own, tuned = run.paths.tokenizer(run.family), tuned_tokenizer(run)
    return {
        "pretrain": _join(run, "pretrain", load_chat_tokenizer(own), [*outputs[: len(pretrain)], *augmented]),
        "tune": _join(run, "tune", _load(tuned, image_tokens), outputs[len(pretrain) :]),
    }


def _document_shards(run: StageRun, folders: list[Path]) -> list[Shard]:
    tokenizer = run.paths.tokenizer(run.family)
    common = {"tokenizer": str(tokenizer), "seq_len": run.params.prepare.decoder.seq_len}
    files = [(split, file) for split in SPLITS for folder in folders for file in shards(folder, split)]
    return [
        Shard(
            f"documents-{number:05d}",
            tokenize_documents,
            [file, tokenizer],
            {**common, "split": split, "file": str(file)},
        )
        for number, (split, file) in enumerate(files)
    ]


def tokenize_documents(out: Path, tokenizer: str, seq_len: int, split: str, file: str) -> Result:
    """Pack the documents of a Parquet file."""
    loaded = load_chat_tokenizer(Path(tokenizer))
    writer = RowWriter(out, split, seq_len, id_type(loaded))
    fill_rows(_documents(loaded, Path(file)), writer)
    return {"splits": {split: writer.close()}}


def _documents(tokenizer: ChatTokenizer, file: Path) -> Iterator[list[int]]:
    for batch in batched((row["text"] for row in read_shard(file, ["text"])), BATCH):
        for ids in tokenizer.encode_batch(batch):
            yield [tokenizer.document_id, *ids, tokenizer.end_id]


def _copy_shards(run: StageRun, folders: list[Path], rows: int) -> list[Shard]:
    """Shards of copy augmentation beside so many rows of documents."""
    share, tokenizer = run.params.prepare.decoder.copy_rate, run.paths.tokenizer(run.family)
    count = int(rows * share / (1 - share))
    common = {
        "tokenizer": str(tokenizer),
        "names": _names(folders) if count else [],
        "seq_len": run.params.prepare.decoder.seq_len,
    }
    return [
        Shard(
            f"copies-{number:05d}",
            augment_by_copies,
            [tokenizer],
            {**common, "count": min(ROWS_PER_SHARD, count - start), "seed": [run.params.seed, number]},
        )
        for number, start in enumerate(range(0, count, ROWS_PER_SHARD))
    ]


def augment_by_copies(
    out: Path, tokenizer: str, names: Sequence[str], seq_len: int, count: int, seed: Sequence[int]
) -> Result:
    """Write rows of copied spans."""
    loaded = load_chat_tokenizer(Path(tokenizer))
    writer = RowWriter(out, "train", seq_len, id_type(loaded))
    for row in copy_augmented_rows(names, loaded, count, seq_len, seed):
        writer.add(row)
    return {"splits": {"train": writer.close()}}


def _names(folders: list[Path], limit: int = 5_000) -> list[str]:
    """Names of the training text itself, so that copied spans look like those of prompts."""
    names: dict[str, None] = {}
    for folder in folders:
        for row in read_rows(folder, "train", ["text"]):
            names.update(dict.fromkeys(name for name in _NAME.findall(row["text"][:4_000]) if len(name) > 5))
            if len(names) >= limit:
                return list(names)[:limit]
    return list(names)


def with_sight(run: StageRun, tokenizer: ChatTokenizer, folders: list[Path]) -> tuple[ChatTokenizer, int]:
    """A tokenizer that has image tokens where a dataset has pictures, and their size in pixels, else 0."""
    if not any(read_info(folder).kind == "images" for folder in folders):
        return tokenizer, 0
    imported = read_json(tuned_tokenizer(run) / CONFIG).get("vision_config")
    if imported:
        return tokenizer, int(imported["image_size"])
    vision = run.params.model.vision
    return tokenizer.with_images((vision.image_size // vision.patch_size) ** 2), vision.image_size


def _load(folder: Path, image_tokens: int) -> ChatTokenizer:
    tokenizer = load_chat_tokenizer(folder)
    return tokenizer.with_images(image_tokens) if image_tokens != tokenizer.image_tokens else tokenizer


def _conversation_shards(run: StageRun, folders: list[Path]) -> tuple[list[Shard], int]:
    """Shards of conversations, and the tokens of a picture; pictures are numbered, so that with any there is one."""
    tokenizer = tuned_tokenizer(run)
    sighted, image_size = with_sight(run, load_chat_tokenizer(tokenizer), folders)
    files = [
        {"split": split, "number": number, "file": str(file), "pictures": read_info(folder).kind == "images"}
        for split in SPLITS
        for folder in folders
        for number, file in enumerate(shards(folder, split))
    ]
    common = {
        "tokenizer": str(tokenizer),
        "image_tokens": sighted.image_tokens,
        "image_size": image_size,
        "seq_len": run.params.prepare.decoder.seq_len,
        "noise_rate": run.params.prepare.decoder.token_noise_rate,
        "seed": run.params.seed,
    }
    groups = [files] if image_size else [[file] for file in files]
    named = [
        Shard(
            f"conversations-{number:05d}",
            tokenize_conversations,
            [*(Path(str(file["file"])) for file in group), tokenizer],
            {**common, "files": group},
        )
        for number, group in enumerate(groups)
        if group
    ]
    return named, sighted.image_tokens


def tokenize_conversations(
    out: Path,
    tokenizer: str,
    image_tokens: int,
    image_size: int,
    seq_len: int,
    noise_rate: float,
    seed: int,
    files: Sequence[Mapping[str, Any]],
) -> Result:
    """Pack the conversations of Parquet files of one split, or of several where pictures are stored once for all."""
    loaded = _load(Path(tokenizer), image_tokens)
    pictures = PictureWriter(out, loaded, image_size) if image_size else None
    writers: dict[str, RowWriter] = {}
    too_long = 0
    for file in files:
        split, path = file["split"], Path(file["file"])
        if split not in writers:
            writers[split] = RowWriter(out, split, seq_len, id_type(loaded), pictures)
        if file["pictures"]:
            assert pictures is not None
            pieces = _picture_conversations(loaded, path, pictures)
        else:
            pieces = _conversations(loaded, path)
            if split == "train":
                random = np.random.default_rng([seed, file["number"]])
                pieces = _with_noisy_copies(pieces, random, noise_rate, loaded)
        too_long += pack_rows(pieces, writers[split])
    splits = {split: writer.close() for split, writer in writers.items()}
    return {"splits": splits, "too_long": too_long, "pictures": pictures.close() if pictures else None}


def _conversations(tokenizer: ChatTokenizer, file: Path) -> Iterator[Piece]:
    chats = ((row["messages"], row["tools"]) for row in read_shard(file, ["messages", "tools"]))
    for batch in batched(chats, BATCH):
        yield from tokenizer.encode_chats(batch)


def _picture_conversations(tokenizer: ChatTokenizer, file: Path, pictures: PictureWriter) -> Iterator[Piece]:
    for batch in batched(read_shard(file, ["id", "images", "messages", "tools"]), BATCH):
        chats = [(complete_messages(row), row["tools"]) for row in batch]
        for (messages, _), piece in zip(chats, tokenizer.encode_chats(chats), strict=True):
            yield pictures.piece(piece, pictures_of(messages))


def _with_noisy_copies(
    pieces: Iterator[Piece], random: np.random.Generator, rate: float, tokenizer: ChatTokenizer
) -> Iterator[Piece]:
    """The conversations, and a share of them repeated with token noise in their copied spans."""
    for ids, mask in pieces:
        yield ids, mask
        if random.random() < rate:
            noisy = with_token_noise(ids, random, tokenizer)
            if noisy:
                yield noisy, mask


def _join(run: StageRun, objective: str, tokenizer: ChatTokenizer, outputs: Sequence[Output]) -> dict[str, int]:
    """Write the folder of an objective from its shards; returns rows and tokens of each split."""
    folder, seq_len = run.paths.tokens(run.family) / objective, run.params.prepare.decoder.seq_len
    dropped = {"too_long": sum(output.result["too_long"] for output in outputs)} if objective == "tune" else {}
    pictures = next((output.result["pictures"] for output in outputs if output.result.get("pictures")), None)
    counts = join_rows(folder, SPLITS, outputs, with_pictures=pictures is not None)
    if not counts["train_learned"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
        raise InputError(
            f"params.yaml: {section_of(run, objective)}.dataset: nothing to learn in its rows of {seq_len} tokens"
            f" ({reasons or 'it is empty'}); add rows or raise prepare.decoder.seq_len"
        )
    write_rows_file(folder, tokenizer, seq_len, {split: counts[f"{split}_rows"] for split in SPLITS}, pictures)
    return counts | dropped
