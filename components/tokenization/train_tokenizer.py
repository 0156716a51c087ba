"""Stage: learn a family's tokenizer from a sample of the training rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from components.config.model_settings import Family
from components.config.params import InputError
from components.datasets.formats import SCHEMAS, Row, in_test_split, read_info, read_rows, write_json
from components.runtime.stage import StageRun
from components.tokenization import chat_tokenizer as bpe
from components.tokenization import text_tokenizer
from components.tokenization.hf_tokenizer import load_chat_tokenizer
from components.tokenization.text_tokenizer import TextTokenizer


def train_tokenizer(run: StageRun) -> None:
    """Write `data/tokenizer/FAMILY`.

    Raises: InputError when the datasets hold no text.
    """
    config = run.params.train_tokenizer.of(run.family)
    texts = list(_sample(run, config.max_documents))
    if not any(texts):
        raise InputError('data/collected: no text to train a tokenizer on; run "loopwright data list"')
    run.progress(0, 1, documents=len(texts))
    tokenizer = _train(run.family, texts, config.vocab_size, run.paths.tokenizer(run.family))
    size = sum(len(text.encode()) for text in texts)
    tokens = sum(len(ids) for ids in tokenizer.encode_batch(texts))
    metrics = {"vocab_size": tokenizer.vocab_size, "documents": len(texts), "bytes_per_token": round(size / tokens, 4)}
    write_json(run.paths.metrics / f"{run.name}.json", metrics)
    run.tracker.metrics({key: float(value) for key, value in metrics.items()})
    run.progress(1, 1, **metrics)


def _train(family: Family, texts: list[str], vocab_size: int, folder: Path) -> bpe.ChatTokenizer | TextTokenizer:
    """Train the family's tokenizer, save and load it."""
    if family == "decoder":
        bpe.save(bpe.train(texts, vocab_size), folder)
        return load_chat_tokenizer(folder)
    train = text_tokenizer.train_encoder if family == "encoder" else text_tokenizer.train_encoder_decoder
    text_tokenizer.save(train(texts, vocab_size), folder)
    return TextTokenizer.load(folder)


def _sample(run: StageRun, limit: int) -> Iterator[str]:
    """At most `limit` training texts of each dataset, a seeded sample."""
    for name in run.params.datasets_of(run.family):
        folder = run.paths.collected / name
        info = read_info(folder)
        share = min(1.0, 1.2 * limit / max(1, info.rows.get("train", 0)))
        columns = [name for name in SCHEMAS[info.kind].names if name != "images"]
        rows = read_rows(folder, "train", columns)
        chosen = (row for row in rows if in_test_split(row["id"], share, run.params.seed))
        yield from (_text(row) for row in islice(chosen, limit))


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
