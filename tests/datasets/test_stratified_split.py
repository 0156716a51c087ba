"""Splits by label: every label keeps its share, whichever order its rows come in."""

import random

from components.datasets.formats import Row, Split
from components.datasets.stratified_split import stratified


def splits(rows: list[Row]) -> dict[str, Split]:
    split_of = stratified(lambda: rows, 0.2, 0.1, 0)
    return {row["id"]: split_of(row) for row in rows}


def rows_of(label: str, count: int) -> list[Row]:
    return [{"id": f"{label}-{number}", "label": label} for number in range(count)]


def test_a_label_is_in_every_split_from_three_rows_on() -> None:
    found = {
        count: [list(splits(rows_of("a", count)).values()).count(name) for name in ("train", "validation", "test")]
        for count in (1, 2, 3, 5, 100)
    }
    assert found == {1: [1, 0, 0], 2: [1, 0, 1], 3: [1, 1, 1], 5: [3, 1, 1], 100: [70, 10, 20]}


def test_the_choice_is_each_rows_own_and_knows_no_order() -> None:
    rows = [*rows_of("a", 40), *rows_of("b", 7)]
    shuffled = random.Random(0).sample(rows, len(rows))
    assert splits(shuffled) == splits(rows)
    assert {key: value for key, value in splits(rows).items() if key.startswith("a")} == splits(rows_of("a", 40))
