"""The reference pictures: right answers, which pixels confirm, and nothing of the test splits in training."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from components.agent.saved_tools import load_tools, save_agent
from components.config.errors import InputError
from components.config.params import load_params
from components.config.paths import Paths
from components.config.project import Collecting, Rows, load_project
from components.datasets.formats import SCHEMAS, Row
from components.media.messages import IMAGE, with_pictures
from components.media.pictures import Pixels, decode_picture
from examples.sight import PICTURES
from examples.sight import rows as rows_of
from examples.sight.clip_rows import CHANGES, OBJECTS, STEPS, VALUES, held_out_pairs
from examples.sight.digit_rows import larger, parity
from examples.sight.drawing import COLORS, SIDE, cut_out
from examples.sight.picture_files import ANIMALS, Stamps, digits, easy_vqa, silhouettes
from examples.sight.shapes import SHAPES, bounding_box, place, shape_captions, vqa_suite
from examples.sight.video import write_clip

ROOT = Path(__file__).parents[2]
NAME = "examples.sight"
SUITES = {
    "sight-vqa": {"vqa/shape", "vqa/color", "vqa/yes_no"},
    "sight-digits": {"digits/which", "digits/parity", "digits/larger", "digits/new_wordings"},
    "sight-captions": {"captions/shapes", "captions/silhouettes", "captions/new_wordings"},
    "sight-clips": {"clips/direction", "clips/order", "clips/count", "clips/size", "clips/new_wordings"},
}


def collecting(folder: Path) -> Collecting:
    params = load_params(ROOT / "params.yaml", {"scale": "smoke", "project": NAME, "project_path": "examples/sight"})
    return Collecting(params.collect, params.seed, folder)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rows]:
    settings = collecting(tmp_path_factory.mktemp("files"))
    made = {name: rows_of(name, settings) for name in PICTURES}
    return {name: Rows(list(rows.train), list(rows.test), sources=rows.sources) for name, rows in made.items()}


def exchanges(row: Row) -> list[tuple[str, str]]:
    """The questions of a row, without their pictures' marks, and their answers."""
    contents = [message["content"].rpartition("\n")[2] for message in row["messages"]]
    return list(zip(contents[::2], contents[1::2], strict=True))


def all_rows(datasets: dict[str, Rows]) -> list[Row]:
    return [row for rows in datasets.values() for row in (*rows.train, *rows.test)]


def ink_boxes(row: Row) -> list[tuple[int, int, int, int]]:
    return [bounding_box(image) for image in row["images"]]


def centers(row: Row) -> np.ndarray[Any, Any]:
    """(frames, 2): x and y of the middle of what is drawn."""
    return np.array([(left + width / 2, top + height / 2) for left, top, width, height in ink_boxes(row)])


def test_rows_fit_the_schema_and_have_a_mark_for_each_picture(datasets: dict[str, Rows]) -> None:
    for row in all_rows(datasets):
        assert list(row) == ["id", "images", "messages", "tools", "suite"]
        assert row["messages"][0]["content"].count(IMAGE) == len(row["images"])
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * (len(row["messages"]) // 2)
        pictures = [decode_picture(image, row["id"]) for image in row["images"]]
        assert {picture.pixels.shape for picture in pictures} == {(SIDE, SIDE, 3)}
        assert len(with_pictures(row["messages"], pictures)[0]["images"]) == len(row["images"])
    table = pa.Table.from_pylist(all_rows(datasets), schema=SCHEMAS["images"])
    assert table.num_rows == len(all_rows(datasets)) == len(set(table["id"].to_pylist()))


def test_each_held_out_row_asks_one_question_of_a_known_suite(datasets: dict[str, Rows]) -> None:
    for name, rows in datasets.items():
        assert {row["suite"] for row in rows.test} == SUITES[name]
        assert {len(row["messages"]) for row in rows.test} == {2}
        assert {row["suite"] for row in rows.train} == {None}
        assert sum(len(row["messages"]) for row in rows.train) > 2 * len(list(rows.train))


def test_no_held_out_picture_is_trained_on(datasets: dict[str, Rows]) -> None:
    trained, tested = (
        {image for rows in datasets.values() for row in split(rows) for image in row["images"]}
        for split in (lambda rows: rows.train, lambda rows: rows.test)
    )
    assert not trained & tested


def test_held_out_rows_draw_held_out_objects_and_training_rows_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By objects that tell it: bars are held out, squares are not."""
    bar, square = (np.full((height, 8), 255, dtype=np.uint8) for height in (2, 8))
    stamps = Stamps({name: [square] for name in OBJECTS}, {name: [bar] for name in OBJECTS}, {})
    monkeypatch.setattr("examples.sight.digit_rows.digits", lambda share, seed: stamps)
    monkeypatch.setattr("examples.sight.clip_rows.digits", lambda share, seed: stamps)
    monkeypatch.setattr("examples.sight.clip_rows.silhouettes", lambda share, seed: stamps)
    monkeypatch.setattr("examples.sight.caption_rows.silhouettes", lambda share, seed: stamps)
    # Shapes of easy-VQA and those without a name, and boxes around several objects.
    several = {*SHAPES, "shape", "1", "2", "3", "4"}
    for name in ("sight-digits", "sight-captions", "sight-clips"):
        rows = rows_of(name, collecting(tmp_path))
        for split, shape in ((rows.train, 1), (rows.test, 4)):
            for row in split:
                if not several & {word for _, answer in exchanges(row) for word in answer.split()}:
                    assert all(
                        width / height == pytest.approx(shape, rel=0.35) for _, _, width, height in ink_boxes(row)
                    )


@pytest.mark.parametrize("stamps", [digits, silhouettes])
def test_held_out_objects_are_a_share_of_all_and_none_is_on_both_sides(stamps: Any) -> None:
    split = stamps(0.12, 0)
    train, test = ([stamp for each in side.values() for stamp in each] for side in (split.train, split.test))
    assert not {stamp.tobytes() for stamp in train} & {stamp.tobytes() for stamp in test}
    assert len(test) / (len(train) + len(test)) == pytest.approx(0.12, abs=0.02)
    assert set(split.train) == set(split.test)
    assert len(train) + len(test) == {digits: 1797, silhouettes: 10_000}[stamps]


def test_the_official_split_of_easy_vqa_is_kept_and_held_out_whole(datasets: dict[str, Rows]) -> None:
    folder = Path(str(importlib.util.find_spec("easy_vqa").origin)).parent / "data"  # type: ignore[union-attr]
    asked = Counter((row["images"][0], *exchanges(row)[0]) for row in datasets["sight-vqa"].test)
    official = Counter(
        ((folder / f"test/images/{number}.png").read_bytes(), question, answer)
        for question, answer, number in json.loads((folder / "test/questions.json").read_text())
    )
    assert asked == official
    assert official.total() == 9673


def consistent(states: set[tuple[str, str]], question: str, answer: str) -> set[tuple[str, str]]:
    """Of pairs of a color and a shape, those that a picture may show when this is the answer to a question."""
    words = set(question.lower().rstrip("?").split()) & {*COLORS, *SHAPES}
    if answer in ("yes", "no"):
        is_shown = (answer == "yes") == {"no", "not"}.isdisjoint(question.lower().split())
        return {state for state in states if (words <= {*state}) == is_shown}
    return {state for state in states if words | {answer} <= {*state}}


def test_answers_about_trained_pictures_of_easy_vqa_agree_with_the_official_ones(datasets: dict[str, Rows]) -> None:
    states: dict[bytes, set[tuple[str, str]]] = {}
    for picture in easy_vqa("train"):
        states[picture.content] = set(itertools.product(COLORS, SHAPES))
        for exchange in picture.questions:
            states[picture.content] = consistent(states[picture.content], *exchange)
    for row in datasets["sight-vqa"].train:
        for exchange in exchanges(row):
            assert consistent(states[row["images"][0]], *exchange), exchange


def test_only_the_picture_tells_a_trained_yes_no_answer_of_easy_vqa(datasets: dict[str, Rows]) -> None:
    """43 % of them were told by earlier answers once, and the model learned to read those instead of the picture."""
    answerable, names_shown = [], []
    for row in datasets["sight-vqa"].train:
        assert len(exchanges(row)) <= 3
        states = set(itertools.product(COLORS, SHAPES))
        for question, answer in exchanges(row):
            if answer in ("yes", "no"):
                answerable.append(not all(consistent(states, question, other) for other in ("yes", "no")))
                names_shown.append((answer == "yes") == {"no", "not"}.isdisjoint(question.lower().split()))
            states = consistent(states, question, answer)
    assert len(answerable) > 700
    assert np.mean(answerable) <= 0.01
    assert 0.3 < np.mean(names_shown) < 0.45, "a model that guesses without the picture is wrong in a third"


def test_the_question_of_a_clips_task_comes_before_those_whose_answers_tell_it(datasets: dict[str, Rows]) -> None:
    values = {*itertools.chain(*VALUES.values())}
    for row in datasets["sight-clips"].train:
        (question, answer), *others = exchanges(row)
        assert answer in values or "first" in question
        assert values.isdisjoint(answer for _, answer in others)


def test_questions_of_easy_vqa_are_in_the_suite_of_their_answer() -> None:
    assert [vqa_suite(answer) for answer in ("yes", "circle", "teal")] == ["vqa/yes_no", "vqa/shape", "vqa/color"]


def test_captions_of_shapes_agree_with_every_question_and_with_the_pixels() -> None:
    captions = shape_captions("test")
    assert len(captions) > 500
    for caption in captions:
        for _, answer in caption.picture.questions:
            if answer not in ("yes", "no"):
                assert answer in (caption.color, caption.shape)
        left, top, width, height = bounding_box(caption.picture.content)
        pixels = decode_picture(caption.picture.content, "").pixels
        ink = pixels[top + height // 2 if caption.shape != "triangle" else top + height - 2, left + width // 2]
        assert caption.color == min(COLORS, key=lambda name: np.abs(ink.astype(int) - COLORS[name]).sum())
        assert caption.text.endswith(place(left + width / 2, top + height / 2))
        assert (max(width, height) >= 20) == (caption.size == "large")


def test_captions_of_silhouettes_say_where_and_how_large_they_are(datasets: dict[str, Rows]) -> None:
    texts = {suite: [] for suite in SUITES["sight-captions"]}  # type: dict[str, list[str]]
    for row in datasets["sight-captions"].test:
        ((_, text),) = exchanges(row)
        texts[row["suite"]].append(text)
        ((left, top, width, height),) = ink_boxes(row)
        _, size, _, _, _, _, *where = text.split()
        assert " ".join(where) == place(left + width / 2, top + height / 2)
        if row["suite"] != "captions/shapes":
            assert (max(width, height) > 32) == (size == "large")
    assert all(text.split()[3] in ANIMALS for text in texts["captions/silhouettes"])


def test_answers_about_digits_are_consistent(datasets: dict[str, Rows]) -> None:
    assert [parity(digit) for digit in "0129"] == ["even", "odd", "even", "odd"]
    assert [larger("3", "7"), larger("7", "3")] == ["the second", "the first"]
    for row in datasets["sight-digits"].train:
        answers = dict(exchanges(row))
        names = [answer for answer in answers.values() if answer.isdigit()]
        if len(row["images"]) == 1:
            assert set(answers.values()) == {names[0], parity(names[0])}
        else:
            named = {question: answer for question, answer in answers.items() if answer.isdigit()}
            first, second = (
                next(answer for question, answer in named.items() if f"the {which}" in question)
                for which in ("first", "second")
            )
            assert larger(first, second) == exchanges(row)[0][1], "asked first"
            assert first != second


def test_a_digit_is_drawn_as_its_answer_names_it(datasets: dict[str, Rows]) -> None:
    """By the nearest of scikit-learn's digits, cut out and scaled alike."""
    split = digits(0.12, 0)
    known = [(name, stamp) for side in (split.train, split.test) for name, stamps in side.items() for stamp in stamps]
    stamps = np.stack([thumbnail(255 - cut_out(stamp)) for _, stamp in known])
    right = []
    for row in datasets["sight-digits"].test:
        if row["suite"] == "digits/which":
            left, top, width, height = bounding_box(row["images"][0])
            grey = decode_picture(row["images"][0], "").pixels.mean(axis=2).astype(np.uint8)
            drawn = thumbnail(grey[top : top + height, left : left + width])
            nearest = np.square(stamps - drawn).sum(axis=1).argmin()
            right.append(known[nearest][0] == exchanges(row)[0][1])
    assert np.mean(right) > 0.9


def thumbnail(grey: Pixels) -> np.ndarray[Any, Any]:
    image = Image.fromarray(grey).resize((8, 8), Image.Resampling.BILINEAR)
    return np.asarray(image, dtype=float).ravel()


def test_a_clip_shows_the_motion_that_its_answer_names(datasets: dict[str, Rows]) -> None:
    seen: Counter[str] = Counter()
    rows = datasets["sight-clips"]
    for row in (*rows.train, *rows.test):
        for question, answer in exchanges(row):
            if answer in STEPS:
                x, y = centers(row)[-1] - centers(row)[0]
                found = ("right" if x > 0 else "left") if abs(x) > abs(y) else ("down" if y > 0 else "up")
                assert found == answer
            elif answer in CHANGES:
                sizes = [max(width, height) for _, _, width, height in ink_boxes(row)]
                assert sizes == sorted(sizes, reverse=answer == "shrinking")
                assert max(sizes) > 2 * min(sizes)
            elif answer.isdigit():
                assert {objects_in(image) for image in row["images"]} == {int(answer)}, question
            seen[answer] += 1
    assert not {*STEPS, *CHANGES, "1", "2", "3", "4"} - set(seen)


def objects_in(image: bytes) -> int:
    """Quarters of a picture in which something is drawn."""
    pixels = decode_picture(image, "").pixels.astype(int)
    dark = pixels.sum(axis=2) < 500
    return sum(bool(dark[y : y + 32, x : x + 32].any()) for x, y in itertools.product((0, 32), repeat=2))


def test_what_comes_first_is_another_object_than_what_comes_second(datasets: dict[str, Rows]) -> None:
    """Two drawings, the second after the first: the picture changes once."""
    for row in datasets["sight-clips"].test:
        if row["suite"] == "clips/order":
            frames = [decode_picture(image, "").pixels.astype(int) for image in row["images"]]
            changes = [bool(np.abs(one - other).max() > 50) for one, other in itertools.pairwise(frames)]
            assert sum(changes) == 1
            ((question, answer),) = exchanges(row)
            assert answer in question


def pairs(rows: list[Row]) -> dict[str, set[tuple[str, str]]]:
    """The pairs of object and motion that conversations name."""
    named: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for row in rows:
        answers = [answer for _, answer in exchanges(row)]
        objects = {answer.removeprefix("the ") for answer in answers if answer.startswith("the ")}
        for answer in answers:
            task = next((task for task, values in VALUES.items() if answer in values), None)
            if task:
                named[task] |= {(name, answer) for name in objects}
        if len(objects) == 2:
            named["order"].add(tuple(sorted(objects, key=OBJECTS.index)))  # type: ignore[arg-type]
    return named


def test_held_out_pairs_of_object_and_motion_are_never_trained_on(datasets: dict[str, Rows]) -> None:
    settings = collecting(Path())
    held_out = held_out_pairs(settings.settings.held_out_share, settings.seed)
    trained = pairs(list(datasets["sight-clips"].train))
    assert set(trained) == set(held_out) == {"direction", "size", "count", "order"}
    for task, chosen in held_out.items():
        assert not set(chosen) & trained[task]
        if task != "order":
            assert {value for _, value in chosen} == set(VALUES[task])
            assert len({name for name, _ in chosen}) == len(chosen), "of each object the other motions are trained on"
    tests = [row for row in datasets["sight-clips"].test if row["suite"] == "clips/order"]
    for row in tests:
        ((question, _),) = exchanges(row)
        names = [name for name in OBJECTS if f"the {name}" in question]
        assert tuple(names) in {tuple(pair) for pair in held_out["order"]}


def test_clips_are_video_files_that_are_read_back_as_they_were_drawn() -> None:
    import av

    frames = [np.full((SIDE, SIDE, 3), 250 - 40 * number, dtype=np.uint8) for number in range(5)]
    content = write_clip(frames)
    with av.open(io.BytesIO(content), "r") as container:
        assert container.format.name.startswith("mov,mp4")
        read = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(read) == len(frames)
    assert max(np.abs(one.astype(int) - other).max() for one, other in zip(read, frames, strict=True)) <= 2
    assert content == write_clip(frames)


def test_wordings_of_the_suites_new_wordings_are_never_trained_on(datasets: dict[str, Rows]) -> None:
    for name, rows in datasets.items():
        trained = {masked(question) for row in rows.train for question, _ in exchanges(row)}
        for row in rows.test:
            is_new = row["suite"].endswith("new_wordings")
            assert (masked(exchanges(row)[0][0]) in trained) != is_new, (name, exchanges(row))


def masked(question: str) -> str:
    """A question without the objects, colors and shapes that it names."""
    names = "|".join((*OBJECTS, *COLORS, *SHAPES))
    return re.sub(rf"\b(a|the) ({names})\b", "OBJECT", question.lower())


def test_the_same_seed_draws_the_same_rows(tmp_path: Path) -> None:
    for name in ("sight-digits", "sight-clips", "sight-captions"):
        first, again = (rows_of(name, collecting(tmp_path)) for _ in range(2))
        assert list(itertools.islice(first.train, 10)) == list(itertools.islice(again.train, 10))
        assert list(itertools.islice(first.test, 10)) == list(itertools.islice(again.test, 10))
        assert first.sources == again.sources


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "easy_vqa" else find_spec(name))
    easy_vqa.cache_clear()
    with pytest.raises(InputError, match=r'easy-vqa: is not installed; run pip install "loopwright\[sight\]"'):
        easy_vqa("train")


def test_only_an_array_is_read_from_a_pickle() -> None:
    from examples.sight.picture_files import _unpickled_array

    with pytest.raises(InputError, match=r"animal-shape-mnist: its pickle names \w+\.system"):
        _unpickled_array(b"cos\nsystem\n(S'true'\ntR.")


def test_it_is_the_agent_of_the_standard_library_with_sight(tmp_path: Path) -> None:
    sight, stdlib = load_project(NAME), load_project("examples.stdlib_agent")
    assert set(sight.datasets) == {*stdlib.datasets, *PICTURES}
    assert (sight.tools, sight.smoke_questions) == (stdlib.tools, stdlib.smoke_questions)
    assert sight.scales["all"]["tune"] == {"dataset": ["stdlib-conversations", *PICTURES]}
    assert stdlib.scales["all"]["tune"] == {"dataset": "stdlib-conversations"}


@pytest.mark.parametrize("is_installed", [False, True])
def test_its_tools_are_saved_as_those_of_the_standard_librarys_agent(tmp_path: Path, is_installed: bool) -> None:
    sources = []
    for name in (NAME, "examples.stdlib_agent"):
        settings = collecting(tmp_path / name / "tools/files")
        save_agent(load_project(name), settings, Paths(tmp_path if is_installed else ROOT))
        sources.append(json.loads((tmp_path / name / "agent.json").read_text())["source"])
        assert load_tools(tmp_path / name)
    assert sources[0] == sources[1]
    assert sources[0]["function"] == "examples.stdlib_agent.agent_tools:tools"
    assert not list((tmp_path / NAME / "tools/source").rglob("sight"))
