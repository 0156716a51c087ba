"""Packed rows become batches, in an order that is a pure function of seed and step."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from components.config.params import InputError
from components.token_rows.batches import IGNORED, Sampler, TokenRows

IDS = [[3, 4, 5, 6, 7, 8, 0, 0], [9, 10, 11, 12, 13, 14, 15, 16]]
SEGMENTS = [[1, 1, 1, 2, 2, 2, 0, 0], [1, 2, 2, 2, 2, 2, 2, 2]]
MASK = [[0, 1, 1, 0, 0, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0, 1]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    np.array(IDS, "<u2").tofile(tmp_path / "train.ids.bin")
    np.array(SEGMENTS, "<u2").tofile(tmp_path / "train.segments.bin")
    np.array(MASK, "u1").tofile(tmp_path / "train.mask.bin")
    info = {"seq_len": 8, "rows": {"train": 2, "test": 0}, "vocab_size": 20, "dtype": "uint16"}
    (tmp_path / "rows.json").write_text(json.dumps(info))
    return tmp_path


def test_labels_are_the_next_tokens_to_be_learned_of_the_same_document(folder: Path) -> None:
    batch = TokenRows(folder, "train").batch(np.array([1, 0]))
    no = IGNORED
    assert batch["input_ids"].tolist() == [IDS[1], IDS[0]]
    assert batch["segment_ids"].tolist() == [SEGMENTS[1], SEGMENTS[0]]
    assert batch["labels"].tolist() == [[no, 11, 12, no, no, no, 16, no], [4, 5, no, no, 8, no, no, no]]
    assert all(value.dtype == torch.int64 for value in batch.values())


def test_positions_count_from_the_start_of_each_document(folder: Path) -> None:
    batch = TokenRows(folder, "train").batch(np.array([0, 1]))
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 0, 1], [0, 0, 1, 2, 3, 4, 5, 6]]


def test_large_vocabularies_lie_in_four_bytes(folder: Path) -> None:
    (np.array(IDS, "<u4") + 70_000).tofile(folder / "train.ids.bin")
    info = json.loads((folder / "rows.json").read_text()) | {"dtype": "uint32"}
    (folder / "rows.json").write_text(json.dumps(info))
    batch = TokenRows(folder, "train").batch(np.array([0]))
    assert batch["input_ids"][0, 0] == 70_003


def test_marked_tokens_are_counted_without_padding(folder: Path) -> None:
    assert TokenRows(folder, "train").masked_tokens() == (3 + 5, 6 + 8)


def test_rows_stay_on_disk(folder: Path) -> None:
    rows = TokenRows(folder, "train")
    assert isinstance(rows._ids, np.memmap)
    assert len(rows) == 2


def test_a_split_without_rows_is_empty(folder: Path) -> None:
    assert len(TokenRows(folder, "test")) == 0
    assert TokenRows(folder, "test").masked_tokens() == (0, 0)


def test_a_folder_without_rows_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match='no token rows; run "loopwright run --until prepare"'):
        TokenRows(tmp_path, "train")


def test_a_short_file_is_an_input_error(folder: Path) -> None:
    (folder / "train.mask.bin").write_bytes(b"\1" * 15)
    with pytest.raises(InputError, match=r"train\.mask\.bin: 15 bytes, expected 16; run"):
        TokenRows(folder, "train")


@pytest.mark.parametrize("rows", [1, 2, 3, 10, 64, 65, 1000])
def test_every_row_comes_once_per_epoch(rows: int) -> None:
    sampler = Sampler(rows, seed=5)
    drawn = np.concatenate([sampler.step(step, 7) for step in range(2 * rows)])[: 14 * rows]
    for epoch in drawn.reshape(14, rows):
        assert sorted(epoch) == list(range(rows))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    first = Sampler(500, seed=1)
    orders = {tuple(first.step(epoch, 500)) for epoch in range(4)} | {tuple(Sampler(500, seed=2).step(0, 500))}
    assert len(orders) == 5
    assert tuple(range(500)) not in orders


def test_a_step_needs_no_history() -> None:
    walked = [tuple(rows) for sampler in [Sampler(300, 9)] for rows in (sampler.step(step, 8) for step in range(90))]
    assert tuple(Sampler(300, 9).step(89, 8)) == walked[89]
    assert tuple(Sampler(300, 9).step(11, 8)) == walked[11]


def test_orders_are_spread_evenly() -> None:
    """Each row's place over many epochs has the mean and the spread of a uniform draw."""
    sampler = Sampler(100, seed=0)
    places = np.array([np.argsort(sampler.step(epoch, 100)) for epoch in range(400)])
    assert np.abs(places.mean(0) - 49.5).max() < 6.5  # 4.5 standard errors of 28.9 / sqrt(400)
    assert np.abs(np.corrcoef(places[:, :20].T) - np.eye(20)).max() < 0.25


def test_huge_sets_cost_no_memory() -> None:
    rows = Sampler(10**12, seed=0).step(10**9, 4)
    assert len(set(rows.tolist())) == 4
    assert rows.max() < 10**12


def test_no_rows_are_an_input_error() -> None:
    with pytest.raises(InputError, match="0 rows"):
        Sampler(0, seed=0)
