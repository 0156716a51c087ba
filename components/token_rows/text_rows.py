"""Rows of the encoder and the encoder-decoder: `prepare` for the families that read text without turns.

Texts, sources and targets longer than a row are cut, and counted per split. The encoder is pretrained on pairs of
passages (BERT, arXiv 1810.04805, section 3.1 and appendix A.2): half of the passages B follow A, the others come from
another document; the sentences that would have followed begin a later pair.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from tokenizers import Encoding

from components.config.params import InputError
from components.datasets.formats import Row, batched, read_rows, shards, write_json
from components.runtime.stage import StageRun
from components.token_rows.variable_length import NO_PAIR, SPECIAL, VariableLengthWriter
from components.tokenization.text_tokenizer import CLS, SEP, TextTokenizer

BATCH = 512
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
    tokenizer = TextTokenizer.load(run.paths.tokenizer(run.family))
    seq_len = run.params.prepare.encoder.seq_len
    counts = {"pretrain": _sentence_pairs(run, tokenizer, documents, seq_len)}
    run.progress(1, 2, rows=counts["pretrain"]["train_rows"])
    counts["classifier"] = _labelled(run, TextTokenizer.load(tuned_tokenizer(run)), labelled, seq_len)
    run.progress(2, 2, rows=counts["classifier"]["train_rows"])
    return counts


def prepare_encoder_decoder(run: StageRun, documents: Folders, text_pairs: Folders) -> dict[str, Counts]:
    """Write `pretrain` (running text) and `summarizer` (sources and targets); return the counts of each."""
    tokenizer = TextTokenizer.load(run.paths.tokenizer(run.family))
    counts = {"pretrain": _chunks(run, tokenizer, documents)}
    run.progress(1, 2, rows=counts["pretrain"]["train_rows"])
    counts["summarizer"] = _text_pairs(run, TextTokenizer.load(tuned_tokenizer(run)), text_pairs)
    run.progress(2, 2, rows=counts["summarizer"]["train_rows"])
    return counts


def tuned_tokenizer(run: StageRun) -> Path:
    """The folder of the tokenizer for fine-tuning: of an imported base, or the family's own."""
    imported = run.paths.imported(run.family)
    return imported if (imported / "config.json").is_file() else run.paths.tokenizer(run.family)


def _sentence_pairs(run: StageRun, tokenizer: TextTokenizer, folders: Folders, seq_len: int) -> Counts:
    tokens, numbers = {"ids": _id_type(tokenizer), "ids.segments": "u1", "ids.starts": "u1"}, {"random": "u1"}
    rows = _Rows(run, tokenizer, "pretrain", tokens, numbers)
    cls, sep = tokenizer.id_of(CLS), tokenizer.id_of(SEP)
    for split in ("train", "test"):
        writer = rows.writer(split)
        random = np.random.default_rng([run.params.seed, split == "test"])
        documents = chain.from_iterable(_split(tokenizer, folder, split) for folder in folders)
        for pair in pairs(documents, seq_len - 3, random):
            first = [(cls, SPECIAL), *pair.first, (sep, SPECIAL)]
            second = [*pair.second, (sep, SPECIAL)] if pair.second else []
            writer.add(
                ids=[number for number, _ in first + second],
                ids__starts=[start for _, start in first + second],
                ids__segments=[0] * len(first) + [1] * len(second),
                random=int(pair.random) if second else NO_PAIR,
            )
    special = {"cls": cls, "sep": sep, "mask": tokenizer.id_of("[MASK]")}
    regular = {"first": tokenizer.regular.start, "last": tokenizer.regular.stop - 1}
    return rows.close(seq_len, {}, special, regular=regular)


def _split(tokenizer: TextTokenizer, folder: Path, split: str) -> Iterator[list[Sentence]]:
    """The sentences of each document, in tokens."""
    texts = (sentences(row["text"]) for row in read_rows(folder, split, ["text"]))
    for batch in batched(texts, BATCH):
        encoded = iter(tokenizer.encodings([sentence for document in batch for sentence in document]))
        for document in batch:
            yield [_tokens(next(encoded)) for _ in document]


def _tokens(encoding: Encoding) -> Sentence:
    words = encoding.word_ids
    starts = (int(not index or words[index - 1] != word) for index, word in enumerate(words))
    return list(zip(encoding.ids, starts, strict=True))


def _labelled(run: StageRun, tokenizer: TextTokenizer, folders: Folders, seq_len: int) -> Counts:
    labels = sorted({row["label"] for folder in folders for row in read_rows(folder, "train", ["label"])})
    numbers = {label: number for number, label in enumerate(labels)}
    rows = _Rows(run, tokenizer, "classifier", {"ids": _id_type(tokenizer)}, {"label": "u2"})
    cut: Counts = {}
    end = tokenizer.id_of(SEP)
    for split in _splits(folders):
        writer = rows.writer(split)
        for batch in _batches(folders, split, ["id", "text", "label"]):
            for row, ids in zip(batch, tokenizer.encode_batch([each["text"] for each in batch], True), strict=True):
                if row["label"] not in numbers:
                    raise InputError(
                        f"params.yaml: classifier.dataset: label {row['label']!r} of row {row['id']} ({split}) has no"
                        " row to train on; add rows with it"
                    )
                writer.add(ids=_shortened(ids, seq_len, end, cut, f"{split}_truncated"), label=numbers[row["label"]])
    return rows.close(seq_len, cut, {}, labels=labels)


def _chunks(run: StageRun, tokenizer: TextTokenizer, folders: Folders) -> Counts:
    seq_len = run.params.prepare.encoder_decoder.seq_len
    rows = _Rows(run, tokenizer, "pretrain", {"ids": _id_type(tokenizer)}, {})
    for split in ("train", "test"):
        writer, waiting = rows.writer(split), list[int]()
        for batch in _batches(folders, split, ["text"]):
            for ids in tokenizer.encode_batch([row["text"] for row in batch], True):
                waiting += ids
            for start in range(0, len(waiting) - seq_len + 1, seq_len):
                writer.add(ids=waiting[start : start + seq_len])
            waiting = waiting[len(waiting) // seq_len * seq_len :]
    return rows.close(seq_len, {}, {"end": tokenizer.id_of("</s>")}, sentinels=tokenizer.sentinels)


def _text_pairs(run: StageRun, tokenizer: TextTokenizer, folders: Folders) -> Counts:
    config, end = run.params.prepare.encoder_decoder, tokenizer.id_of("</s>")
    kind = _id_type(tokenizer)
    rows = _Rows(run, tokenizer, "summarizer", {"source": kind, "target": kind}, {})
    cut: Counts = {}
    for split in _splits(folders):
        writer = rows.writer(split)
        for batch in _batches(folders, split, ["source", "target"]):
            sources = tokenizer.encode_batch([row["source"] for row in batch], True)
            targets = tokenizer.encode_batch([row["target"] for row in batch], True)
            for source, target in zip(sources, targets, strict=True):
                writer.add(
                    source=_shortened(source, config.seq_len, end, cut, f"{split}_sources_truncated"),
                    target=_shortened(target, config.target_len, end, cut, f"{split}_targets_truncated"),
                )
    return rows.close(config.seq_len, cut, {"end": end}, target_len=config.target_len)


def section_of(run: StageRun, objective: str) -> str:
    """The section of params.yaml that names the datasets of an objective's rows."""
    return f"pretrain.{run.family}" if objective == "pretrain" else objective


def _shortened(ids: list[int], limit: int, end: int, cut: Counts, name: str) -> list[int]:
    """The ids, or their beginning with the token that ends a text; `cut` counts it."""
    cut.setdefault(name, 0)
    if len(ids) <= limit:
        return ids
    cut[name] += 1
    return [*ids[: limit - 1], end]


def _splits(folders: Folders) -> list[str]:
    return ["train", *(name for name in ("validation", "test") if any(shards(folder, name) for folder in folders))]


def _batches(folders: Folders, split: str, columns: list[str]) -> Iterator[list[Row]]:
    return batched(chain.from_iterable(read_rows(folder, split, columns) for folder in folders), BATCH)


def _id_type(tokenizer: TextTokenizer) -> str:
    return "u2" if tokenizer.vocab_size <= 2**16 else "u4"


class _Rows:
    """The writers of one objective's folder and, at the end, its `rows.json`."""

    def __init__(
        self,
        run: StageRun,
        tokenizer: TextTokenizer,
        objective: str,
        tokens: Mapping[str, str],
        numbers: Mapping[str, str],
    ) -> None:
        self._folder = run.paths.tokens(run.family) / objective
        self._section = section_of(run, objective)
        self._tokenizer, self._tokens, self._numbers = tokenizer, tokens, numbers
        self._writers: dict[str, VariableLengthWriter] = {}

    def writer(self, split: str) -> VariableLengthWriter:
        self._writers[split] = VariableLengthWriter(self._folder, split, self._tokens, self._numbers)
        return self._writers[split]

    def close(self, seq_len: int, counts: Counts, special: Mapping[str, int], **info: object) -> Counts:
        """Write `rows.json`; return rows and tokens of each split, and `counts`."""
        for writer in self._writers.values():
            writer.close()
        if not self._writers["train"].rows:
            raise InputError(f"params.yaml: {self._section}.dataset: not one row of {seq_len} tokens; add rows")
        info |= {
            "special": {"pad": self._tokenizer.pad_id, **special},
            "seq_len": seq_len,
            "vocab_size": self._tokenizer.vocab_size,
            "rows": {split: writer.rows for split, writer in self._writers.items()},
            "fields": {**self._tokens, **self._numbers},
            "ragged": [name for name in self._tokens if "." not in name],
            "truncated": counts,
        }
        write_json(self._folder / "rows.json", info)
        sizes = {
            f"{split}_{name}": getattr(writer, name)
            for split, writer in self._writers.items()
            for name in ("rows", "tokens")
        }
        return sizes | counts


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
        left = [sentence for sentence in document if sentence]
        while left:
            pair, used = _pair(left, buffer, _target(tokens, random), random)
            yield _cut(pair, tokens)
            left = left[used:]
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
    """The next pair of a document, and the number of its sentences in the pair."""
    count = _fitting(left, target)
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


def _fitting(left: list[Sentence], target: int) -> int:
    """The number of sentences that fill a pair; the last one may exceed it."""
    length = 0
    for count, sentence in enumerate(left, 1):
        length += len(sentence)
        if length >= target:
            return count
    return len(left)


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
