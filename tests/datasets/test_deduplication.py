"""Duplicates: what counts as one, and that no held-out row reaches the training split."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from components.config.params import InputError, load_params
from components.datasets import deduplication as duplicates
from components.datasets.added_rows import by_share
from components.datasets.deduplication import Duplicates, MinHash, Splits, question
from components.datasets.formats import DatasetWriter, Row, read_rows, row_id
from tests.conftest import SOURCE

VOCABULARY = [f"word{number}" for number in range(4000)]


def text_of(words: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(VOCABULARY, k=words))


def changed(text: str, replacements: int) -> str:
    words = text.split()
    for number in range(replacements):
        words[(number * 97) % len(words)] = f"other{number}"
    return " ".join(words)


def document(text: str) -> Row:
    return {"id": row_id(text), "text": text, "source": "here"}


def conversation(asked: str, answered: str) -> Row:
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return {"id": row_id(asked, answered), "messages": messages, "tools": None, "suite": None}


def test_same_text_is_an_exact_duplicate_whatever_its_case_and_spacing() -> None:
    seen = Duplicates(0.85)
    assert seen.reason("Return  the\nLength") is None
    assert seen.reason("return the length ") == "exact_duplicate"
    assert seen.reason("return the width") is None


def test_text_with_few_changed_words_is_a_near_duplicate() -> None:
    seen = Duplicates(0.8)
    text = text_of(400, seed=1)
    assert seen.reason(text) is None
    assert seen.reason(changed(text, 4)) == "near_duplicate"
    assert seen.reason(changed(text, 150)) is None
    assert seen.reason(text_of(400, seed=2)) is None


@pytest.mark.parametrize(("replaced", "reason"), [(1, "near_duplicate"), (3, "near_duplicate"), (12, None)])
def test_the_projects_threshold_parts_copies_from_relatives(replaced: int, reason: str | None) -> None:
    """Of 396 shingles each word that is replaced changes five: similarities of 0.98, 0.93 and 0.74."""
    similarity = load_params(SOURCE / "params.yaml", {"scale": "smoke"}).collect.near_duplicate_similarity
    for seed in range(10):
        seen = Duplicates(similarity)
        text = text_of(400, seed)
        seen.reason(text)
        assert seen.reason(changed(text, replaced)) == reason


def test_short_texts_are_only_compared_exactly() -> None:
    seen = Duplicates(0.6)
    assert seen.reason("close the file now") is None
    assert seen.reason("close the file then") is None


def test_text_written_without_spaces_is_compared_by_characters() -> None:
    seen = Duplicates(0.8)
    text = "".join(chr(0x4E00 + random.Random(3).randrange(900) + number % 7) for number in range(300))
    text += "".join(chr(0x4E00 + number * 31 % 2000) for number in range(300))
    assert seen.reason(text) is None
    assert seen.reason(text[:300] + "。" + text[300:]) == "near_duplicate"


def test_exact_only_keeps_case_and_near_copies() -> None:
    seen = Duplicates(0.8, exact_only=True)
    text = text_of(100, seed=4)
    assert seen.reason("What is random.Random?") is None
    assert seen.reason("What is random.random?") is None
    assert seen.reason("What  is random.random?") == "exact_duplicate"
    assert seen.reason(text) is None
    assert seen.reason(changed(text, 1)) is None


def test_signatures_estimate_the_jaccard_similarity() -> None:
    min_hash = MinHash(0.85)
    errors = []
    for seed in range(60):
        one, other = text_of(300, seed), changed(text_of(300, seed), seed % 20)
        first, second = duplicates._shingles(one), duplicates._shingles(other)
        assert first is not None
        assert second is not None
        exact = len(np.intersect1d(first, second)) / len(np.union1d(first, second))
        errors.append(float(np.mean(min_hash.of_set(first) == min_hash.of_set(second))) - exact)
    assert abs(np.mean(errors)) < 0.02
    assert np.std(errors) < 0.05


@pytest.mark.parametrize("similarity", [0.51, 0.7, 0.85, 0.95, 1.0])
def test_bands_let_pairs_at_the_threshold_meet(similarity: float) -> None:
    rows, bands = duplicates._banding(similarity)
    assert rows * bands <= duplicates.PERMUTATIONS
    assert 1 - (1 - similarity**rows) ** bands > 0.98


def test_near_copies_of_a_very_long_text_are_found_within_the_cap() -> None:
    seen = Duplicates(0.85)
    text = text_of(30_000, seed=5)
    shingles = duplicates._shingles(text)
    assert shingles is not None
    assert len(shingles) == duplicates.MAX_SHINGLES
    assert seen.reason(text) is None
    assert seen.reason(changed(text, 200)) == "near_duplicate"


def test_reasons_are_the_same_in_every_run() -> None:
    texts = [changed(text_of(60, seed % 40), seed % 9) for seed in range(400)]

    def reasons() -> list[str | None]:
        seen = Duplicates(0.7, seed=3)
        return [seen.reason(text) for text in texts]

    first = reasons()
    assert first == reasons()
    assert {None, "exact_duplicate", "near_duplicate"} <= set(first)


def test_texts_are_not_kept_in_memory() -> None:
    seen = Duplicates(0.85)
    for number in range(50):
        seen.reason(text_of(2000, number))
    assert sum(signature.nbytes for signature in seen._signatures) == 50 * 512


def write_splits(test: Iterable[Row], train: Iterable[Row], writer: DatasetWriter) -> None:
    splits = Splits(writer.info.kind, similarity=0.8)
    splits.write_held_out("test", test, writer)
    splits.write_train(train, writer)


def test_no_dataset_trains_on_the_test_rows_of_another(tmp_path: Path) -> None:
    first, second = [document(text_of(80, seed)) for seed in range(5)], [document(text_of(80, 9))]
    splits = Splits("documents", similarity=0.8)
    with DatasetWriter(tmp_path / "a", "a", "documents") as a, DatasetWriter(tmp_path / "b", "b", "documents") as b:
        splits.write_held_out("test", first[:2], a)
        splits.write_held_out("test", second, b)
        splits.write_train([*first[2:], *second], a)
        splits.write_train([*first[:3], document("other words")], b)
    assert (a.info.rows, a.info.dropped) == ({"test": 2, "train": 3}, {"in_test": 1})
    assert (b.info.rows, b.info.dropped) == ({"test": 1, "train": 1}, {"in_test": 2, "exact_duplicate": 1})


def test_no_training_document_equals_a_held_out_one(tmp_path: Path) -> None:
    held_out = [text_of(80, seed) for seed in range(20)]
    rows = [document(text) for text in held_out]
    rows += [document(changed(text, 1)) for text in held_out] + [document(text.upper()) for text in held_out]
    rows += [document(text_of(80, seed)) for seed in range(100, 150)]
    with DatasetWriter(tmp_path / "d", "d", "documents") as writer:
        write_splits(rows[:20], rows[20:], writer)
    assert writer.info.rows == {"test": 20, "train": 50}
    assert writer.info.dropped == {"in_test": 40}
    kept = {row["text"] for row in read_rows(tmp_path / "d", "train")}
    assert kept == {row["text"] for row in rows[60:]}


def test_duplicates_within_a_split_are_counted_by_reason(tmp_path: Path) -> None:
    text = text_of(80, seed=1)
    train = [document(text), document(text), document(changed(text, 1)), document("something else")]
    with DatasetWriter(tmp_path / "d", "d", "documents") as writer:
        write_splits([], train, writer)
    assert writer.info.rows == {"train": 2}
    assert writer.info.dropped == {"exact_duplicate": 1, "near_duplicate": 1}


def test_conversation_asking_a_held_out_question_is_not_trained_on(tmp_path: Path) -> None:
    test = [conversation("What is 2 + 2?", "4")]
    train = [
        conversation("What is 2 + 2?", "Four"),
        conversation("What is  2 + 2?", "4"),
        conversation("What is 2 + 3?", "5"),
        conversation("What is 2 + 3?", "5"),
        conversation("What is 2 + 3?", "Five"),
    ]
    with DatasetWriter(tmp_path / "c", "c", "conversations") as writer:
        write_splits(test, train, writer)
    assert writer.info.rows == {"test": 1, "train": 2}
    assert writer.info.dropped == {"in_test": 2, "exact_duplicate": 1}
    asked = {question(row) for row in read_rows(tmp_path / "c", "test")}
    assert asked.isdisjoint(question(row) for row in read_rows(tmp_path / "c", "train"))


def test_conversations_that_differ_in_a_tool_call_alone_are_both_kept(tmp_path: Path) -> None:
    def calling(name: str) -> Row:
        call = {"id": "1", "type": "function", "function": {"name": name, "arguments": "{}"}}
        row = conversation("Do it", "done")
        row["messages"].insert(1, {"role": "assistant", "content": None, "tool_calls": [call]})
        return row

    with DatasetWriter(tmp_path / "c", "c", "conversations") as writer:
        write_splits([], [calling("a"), calling("b"), calling("a")], writer)
    assert writer.info.rows == {"train": 2}


@pytest.mark.parametrize("share", [1.0, 0.0])
def test_handful_of_rows_still_has_both_splits(share: float) -> None:
    rows = [document(text) for text in ("one", "two", "three")]
    rule = by_share(lambda: rows, share, 0)
    assert [rule.split_of(row) for row in rows] == ["train", "train", "test"]


def test_only_row_is_trained_on() -> None:
    row = document("one")
    assert by_share(lambda: [row], 1.0, 0).split_of(row) == "train"


def test_nothing_left_to_train_on_is_reported(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=r"^d: no row left to train on \(test 1, in_test 1\); add more rows$"),
        DatasetWriter(tmp_path / "d", "d", "documents") as writer,
    ):
        write_splits([document("one")], [document("One")], writer)
    assert not (tmp_path / "d/dataset.json").exists()
