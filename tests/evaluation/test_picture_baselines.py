"""The baselines learn a rule that pixels show, and only a majority where there is none to learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from components.evaluation.picture_baselines import examples, picture_baselines
from components.media.pictures import Picture

COLORS = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 200, 0)}
Row = dict[str, Any]


def png(color: tuple[int, int, int], place: int = 4) -> bytes:
    pixels = np.full((32, 32, 3), 240, dtype=np.uint8)
    pixels[8:20, place : place + 8] = color
    return Picture(pixels).png()


def row(images: list[bytes], exchanges: list[tuple[str, str]], suite: str | None = None, marks: str = "") -> Row:
    marks = marks or " ".join(["<image>"] * len(images))
    messages = []
    for number, (question, answer) in enumerate(exchanges):
        messages += [{"role": "user", "content": question if number else f"{marks}\n{question}"}]
        messages += [{"role": "assistant", "content": answer}]
    return {"id": "", "images": images, "messages": messages, "tools": None, "suite": suite}


def color_rows(count: int, seed: int, suite: str | None = None) -> list[Row]:
    """Which color, and whether a color is there: not to be answered without the picture."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        color, asked = random.choice(list(COLORS)), random.choice(list(COLORS))
        image = png(COLORS[color], int(random.integers(0, 24)))
        exchanges = [("What color is it?", color), (f"Is it {asked}?", "yes" if color == asked else "no")]
        if suite:
            rows += [
                row([image], [exchange], f"{suite}/{kind}")
                for exchange, kind in zip(exchanges, ("color", "yes_no"), strict=True)
            ]
        else:
            rows.append(row([image], exchanges))
    return rows


def clip_rows(count: int, seed: int, suite: str | None = None) -> list[Row]:
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        start, step = int(random.integers(8, 16)), int(random.choice([-2, 2]))
        images = [png((0, 0, 0), start + step * number) for number in range(int(random.integers(4, 6)))]
        marks = " ".join(f"{number / 2:.1f} s <image>" for number in range(len(images)))
        rows.append(row(images, [("Which way?", "right" if step > 0 else "left")], suite, marks))
    return rows


def test_pixels_answer_what_the_question_alone_cannot() -> None:
    figures = picture_baselines(color_rows(200, 0), color_rows(100, 1, "test"), seed=0)
    assert set(figures) == {"test/color", "test/yes_no"}
    assert figures["test/color"]["pixels"] > 0.97
    assert figures["test/color"]["question_only"] < 0.55
    # Guessing "no" is right two times in three.
    assert 0.55 < figures["test/yes_no"]["question_only"] < 0.8
    assert figures["test/yes_no"]["pixels"] > figures["test/yes_no"]["question_only"] + 0.1


def test_frames_side_by_side_show_a_direction() -> None:
    figures = picture_baselines(clip_rows(200, 0), clip_rows(80, 1, "clips"), seed=0)
    assert figures["clips"]["pixels"] > 0.9
    assert figures["clips"]["question_only"] < 0.7


def test_the_question_alone_answers_what_its_words_decide() -> None:
    image = png((0, 0, 0))
    rules = [("Is the sky blue?", "yes"), ("Is coal white?", "no")]
    training = [row([image], [rule]) for rule in rules * 10]
    figures = picture_baselines(training, [row([image], [rule], "words") for rule in rules], seed=0)
    assert figures["words"] == {"question_only": 1.0, "pixels": 1.0}


def test_a_caption_is_that_of_the_nearest_training_picture() -> None:
    training = [
        row([png(value)], [("Describe it.", f"a small {name} box on a pale ground")]) for name, value in COLORS.items()
    ]
    shades = {"red": (230, 20, 20), "blue": (20, 10, 230), "green": (10, 180, 10)}
    tests = [
        row([png(value)], [("Caption?", f"a small {name} box on a pale ground")], "captions")
        for name, value in shades.items()
    ]
    figures = picture_baselines(training, tests, seed=0)
    assert figures["captions"] == {"cider_d": pytest.approx(10), "bleu": 1.0, "exact_match": 1.0}
    tests[0] = row([png(shades["blue"])], [("Caption?", "a small red box on a pale ground")], "captions")
    assert picture_baselines(training, tests, seed=0)["captions"]["exact_match"] == 0.6667


def test_the_same_seed_gives_the_same_figures_and_rows_may_be_read_once() -> None:
    training, tests = color_rows(60, 0), color_rows(40, 1, "test")
    assert picture_baselines(iter(training), iter(tests), seed=3) == picture_baselines(training, tests, seed=3)


def test_a_suite_without_a_training_answer_is_left_out() -> None:
    tests = [row([png((0, 0, 0))], [("What shape?", "square")], "shape")]
    assert picture_baselines(color_rows(10, 0), tests, seed=0) == {}


def test_a_question_has_the_pictures_before_its_answer_and_no_marks() -> None:
    first, second = png((0, 0, 0)), png((255, 0, 0))
    conversation = row([first], [("What  is it?", "a box"), ("And now?", "red")])
    conversation["messages"][2]["content"] = "0.0 s <image>\nAnd now?"
    conversation["images"].append(second)
    found = [(example.question, example.images, example.answer) for example in examples(conversation)]
    assert found == [("What is it?", (first,), "a box"), ("And now?", (first, second), "red")]


def test_training_questions_are_a_sample_of_all_rows_and_not_the_first() -> None:
    image = png((0, 0, 0))
    training = [row([image], [("Open?", "yes" if number < 100 else "no")]) for number in range(400)]
    tests = [row([image], [("Open?", answer)], "doors") for answer in ("no", "no", "yes")]
    assert picture_baselines(training, tests, seed=0, most=100)["doors"]["question_only"] == 0.6667
