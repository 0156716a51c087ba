"""Rows of the encoder and the encoder-decoder: `prepare` for the families that read text without turns.

Texts, sources and targets longer than a row are cut, and counted per split. The encoder is pretrained on pairs of
passages (BERT, arXiv 1810.04805, section 3.1 and appendix A.2): half of the passages B follow A, the others come from
another document; the sentences that would have followed begin a later pair.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from tokenizers import Encoding

from components.config.params import InputError
from components.datasets.formats import ROWS_PER_SHARD, Row, batched, read_rows, read_shard, shards, write_json
from components.runtime.shards import Output, Result, Shard, Work, run_shards
from components.runtime.stage import StageRun
from components.token_rows.variable_length_writer import (
    NO_PAIR,
    SPECIAL,
    VariableLengthWriter,
    join_variable_length,
)
from components.tokenization.text_tokenizer import CLS, MASK, SEP, TextTokenizer

BATCH = 512
SPLITS = ("train", "test")
"""Of documents."""
Counts = dict[str, int]
Folders = list[Path]
BUFFERED_DOCUMENTS = 512
"""Documents that passages are drawn from."""
SHORT_SHARE = 0.1
"""Share of pairs shorter than a row, for later texts are short too (appendix A.2)."""
MIN_TOKENS = 8
"""Least tokens of a passage."""
_SENTENCE = re.compile(r"(?<=[.!?:])\s+(?=\S)|\n+")

Sentence = list[tuple[int, int]]
"""(id, whether it starts a word) of each token."""


def prepare_encoder(run: StageRun, documents: Folders, labelled: Folders) -> dict[str, Counts]:
    """Write `pretrain` (pairs of sentences) and `classifier` (texts and labels); return the counts of each."""
    seq_len, own, tuned = run.params.prepare.encoder.seq_len, run.paths.tokenizer(run.family), tuned_tokenizer(run)
    labels = sorted({row["label"] for folder in labelled for row in read_rows(folder, "train", ["label"])})
    pretrain = _shards(documents, SPLITS, tokenize_sentences, own, seed=run.params.seed, seq_len=seq_len)
    tune = _shards(labelled, _splits(labelled), tokenize_labelled, tuned, labels=labels, seq_len=seq_len)
    outputs = run_shards(run, [*pretrain, *tune])
    tokenizer = TextTokenizer.load(own)
    special = {name: tokenizer.id_of(token) for name, token in (("cls", CLS), ("sep", SEP), ("mask", MASK))}
    regular = {"first": tokenizer.regular.start, "last": tokenizer.regular.stop - 1}
    documents_rows = _Objective(run, "pretrain", tokenizer, SPLITS, outputs[: len(pretrain)])
    labelled_rows = _Objective(
        run, "classifier", TextTokenizer.load(tuned), _splits(labelled), outputs[len(pretrain) :]
    )
    return {
        "pretrain": documents_rows.join(_PAIR_FIELDS, seq_len, special, regular=regular),
        "classifier": labelled_rows.join(_LABELLED_FIELDS, seq_len, {}, labels=labels),
    }


def prepare_encoder_decoder(run: StageRun, documents: Folders, text_pairs: Folders) -> dict[str, Counts]:
    """Write `pretrain` (running text) and `summarizer` (sources and targets); return the counts of each."""
    config, own, tuned = run.params.prepare.encoder_decoder, run.paths.tokenizer(run.family), tuned_tokenizer(run)
    lengths = {"seq_len": config.seq_len, "target_len": config.target_len}
    pretrain = _shards(documents, SPLITS, tokenize_chunks, own, seq_len=config.seq_len)
    tune = _shards(text_pairs, _splits(text_pairs), tokenize_pairs, tuned, **lengths)
    outputs = run_shards(run, [*pretrain, *tune])
    tokenizer, of_pairs = TextTokenizer.load(own), TextTokenizer.load(tuned)
    ends = [{"end": each.id_of("</s>")} for each in (tokenizer, of_pairs)]
    chunks = _Objective(run, "pretrain", tokenizer, SPLITS, outputs[: len(pretrain)])
    sides = _Objective(run, "summarizer", of_pairs, _splits(text_pairs), outputs[len(pretrain) :])
    return {
        "pretrain": chunks.join(_CHUNK_FIELDS, config.seq_len, ends[0], sentinels=tokenizer.sentinels),
        "summarizer": sides.join(_SIDES_FIELDS, config.seq_len, ends[1], target_len=config.target_len),
    }


def tuned_tokenizer(run: StageRun) -> Path:
    """The folder of the tokenizer for fine-tuning: of an imported base, or the family's own."""
    imported = run.paths.imported(run.family)
    return imported if (imported / "config.json").is_file() else run.paths.tokenizer(run.family)


def section_of(run: StageRun, objective: str) -> str:
    """The section of params.yaml that names the datasets of an objective's rows."""
    return f"pretrain.{run.family}" if objective == "pretrain" else objective


def _splits(folders: Folders) -> list[str]:
    return ["train", *(name for name in ("validation", "test") if any(shards(folder, name) for folder in folders))]


def _shards(folders: Folders, splits: Sequence[str], work: Work, tokenizer: Path, **arguments: Any) -> list[Shard]:
    """Shards of these splits, numbered in each: a Parquet file each, or as many small ones as are of its size."""
    common = {**arguments, "tokenizer": str(tokenizer)}
    return [
        Shard(
            f"{work.__name__}-{split}-{number:05d}",
            work,
            [*files, tokenizer],
            {**common, "split": split, "number": number, "files": [str(file) for file in files]},
        )
        for split in splits
        for number, files in enumerate(_groups([file for folder in folders for file in shards(folder, split)]))
    ]


def _groups(files: Sequence[Path]) -> list[list[Path]]:
    groups: list[list[Path]] = []
    rows = 0
    for file in files:
        count = pq.read_metadata(file).num_rows
        if not groups or rows + count > ROWS_PER_SHARD:
            groups.append([])
            rows = 0
        groups[-1].append(file)
        rows += count
    return groups


def _rows(files: Sequence[str], columns: list[str]) -> Iterator[Row]:
    return chain.from_iterable(read_shard(Path(file), columns) for file in files)


@dataclass(frozen=True)
class _Fields:
    """The fields of rows: types of those with a number per token, and of those with one per row."""

    ids: tuple[str, ...]
    marks: tuple[str, ...] = ()
    """Small numbers of tokens."""
    numbers: Mapping[str, str] = field(default_factory=dict)

    def tokens(self, tokenizer: TextTokenizer) -> dict[str, str]:
        kind = "u2" if tokenizer.vocab_size <= 2**16 else "u4"
        return {**dict.fromkeys(self.ids, kind), **dict.fromkeys(self.marks, "u1")}

    def writer(self, out: Path, split: str, tokenizer: TextTokenizer) -> VariableLengthWriter:
        return VariableLengthWriter(out, split, self.tokens(tokenizer), self.numbers)


_PAIR_FIELDS = _Fields(("ids",), ("ids.segments", "ids.starts"), {"random": "u1"})
_LABELLED_FIELDS = _Fields(("ids",), numbers={"label": "u2"})
_CHUNK_FIELDS = _Fields(("ids",))
_SIDES_FIELDS = _Fields(("source", "target"))


def tokenize_sentences(
    out: Path, tokenizer: str, files: Sequence[str], split: str, number: int, seed: int, seq_len: int
) -> Result:
    """Write pairs of sentences of a Parquet file of documents."""
    loaded = TextTokenizer.load(Path(tokenizer))
    cls, sep = loaded.id_of(CLS), loaded.id_of(SEP)
    writer = _PAIR_FIELDS.writer(out, split, loaded)
    random = np.random.default_rng([seed, split == "test", number])
    for pair in pairs(_documents(loaded, files), seq_len - 3, random):
        first = [(cls, SPECIAL), *pair.first, (sep, SPECIAL)]
        second = [*pair.second, (sep, SPECIAL)] if pair.second else []
        writer.add(
            ids=[token for token, _ in first + second],
            ids__starts=[start for _, start in first + second],
            ids__segments=[0] * len(first) + [1] * len(second),
            random=int(pair.random) if second else NO_PAIR,
        )
    return {"splits": {split: writer.close()}}


def _documents(tokenizer: TextTokenizer, files: Sequence[str]) -> Iterator[list[Sentence]]:
    """The sentences of each document, in tokens."""
    texts = (sentences(row["text"]) for row in _rows(files, ["text"]))
    for batch in batched(texts, BATCH):
        encoded = iter(tokenizer.encodings([sentence for document in batch for sentence in document]))
        for document in batch:
            yield [_tokens(next(encoded)) for _ in document]


def _tokens(encoding: Encoding) -> Sentence:
    words = encoding.word_ids
    starts = (int(not index or words[index - 1] != word) for index, word in enumerate(words))
    return list(zip(encoding.ids, starts, strict=True))


def tokenize_labelled(
    out: Path, tokenizer: str, files: Sequence[str], split: str, number: int, labels: Sequence[str], seq_len: int
) -> Result:
    """Write texts and the numbers of their labels.

    Raises: InputError for a label that no row is trained on with.
    """
    loaded = TextTokenizer.load(Path(tokenizer))
    numbers, end = {label: index for index, label in enumerate(labels)}, loaded.id_of(SEP)
    writer = _LABELLED_FIELDS.writer(out, split, loaded)
    cut = {f"{split}_truncated": 0}
    for batch in batched(_rows(files, ["id", "text", "label"]), BATCH):
        for row, ids in zip(batch, loaded.encode_batch([each["text"] for each in batch], True), strict=True):
            if row["label"] not in numbers:
                raise InputError(
                    f"params.yaml: classifier.dataset: label {row['label']!r} of row {row['id']} ({split}) has no"
                    " row to train on; add rows with it"
                )
            writer.add(ids=_shortened(ids, seq_len, end, cut, f"{split}_truncated"), label=numbers[row["label"]])
    return {"splits": {split: writer.close()}, "cut": cut}


def tokenize_chunks(out: Path, tokenizer: str, files: Sequence[str], split: str, number: int, seq_len: int) -> Result:
    """Write the running text of documents in rows of equal length; what is left of the last one is dropped."""
    loaded = TextTokenizer.load(Path(tokenizer))
    writer, waiting = _CHUNK_FIELDS.writer(out, split, loaded), list[int]()
    for batch in batched(_rows(files, ["text"]), BATCH):
        for ids in loaded.encode_batch([row["text"] for row in batch], True):
            waiting += ids
        for start in range(0, len(waiting) - seq_len + 1, seq_len):
            writer.add(ids=waiting[start : start + seq_len])
        waiting = waiting[len(waiting) // seq_len * seq_len :]
    return {"splits": {split: writer.close()}}


def tokenize_pairs(
    out: Path, tokenizer: str, files: Sequence[str], split: str, number: int, seq_len: int, target_len: int
) -> Result:
    """Write sources and targets."""
    loaded = TextTokenizer.load(Path(tokenizer))
    end, writer = loaded.id_of("</s>"), _SIDES_FIELDS.writer(out, split, loaded)
    limits = {"source": seq_len, "target": target_len}
    cut = {f"{split}_{side}s_truncated": 0 for side in limits}
    for batch in batched(_rows(files, ["source", "target"]), BATCH):
        ids = {side: loaded.encode_batch([row[side] for row in batch], True) for side in limits}
        for source, target in zip(ids["source"], ids["target"], strict=True):
            writer.add(
                source=_shortened(source, seq_len, end, cut, f"{split}_sources_truncated"),
                target=_shortened(target, target_len, end, cut, f"{split}_targets_truncated"),
            )
    return {"splits": {split: writer.close()}, "cut": cut}


def _shortened(ids: list[int], limit: int, end: int, cut: Counts, name: str) -> list[int]:
    """The ids, or their beginning with the token that ends a text; `cut` counts it."""
    if len(ids) <= limit:
        return ids
    cut[name] += 1
    return [*ids[: limit - 1], end]


@dataclass(frozen=True)
class _Objective:
    """What the rows of a folder are for."""

    run: StageRun
    name: str
    tokenizer: TextTokenizer
    splits: Sequence[str]
    outputs: Sequence[Output]

    def join(self, fields: _Fields, seq_len: int, special: Mapping[str, int], **info: object) -> Counts:
        """Write the folder from its shards, `rows.json` last; returns rows and tokens of each split, and cut texts."""
        folder, tokens = self.run.paths.tokens(self.run.family) / self.name, fields.tokens(self.tokenizer)
        counts = join_variable_length(folder, self.splits, self.outputs, tokens, fields.numbers)
        if not counts["train_rows"]:
            section = section_of(self.run, self.name)
            raise InputError(f"params.yaml: {section}.dataset: not one row of {seq_len} tokens; add rows")
        cut: Counter[str] = Counter()
        for output in self.outputs:
            cut.update(output.result.get("cut", {}))
        info |= {
            "special": {"pad": self.tokenizer.pad_id, **special},
            "seq_len": seq_len,
            "vocab_size": self.tokenizer.vocab_size,
            "rows": {split: counts[f"{split}_rows"] for split in self.splits},
            "fields": {**tokens, **fields.numbers},
            "ragged": [name for name in tokens if "." not in name],
            "truncated": dict(cut),
        }
        write_json(folder / "rows.json", info)
        return counts | dict(cut)


@dataclass(frozen=True)
class Pair:
    """Two passages, the second empty where a document is too short to split."""

    first: Sentence
    second: Sentence
    random: bool
    """Whether the second is of another document."""


def sentences(text: str) -> list[str]:
    """The sentences and lines of a text."""
    return [piece for piece in _SENTENCE.split(text) if piece.strip()]


def pairs(documents: Iterable[list[Sentence]], tokens: int, random: np.random.Generator) -> Iterator[Pair]:
    """Pairs of at most `tokens` tokens together, document by document; a pair that would be longer is cut."""
    buffer: list[list[Sentence]] = []
    for document in documents:
        filled, start = [sentence for sentence in document if sentence], 0
        while start < len(filled):
            target = _target(tokens, random)
            left = filled[start : start + _fitting(filled, start, target)]
            pair, used = _pair(left, buffer, target, random)
            yield _cut(pair, tokens)
            start += used
        if len(buffer) < BUFFERED_DOCUMENTS:
            buffer.append(document)
        else:
            buffer[int(random.integers(BUFFERED_DOCUMENTS))] = document


def _target(tokens: int, random: np.random.Generator) -> int:
    short = random.random() < SHORT_SHARE and tokens > 2 * MIN_TOKENS
    return int(random.integers(2 * MIN_TOKENS, tokens + 1)) if short else tokens


def _pair(
    left: list[Sentence], buffer: list[list[Sentence]], target: int, random: np.random.Generator
) -> tuple[Pair, int]:
    """The next pair, of the sentences that fill it, and the number of those in the pair."""
    count = len(left)
    if count == 1:
        if len(left[0]) < 2 * MIN_TOKENS:
            return Pair(left[0], [], False), 1
        # A single long sentence is split.
        half = min(len(left[0]), target) // 2
        if buffer and random.random() < 0.5:
            return Pair(left[0][:half], _passage(buffer, target - half, random), True), 1
        return Pair(left[0][:half], left[0][half:], False), 1
    cut = int(random.integers(1, count))
    first = [token for sentence in left[:cut] for token in sentence]
    if buffer and random.random() < 0.5:
        return Pair(first, _passage(buffer, target - len(first), random), True), cut
    return Pair(first, [token for sentence in left[cut:count] for token in sentence], False), count


def _fitting(sentences: list[Sentence], start: int, target: int) -> int:
    """The number of sentences from `start` on that fill a pair; the last one may exceed it."""
    length, stop = 0, start
    while stop < len(sentences) and length < target:
        length += len(sentences[stop])
        stop += 1
    return stop - start


def _passage(buffer: list[list[Sentence]], length: int, random: np.random.Generator) -> Sentence:
    """About `length` tokens, from a random sentence of a random document on."""
    document = buffer[int(random.integers(len(buffer)))]
    start = int(random.integers(len(document))) if document else 0
    passage: Sentence = []
    for sentence in document[start:]:
        passage += sentence
        if len(passage) >= length:
            break
    return passage[: max(length, MIN_TOKENS)]


def _cut(pair: Pair, tokens: int) -> Pair:
    """The pair with its longer passage cut at the end."""
    first, second = len(pair.first), len(pair.second)
    if first + second > tokens:
        limit = max(tokens - second, tokens // 2) if first >= second else first
        first = min(first, limit, tokens if not second else tokens - 1)
        second = min(second, tokens - first)
    return Pair(pair.first[:first], pair.second[:second], pair.random)
