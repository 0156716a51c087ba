"""Stage: learn a family's tokenizer from a sample of the training rows, which is taken shard by shard."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path

from components.config.model_settings import Family
from components.config.params import InputError
from components.datasets.formats import (
    SCHEMAS,
    DatasetWriter,
    Kind,
    Row,
    batched,
    in_test_split,
    read_info,
    read_rows,
    read_shard,
    shards,
    write_json,
)
from components.runtime.shards import Result, Shard, run_shards
from components.runtime.stage import StageRun
from components.tokenization import chat_tokenizer as bpe
from components.tokenization import text_tokenizer
from components.tokenization.hf_tokenizer import load_chat_tokenizer
from components.tokenization.text_tokenizer import TextTokenizer

BATCH = 64
"""Texts encoded at once: an encoding is a hundred times as large as its ids."""


def train_tokenizer(run: StageRun) -> None:
    """Write `data/tokenizer/FAMILY`.

    Raises: InputError when the datasets hold no text.
    """
    config = run.params.train_tokenizer.of(run.family)
    documents, texts = _sample(run, config.max_documents)
    if not any(texts()):
        raise InputError('data/collected: no text to train a tokenizer on; run "loopwright data list"')
    run.progress(0, 1, documents=documents)
    tokenizer = _train(run.family, texts(), config.vocab_size, run.paths.tokenizer(run.family))
    size = tokens = 0
    for batch in batched(texts(), BATCH):
        size += sum(len(text.encode()) for text in batch)
        tokens += sum(map(len, tokenizer.encode_batch(batch)))
    metrics = {"vocab_size": tokenizer.vocab_size, "documents": documents, "bytes_per_token": round(size / tokens, 4)}
    write_json(run.paths.metrics / f"{run.name}.json", metrics)
    run.tracker.metrics({key: float(value) for key, value in metrics.items()})
    run.progress(1, 1, **metrics)


def _train(family: Family, texts: Iterable[str], vocab_size: int, folder: Path) -> bpe.ChatTokenizer | TextTokenizer:
    """Train the family's tokenizer, save and load it."""
    if family == "decoder":
        bpe.save(bpe.train(texts, vocab_size), folder)
        return load_chat_tokenizer(folder)
    train = text_tokenizer.train_encoder if family == "encoder" else text_tokenizer.train_encoder_decoder
    text_tokenizer.save(train(texts, vocab_size), folder)
    return TextTokenizer.load(folder)


def _sample(run: StageRun, limit: int) -> tuple[int, Callable[[], Iterator[str]]]:
    """At most `limit` training texts of each dataset, a seeded sample: their number, and passes over them."""
    work: list[Shard] = []
    ends: list[int] = []  # of each dataset among the shards
    for name in run.params.datasets_of(run.family):
        folder = run.paths.collected / name
        info = read_info(folder)
        share = min(1.0, 1.2 * limit / max(1, info.rows.get("train", 0)))
        values = {"kind": info.kind, "share": share, "limit": limit, "seed": run.params.seed}
        work += [
            Shard(f"{name}-{file.stem}", sample_texts, [file], {**values, "file": str(file)})
            for file in shards(folder, "train")
        ]
        ends.append(len(work))
    outputs = run_shards(run, work)
    datasets = [outputs[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def texts() -> Iterator[str]:
        for parts in datasets:
            rows = chain.from_iterable(read_rows(part.folder, "train", ["text"]) for part in parts)
            yield from (row["text"] for row in islice(rows, limit))

    return sum(min(limit, sum(part.result["texts"] for part in parts)) for parts in datasets), texts


def sample_texts(out: Path, file: str, kind: Kind, share: float, limit: int, seed: int) -> Result:
    """Write, as documents, a share of the texts of a Parquet file: the first `limit` of those that the seed chooses."""
    rows = read_shard(Path(file), [name for name in SCHEMAS[kind].names if name != "images"])
    chosen = (row for row in rows if in_test_split(row["id"], share, seed))
    with DatasetWriter(out, out.name, "documents") as writer:
        for row in islice(chosen, limit):
            writer.write("train", {"text": _text(row)})
    return {"texts": writer.info.rows.get("train", 0)}


def _text(row: Row) -> str:
    """The text of a row as in training, a space before each turn."""
    if "text" in row:
        return str(row["text"])
    if "target" in row:
        return f"{row['source']}\n{row['target']}"
    turns = []
    for message in row["messages"]:
        turns.append(" " + (message["content"] or ""))
        for call in message["tool_calls"] or []:
            arguments = json.loads(call["function"]["arguments"])
            turns += [" " + call["function"]["name"], *(f" {key} {value}" for key, value in arguments.items())]
    return "\n".join(turns)
