"""Rows of the encoder and the encoder-decoder: what `prepare` does for the families that read text without turns.

Nothing is cut in silence: texts, sources and targets longer than a row are counted per split.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path

import numpy as np
from tokenizers import Encoding

from components.config.params import InputError
from components.datasets.formats import Row, read_rows, shards, write_json
from components.runtime.stage import StageRun
from components.token_rows.sentence_pairs import Sentence, pairs, sentences
from components.token_rows.variable_length import NO_PAIR, SPECIAL, VariableLengthWriter
from components.tokenization.text_tokenizer import CLS, SEP, TextTokenizer

BATCH = 512
Counts = dict[str, int]
Folders = list[Path]


def prepare_encoder(run: StageRun, documents: Folders, labelled: Folders) -> dict[str, Counts]:
    """Write `pretrain` (pairs of sentences) and `classifier` (texts and labels); what there is of each."""
    tokenizer = TextTokenizer.load(run.paths.tokenizer(run.family))
    seq_len = run.params.prepare.encoder.seq_len
    found = {"pretrain": _sentence_pairs(run, tokenizer, documents, seq_len)}
    run.progress(1, 2, rows=found["pretrain"]["train_rows"])
    found["classifier"] = _labelled(run, TextTokenizer.load(tuned_tokenizer(run)), labelled, seq_len)
    run.progress(2, 2, rows=found["classifier"]["train_rows"])
    return found


def prepare_encoder_decoder(run: StageRun, documents: Folders, text_pairs: Folders) -> dict[str, Counts]:
    """Write `pretrain` (running text) and `summarizer` (sources and targets); what there is of each."""
    tokenizer = TextTokenizer.load(run.paths.tokenizer(run.family))
    found = {"pretrain": _chunks(run, tokenizer, documents)}
    run.progress(1, 2, rows=found["pretrain"]["train_rows"])
    found["summarizer"] = _text_pairs(run, TextTokenizer.load(tuned_tokenizer(run)), text_pairs)
    run.progress(2, 2, rows=found["summarizer"]["train_rows"])
    return found


def tuned_tokenizer(run: StageRun) -> Path:
    """The folder with the tokenizer of the model that is fine-tuned: an imported one, or the family's own."""
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
    return rows.close(seq_len, {"special": special, "regular": regular}, {})


def _split(tokenizer: TextTokenizer, folder: Path, split: str) -> Iterator[list[Sentence]]:
    """The sentences of each document, in tokens."""
    texts = (sentences(row["text"]) for row in read_rows(folder, split, ["text"]))
    while batch := list(islice(texts, BATCH)):
        encoded = iter(tokenizer.encodings([one for document in batch for one in document]))
        for document in batch:
            yield [_tokens(next(encoded)) for _ in document]


def _tokens(encoding: Encoding) -> Sentence:
    words = encoding.word_ids
    starts = (int(not place or words[place - 1] != word) for place, word in enumerate(words))
    return list(zip(encoding.ids, starts, strict=True))


def _labelled(run: StageRun, tokenizer: TextTokenizer, folders: Folders, seq_len: int) -> Counts:
    labels = sorted({row["label"] for folder in folders for row in read_rows(folder, "train", ["label"])})
    place = {label: number for number, label in enumerate(labels)}
    rows = _Rows(run, tokenizer, "classifier", {"ids": _id_type(tokenizer)}, {"label": "u2"})
    cut: Counts = {}
    end = tokenizer.id_of(SEP)
    for split in _splits(folders):
        writer = rows.writer(split)
        for batch in _batches(folders, split, ["id", "text", "label"]):
            for row, ids in zip(batch, tokenizer.encode_batch([one["text"] for one in batch], True), strict=True):
                if row["label"] not in place:
                    raise InputError(
                        f"params.yaml: classifier.dataset: label {row['label']!r} of row {row['id']} ({split}) has no"
                        " row to learn from; add rows with it"
                    )
                writer.add(ids=_shortened(ids, seq_len, end, cut, f"{split}_truncated"), label=place[row["label"]])
    return rows.close(seq_len, {"labels": labels}, cut)


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
    sentinels = {"sentinels": tokenizer.sentinels}
    return rows.close(seq_len, {"special": {"end": tokenizer.id_of("</s>")}, **sentinels}, {})


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
    facts = {"special": {"end": end}, "target_len": config.target_len}
    return rows.close(config.seq_len, facts, cut)


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
    rows: Iterable[Row] = chain.from_iterable(read_rows(folder, split, columns) for folder in folders)
    taken = iter(rows)
    while batch := list(islice(taken, BATCH)):
        yield batch


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

    def close(self, seq_len: int, facts: Mapping[str, object], counts: Counts) -> Counts:
        """Write `rows.json`; rows and tokens of each split, and what was counted on the way."""
        for writer in self._writers.values():
            writer.close()
        if not self._writers["train"].rows:
            raise InputError(f"params.yaml: {self._section}.dataset: not one row of {seq_len} tokens; add rows")
        special = {"pad": self._tokenizer.pad_id, **_mapping(facts.get("special"))}
        info = {
            **facts,
            "special": special,
            "seq_len": seq_len,
            "vocab_size": self._tokenizer.vocab_size,
            "rows": {split: writer.rows for split, writer in self._writers.items()},
            "fields": {**self._tokens, **self._numbers},
            "ragged": [name for name in self._tokens if "." not in name],
            "truncated": counts,
        }
        write_json(self._folder / "rows.json", info)
        found = {f"{split}_{name}": getattr(one, name) for split, one in self._writers.items() for name in _COUNTED}
        return found | counts


_COUNTED = ("rows", "tokens")


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}
