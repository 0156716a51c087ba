"""Splits by label: every label keeps its share, whichever order its rows come in."""

import random

import pytest

from components.datasets.added_rows import by_label
from components.datasets.formats import Row, Split, in_test_split


def splits(rows: list[Row], test_share: float = 0.2, validation_share: float = 0.1) -> dict[str, Split]:
    split_of = by_label(lambda: rows, test_share, validation_share, 0).split_of
    return {row["id"]: split_of(row) for row in rows}


def rows_of(label: str, count: int) -> list[Row]:
    return [{"id": f"{label}-{number}", "label": label} for number in range(count)]


def test_a_label_is_in_every_split_from_three_rows_on() -> None:
    found = {
        count: [list(splits(rows_of("a", count)).values()).count(name) for name in ("train", "validation", "test")]
        for count in (1, 2, 3, 5, 100)
    }
    assert found == {1: [1, 0, 0], 2: [1, 0, 1], 3: [1, 1, 1], 5: [3, 1, 1], 100: [70, 10, 20]}


@pytest.mark.parametrize("count", range(1, 30))
def test_a_row_of_each_label_is_left_to_train_on_whatever_the_shares(count: int) -> None:
    found = list(splits(rows_of("a", count), 0.49, 0.49).values())
    assert found.count("train") >= 1
    if count >= 3:
        assert set(found) == {"train", "validation", "test"}


def test_the_choice_is_each_rows_own_and_knows_no_order() -> None:
    rows = [*rows_of("a", 40), *rows_of("b", 7)]
    shuffled = random.Random(0).sample(rows, len(rows))
    assert splits(shuffled) == splits(rows)
    assert {key: value for key, value in splits(rows).items() if key.startswith("a")} == splits(rows_of("a", 40))


@pytest.mark.parametrize("share", [0.02, 0.12, 0.25, 0.5])
def test_the_share_of_keys_is_held_out_and_a_larger_share_holds_out_the_same_ones(share: float) -> None:
    keys = [f"row {number}" for number in range(10_000)]
    held_out = {key for key in keys if in_test_split(key, share, seed=3)}
    # Within four standard deviations of a fair choice.
    assert abs(len(held_out) - share * len(keys)) < 4 * (share * (1 - share) * len(keys)) ** 0.5
    assert held_out <= {key for key in keys if in_test_split(key, share * 1.5, seed=3)}
    assert held_out != {key for key in keys if in_test_split(key, share, seed=4)}
