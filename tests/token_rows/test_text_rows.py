"""Rows of encoder and encoder-decoder: every token is there once, in order, and cut texts are counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from components.config.params import InputError, load_params
from components.config.paths import Paths
from components.datasets.formats import DatasetWriter
from components.runtime.stage import StageRun
from components.token_rows.batches import IGNORED
from components.token_rows.prepare import prepare
from components.token_rows.variable_length import Chunks, LabelledRows, SentencePairs, TextPairRows, VariableLengthRows
from components.tokenization import text_tokenizer
from components.tokenization.text_tokenizer import TextTokenizer

ROOT = Path(__file__).parents[2]
TEXTS = [
    f"Sentence one of {n}. The second of it says {n + 1}. And a third one ends {n}.\nA line of {n}." for n in range(60)
]
LONG = " ".join(f"number {number}" for number in range(120))


class Silent:
    """A tracker that keeps nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


NewRun = Callable[[str], StageRun]


@pytest.fixture
def prepared(tmp_path: Path) -> NewRun:
    """Rows of a family, made of documents, labelled texts and pairs of texts."""
    paths = Paths(tmp_path)
    with DatasetWriter(paths.collected / "docs", "docs", "documents") as writer:
        for number, text in enumerate(TEXTS):
            writer.write("test" if number % 6 == 0 else "train", {"id": str(number), "text": text, "source": "here"})
    with DatasetWriter(paths.collected / "moods", "moods", "labelled_texts") as writer:
        for number, split in enumerate(("train", "train", "train", "validation", "test")):
            row = {"id": str(number), "text": LONG if number == 2 else f"text {number}", "label": "ab"[number % 2]}
            writer.write(split, row)  # type: ignore[arg-type]
    with DatasetWriter(paths.collected / "pairs", "pairs", "text_pairs") as writer:
        for number, split in enumerate(("train", "train", "test")):
            row = {"id": str(number), "source": LONG if number else "def f(): pass", "target": f"Do {number}."}
            writer.write(split, row)  # type: ignore[arg-type]
    names = {
        "pretrain.decoder.dataset": "docs",
        "pretrain.encoder.dataset": ["docs", "moods"],
        "classifier.dataset": "moods",
    }
    names |= {"pretrain.encoder_decoder.dataset": "docs", "summarizer.dataset": "pairs"}
    params = load_params(ROOT / "params.yaml", {"scale": "smoke", **names})
    text_tokenizer.save(text_tokenizer.train_encoder(TEXTS, 400), paths.tokenizer("encoder"))
    text_tokenizer.save(text_tokenizer.train_encoder_decoder(TEXTS, 500), paths.tokenizer("encoder_decoder"))

    def run(family: str) -> StageRun:
        made = StageRun(f"prepare@{family}", params, paths, tmp_path / "state", Silent())
        prepare(made)
        return made

    return run


def metrics(run: StageRun) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((run.paths.metrics / f"{run.name}.json").read_text())
    return read


def test_sentence_pairs_are_two_segments_that_follow_or_do_not(prepared: NewRun) -> None:
    run = prepared("encoder")
    rows = SentencePairs(run.paths.tokens("encoder") / "pretrain", "train")
    tokenizer = TextTokenizer.load(run.paths.tokenizer("encoder"))
    cls, sep = tokenizer.id_of("[CLS]"), tokenizer.id_of("[SEP]")
    batch = rows.batch(np.arange(len(rows)))
    ids, mask, segments = (batch[name] for name in ("input_ids", "attention_mask", "token_type_ids"))
    assert ids.shape[1] <= rows.seq_len
    assert (ids[:, 0] == cls).all()
    follows = batch["next_sentence_labels"]
    parted = follows != IGNORED
    assert ((ids == sep).sum(1) == 1 + parted.long()).all()
    assert 0.25 < follows[parted].float().mean() < 0.75
    assert ((segments == 1).any(1) == parted).all()
    assert (ids[mask == 0] == tokenizer.pad_id).all()
    texts = {"".join(text.lower().split()) for text in [*TEXTS, LONG]}
    for row, length, label in zip(ids, mask.sum(1), follows, strict=True):
        first, _, second = " ".join(map(str, row[1 : length - 1].tolist())).partition(f" {sep} ")
        told = "".join(tokenizer.decode(map(int, part.split())).replace(" ", "") for part in (first, second))
        if label == 0:
            assert any(told in text for text in texts), told
        elif label == 1:
            assert not any(told in text for text in texts), told


def test_words_number_tokens_that_belong_together(prepared: NewRun) -> None:
    run = prepared("encoder")
    rows = SentencePairs(run.paths.tokens("encoder") / "pretrain", "train")
    tokenizer = TextTokenizer.load(run.paths.tokenizer("encoder"))
    for row in range(10):
        ids, words = rows.ids(row), rows.words(row)
        assert ((words == -1) == np.isin(ids, tokenizer.encode_batch([""], special=True)[0])).all()
        told = [tokenizer.decode(ids[words == word]) for word in np.unique(words[words >= 0])]
        assert all(len(word.split()) <= 1 for word in told), told
        assert (np.diff(words[words >= 0]) >= 0).all()


def test_labelled_rows_are_padded_to_the_longest_and_cut_ones_counted(prepared: NewRun) -> None:
    run = prepared("encoder")
    folder = run.paths.tokens("encoder") / "classifier"
    rows = LabelledRows(folder, "train")
    tokenizer = TextTokenizer.load(run.paths.tokenizer("encoder"))
    assert rows.labels == ["a", "b"]
    batch = rows.batch(np.array([1, 0]))
    alone = tokenizer.encode_batch(["text 1"], special=True)[0]
    assert batch["input_ids"].shape == (2, max(map(len, tokenizer.encode_batch(["text 0", "text 1"], special=True))))
    assert batch["input_ids"][0, : len(alone)].tolist() == alone
    assert batch["labels"].tolist() == [1, 0]
    assert rows.lengths().tolist()[2] == rows.seq_len == 64
    assert rows.batch(np.array([2]))["input_ids"][0, -1] == tokenizer.id_of("[SEP]")
    counted = metrics(run)["classifier"]
    assert [counted[f"{split}_truncated"] for split in ("train", "validation", "test")] == [1, 0, 0]
    assert [len(LabelledRows(folder, split)) for split in ("train", "validation", "test")] == [3, 1, 1]


def test_pieces_of_text_hold_every_token_once_in_order(prepared: NewRun) -> None:
    run = prepared("encoder_decoder")
    rows = Chunks(run.paths.tokens("encoder_decoder") / "pretrain", "train")
    tokenizer = TextTokenizer.load(run.paths.tokenizer("encoder_decoder"))
    told = [text for number, text in enumerate(TEXTS) if number % 6]
    expected = [number for ids in tokenizer.encode_batch(told, special=True) for number in ids]
    ids = rows.batch(np.arange(len(rows)))["input_ids"]
    assert ids.shape[1] == rows.seq_len
    assert ids.flatten().tolist() == expected[: ids.numel()]
    assert len(expected) - ids.numel() < rows.seq_len
    assert rows.info["sentinels"] == tokenizer.sentinels


def test_the_decoder_reads_the_target_shifted_right(prepared: NewRun) -> None:
    run = prepared("encoder_decoder")
    rows = TextPairRows(run.paths.tokens("encoder_decoder") / "summarizer", "train")
    tokenizer = TextTokenizer.load(run.paths.tokenizer("encoder_decoder"))
    batch = rows.batch(np.array([0, 1]))
    target = tokenizer.encode_batch(["Do 0."], special=True)[0]
    assert batch["labels"][0, : len(target)].tolist() == target
    assert batch["decoder_input_ids"][0, : len(target)].tolist() == [tokenizer.pad_id, *target[:-1]]
    assert (batch["labels"][batch["decoder_attention_mask"] == 0] == IGNORED).all()
    assert batch["attention_mask"].sum(1).tolist()[1] == rows.seq_len, "cut"
    assert metrics(run)["summarizer"]["train_sources_truncated"] == 1
    assert metrics(run)["summarizer"]["test_sources_truncated"] == 1


def test_preparing_twice_gives_the_same_bytes(prepared: NewRun) -> None:
    folder = prepared("encoder").paths.tokens("encoder")
    first = {path: path.read_bytes() for path in folder.rglob("*.*")}
    prepared("encoder")
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == first


def test_missing_and_torn_rows_are_reported(prepared: NewRun, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r'no token rows; run "loopwright run --until prepare"'):
        VariableLengthRows(tmp_path, "train")
    folder = prepared("encoder").paths.tokens("encoder") / "classifier"
    ids = folder / "train.ids.bin"
    ids.write_bytes(ids.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"rows of train are incomplete; run \"loopwright run --until prepare\""):
        LabelledRows(folder, "train")
    assert torch.is_tensor(LabelledRows(folder, "test").batch(np.array([0]))["labels"])
