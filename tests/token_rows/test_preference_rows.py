"""Preference rows on disk: their roles, their masks and their units."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from components.config.params import InputError
from components.datasets.formats import Row
from components.token_rows.batches import IGNORED, Batch, TokenRows
from components.token_rows.packing import RowWriter, id_type, pack_rows, write_rows_file
from components.token_rows.preference_rows import AlignRows, PreferenceRows, Role, trimmed, write_preferences
from components.tokenization import chat_tokenizer as bpe
from components.tokenization.chat_tokenizer import ChatTokenizer
from components.tokenization.hf_tokenizer import load_chat_tokenizer

SEQ_LEN = 64
PROMPT = "which way is it?"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    bpe.save(bpe.train([f"{PROMPT} left, right, straight on {n}" for n in range(20)], 320), folder)
    return load_chat_tokenizer(folder)


def row(chosen: str | None, rejected: str | None, prompt: str = PROMPT) -> Row:
    def turn(text: str | None) -> list[Row] | None:
        return None if text is None else [{"role": "assistant", "content": text}]

    asked = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "an earlier answer"},
        {"role": "user", "content": prompt},
    ]
    return {"id": "1", "prompt": asked, "chosen": turn(chosen), "rejected": turn(rejected), "tools": None}


ROWS = [
    row("left", None),
    row("left", "right"),
    row("straight on", "right " * 99),
    row(None, "right"),
    row("straight on", "left"),
]


def learned(batch: Batch, tokenizer: ChatTokenizer) -> list[str]:
    return [tokenizer.decode(labels[labels != IGNORED].tolist()) for labels in batch["labels"]]


@pytest.fixture
def written(tmp_path: Path, tokenizer: ChatTokenizer) -> PreferenceRows:
    counts = write_preferences(tmp_path / "rows", "train", tokenizer, ROWS, SEQ_LEN)
    assert counts == {"pairs": 2, "votes": 2, "too_long": 1}
    return PreferenceRows(tmp_path / "rows", "train")


def test_pairs_come_first_and_each_vote_brings_a_mismatched_row(written: PreferenceRows) -> None:
    pair, lone = [Role.CHOSEN, Role.REJECTED], Role.MISMATCHED
    assert written.roles.tolist() == [*pair, *pair, Role.LIKED, lone, Role.DISLIKED, lone]
    assert written.units() == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_rows_are_as_wide_as_the_longest(written: PreferenceRows) -> None:
    segments = written.batch(np.arange(8))["segment_ids"]
    assert segments.shape[1] == written.tokens.seq_len < SEQ_LEN
    assert segments[:, -1].any()


def test_an_answer_is_in_the_mask_and_its_prompt_never(written: PreferenceRows, tokenizer: ChatTokenizer) -> None:
    batch = written.batch(np.arange(8))
    assert learned(batch, tokenizer) == [
        " left",
        " right",
        " straight on",
        " left",
        " left",
        " right",  # the prompt of the liked answer with the other vote's
        " right",
        " left",
    ]
    ends = [labels[labels != IGNORED][-1].item() for labels in batch["labels"]]
    assert ends == [tokenizer.end_id] * 8, "where an answer ends is learned too"
    assert batch["role"].tolist() == written.roles.tolist()
    assert batch["reference"].tolist() == [0.0] * 8
    for ids, segments in zip(batch["input_ids"], batch["segment_ids"], strict=True):
        assert PROMPT in tokenizer.decode(ids[segments != 0].tolist())


def test_a_single_unpaired_label_has_no_mismatched_row(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    rows = [row(None, "right"), row("left", "right")]
    assert write_preferences(tmp_path, "train", tokenizer, rows, SEQ_LEN)["votes"] == 1
    assert PreferenceRows(tmp_path, "train").roles.tolist() == [Role.CHOSEN, Role.REJECTED, Role.DISLIKED]


def test_a_mismatched_row_is_cut_where_a_row_ends(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    rows = [row("left", None, prompt="straight on " * 4), row("straight on " * 8, None, prompt="right")]
    longest = max(len(tokenizer.encode_chat([*one["prompt"], *one["chosen"]])[0]) for one in rows)
    assert write_preferences(tmp_path, "train", tokenizer, rows, longest)["too_long"] == 0
    read = PreferenceRows(tmp_path, "train")
    assert read.roles.tolist() == [Role.LIKED, Role.MISMATCHED] * 2
    assert (read.batch(np.arange(4))["segment_ids"] != 0).sum(1).max() == longest


def test_an_empty_set_is_no_row(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    assert write_preferences(tmp_path, "train", tokenizer, [], SEQ_LEN) == {"pairs": 0, "votes": 0, "too_long": 0}
    assert PreferenceRows(tmp_path, "train").units() == []


def test_roles_that_do_not_fit_the_rows_are_refused(written: PreferenceRows) -> None:
    path = written.tokens.folder / "train.roles.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"train\.roles\.bin: 7 roles for 8 rows; run"):
        PreferenceRows(written.tokens.folder, "train")
    path.unlink()
    with pytest.raises(InputError, match="0 roles for 8 rows"):
        PreferenceRows(written.tokens.folder, "train")


def packed(folder: Path, tokenizer: ChatTokenizer, count: int) -> TokenRows:
    folder.mkdir()
    writer = RowWriter(folder, "train", SEQ_LEN, id_type(tokenizer))
    chat = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": "straight on " * 12}]
    pack_rows([tokenizer.encode_chat(chat)] * count, writer)
    writer.close()
    write_rows_file(folder, tokenizer, SEQ_LEN, {"train": writer.rows})
    return TokenRows(folder, "train")


def test_a_batch_of_units_keeps_together_what_belongs_together(
    tmp_path: Path, written: PreferenceRows, tokenizer: ChatTokenizer
) -> None:
    written.reference[:] = np.arange(8)
    rows = AlignRows(packed(tmp_path / "sft", tokenizer, 2), packed(tmp_path / "replay", tokenizer, 1), written)
    assert len(rows) == 2 + 1 + 4
    batch = rows.batch(np.array([6, 1, 3, 2]))
    pair, vote = [Role.CHOSEN, Role.REJECTED], [Role.DISLIKED, Role.MISMATCHED]
    assert batch["role"].tolist() == [Role.SFT, Role.REPLAY, *vote, *pair]
    assert batch["reference"].tolist() == [0, 0, 6, 7, 0, 1]
    every = torch.cat([rows.batch(np.array([number]))["role"] for number in range(7)])
    assert every.tolist() == [Role.SFT, Role.SFT, Role.REPLAY, *written.roles.tolist()]


def test_a_batch_is_no_wider_than_its_longest_row(written: PreferenceRows) -> None:
    rows = AlignRows(None, None, written)
    narrow = rows.batch(np.array([0]))
    longest = int((narrow["segment_ids"] != 0).sum(1).max())
    assert narrow["input_ids"].shape == (2, longest)
    assert longest < SEQ_LEN
    assert narrow["role"].shape == (2,)
    full = written.batch(np.arange(2))
    assert {name: value.tolist() for name, value in trimmed(full).items()} == {
        name: value.tolist() for name, value in narrow.items()
    }


def test_neither_conversations_nor_preferences_is_refused() -> None:
    with pytest.raises(InputError, match="nothing to learn from"):
        AlignRows(None, None, None)
