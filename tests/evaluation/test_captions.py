"""CIDEr-D and BLEU of captions, against figures worked out by hand and properties of the definition."""

from __future__ import annotations

import math
import random

import pytest

from components.evaluation.captions import caption_scores, cider_d

REFERENCES = [
    ["a small red cat in the upper left"],
    ["a large blue dog in the lower right", "a big blue dog at the bottom"],
    ["two green birds on a branch", "green birds"],
]
WORDS = [
    "a",
    "small",
    "large",
    "red",
    "blue",
    "cat",
    "dog",
    "bird",
    "in",
    "the",
    "upper",
    "lower",
    "left",
    "right",
    "corner",
]


def random_captions(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(4, 12))) for _ in range(count)]


def test_cider_d_equals_the_figure_worked_out_by_hand() -> None:
    # Two pictures: of the references' words "red" weighs log 2 - log 1 = w, "cat" and "cat" again log 2 - log 2 = 0.
    # Caption "red red": unigrams (red 2w) against (red w), clipped: w·w / (2w·w) = 1/2; its bigram is in no reference.
    # The mean over four lengths is 1/8; two words against two: no penalty.
    scores = cider_d(["red red", "blue cat sits"], [["red cat"], ["blue cat"]])
    assert scores[0] == pytest.approx(10 / 8)
    # "blue cat sits": unigrams (blue w, sits w) against (blue w): 1/√2; bigrams (blue cat w, cat sits w) against
    # (blue cat w): 1/√2; no trigram in the reference; one word longer: exp(-1 / 72).
    assert scores[1] == pytest.approx(10 * (2 / math.sqrt(2)) / 4 * math.exp(-1 / 72))


def test_a_caption_equal_to_its_only_reference_scores_ten_and_no_caption_more() -> None:
    captions = random_captions(40)
    assert cider_d(captions, [[caption] for caption in captions]) == pytest.approx([10.0] * 40)
    others = random_captions(40, seed=1)
    assert all(0 <= score <= 10 + 1e-9 for score in cider_d(others, [[caption] for caption in captions]))


def test_a_score_depends_on_no_order() -> None:
    captions, references = (
        random_captions(20),
        [[one, other] for one, other in zip(random_captions(20, 1), random_captions(20, 2), strict=True)],
    )
    scores = cider_d(captions, references)
    assert cider_d(captions[::-1], references[::-1])[::-1] == pytest.approx(scores)
    assert cider_d(captions, [own[::-1] for own in references]) == pytest.approx(scores)


def test_a_word_of_every_reference_weighs_nothing() -> None:
    references = [["the cat sleeps"], ["the dog runs"], ["the bird sings"]]
    assert cider_d(["the", "the the the", "the"], references) == [0.0, 0.0, 0.0]
    # Where there is one picture, every word is in every reference.
    assert cider_d(["the cat"], [["the cat"]]) == [0.0]


def test_repeating_a_word_of_the_reference_gains_nothing() -> None:
    references = [["red cat"], ["blue dog"], ["green bird"]]
    once, repeated = (cider_d([caption, "x", "x"], references)[0] for caption in ("red cat", "red cat red cat"))
    assert repeated < once


def test_a_difference_in_length_is_penalized() -> None:
    references = [["one two three four five six"], ["other words"]]
    short = cider_d(["one two three four", "x"], references)[0]
    longer = cider_d(["one two three four five six seven eight nine ten", "x"], references)[0]
    assert 0 < short < 10
    assert 0 < longer < 10


def test_case_and_punctuation_count_for_nothing() -> None:
    assert cider_d(["A cat, asleep.", "dogs"], [["a cat asleep"], ["birds"]])[0] > 0
    assert cider_d(["A CAT!", "x"], [["a cat"], ["y"]]) == cider_d(["a cat", "x"], [["a cat"], ["y"]])


def test_bleu_is_one_for_equal_captions_and_takes_any_number_of_references() -> None:
    captions = [own[-1] if len(own[-1].split()) > 4 else own[0] for own in REFERENCES]
    scores = caption_scores(captions, REFERENCES)
    assert scores.bleu == pytest.approx(1.0)
    assert scores.cider_d == pytest.approx(sum(scores.each) / 3)
    worse = caption_scores(["a cat", "a dog", "a bird"], REFERENCES)
    assert worse.bleu < 0.2
    assert worse.cider_d < scores.cider_d


@pytest.mark.parametrize(
    ("captions", "references"), [([], []), (["a"], []), (["a"], [["a"], ["b"]]), (["a", "b"], [["a"], []])]
)
def test_captions_without_references_are_refused(captions: list[str], references: list[list[str]]) -> None:
    with pytest.raises(ValueError, match=r"captions: \d with \d lists of references"):
        cider_d(captions, references)
