"""Splits of kind `images`: no near-duplicate of a test picture is trained on with its question, and no more is lost."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.pictures_fuzz import easy_vqa_pictures, written
from components.config.params import InputError, load_params
from components.config.paths import Paths
from components.datasets.collect import collect
from components.datasets.deduplication import Splits
from components.datasets.formats import DatasetWriter, read_info, read_rows
from components.runtime.stage import StageRun

ROOT = Path(__file__).parents[2]
PICTURES = easy_vqa_pictures(60)
QUESTION = "What shape does the image contain?"
Row = dict[str, Any]


def png(image: Image.Image) -> bytes:
    return written([image], "PNG")


def row(identity: str, images: Iterable[Image.Image | bytes], *turns: str, answer: str = "circle") -> Row:
    """Questions of a user, each answered."""
    messages = [
        message
        for turn in turns
        for message in ({"role": "user", "content": turn}, {"role": "assistant", "content": answer})
    ]
    files = [image if isinstance(image, bytes) else png(image) for image in images]
    return {"id": identity, "images": files, "messages": messages, "tools": None, "suite": None}


def splits(folder: Path, test: Iterable[Row], train: Iterable[Row]) -> tuple[list[str], dict[str, int]]:
    """(ids that are trained on, rows dropped by reason)."""
    with DatasetWriter(folder / "d", "d", "images") as writer:
        writes = Splits("images", similarity=0.8)
        writes.write_held_out("test", test, writer)
        writes.write_train(train, writer)
    return [each["id"] for each in read_rows(folder / "d", "train")], writer.info.dropped


def as_jpeg(image: Image.Image) -> bytes:
    return written([image], "JPEG", quality=95)


def enlarged(image: Image.Image) -> bytes:
    return png(image.resize((200, 200), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("copy", [png, as_jpeg, enlarged])
def test_copies_of_test_pictures_are_not_trained_on_with_their_questions(
    tmp_path: Path, copy: Callable[[Image.Image], bytes]
) -> None:
    test = [row(f"test {n}", [image], f"<image>\n{QUESTION}") for n, image in enumerate(PICTURES[:10])]
    train = [
        row(f"copy {n}", [copy(image)], f"<image> {QUESTION}", answer="a circle")
        for n, image in enumerate(PICTURES[:10])
    ]
    train += [row(f"new {n}", [image], f"<image>\n{QUESTION}") for n, image in enumerate(PICTURES[10:])]
    trained, dropped = splits(tmp_path, test, train)
    assert trained == [f"new {number}" for number in range(50)]
    assert dropped == {"in_test": 10}


def test_a_question_within_a_longer_conversation_is_found(tmp_path: Path) -> None:
    first, second = PICTURES[:2]
    test = [row("test", [first], f"<image>\n{QUESTION}")]
    train = [
        row("later turn", [first], "<image>\nWhat colour?", QUESTION),
        row("second picture", [second, first], "<image>\nWhat colour?", f"<image>\n{QUESTION}"),
        row("about another", [first, second], "<image>\nWhat colour?", f"<image>\n{QUESTION}"),
        row("another question", [first], "<image>\nWhat colour?"),
        row("both at once", [first, second], f"<image><image>\n{QUESTION}"),
        row("no picture", [], QUESTION),
    ]
    trained, dropped = splits(tmp_path, test, train)
    assert trained == ["about another", "another question", "both at once", "no picture"]
    assert dropped == {"in_test": 2}


def test_rows_with_the_same_pictures_and_words_are_duplicates(tmp_path: Path) -> None:
    first, second = PICTURES[:2]
    train = [row(str(n), [image], f"<image>\n{QUESTION}") for n, image in enumerate((first, second, first))]
    trained, dropped = splits(tmp_path, [], train)
    assert (trained, dropped) == (["0", "1"], {"exact_duplicate": 1})


def test_rows_without_pictures_are_compared_by_their_questions(tmp_path: Path) -> None:
    trained, dropped = splits(
        tmp_path, [row("test", [], "Hello?")], [row("a", [], "Hello?", answer="b"), row("b", [], "Bye")]
    )
    assert (trained, dropped) == (["b"], {"in_test": 1})


def test_an_unreadable_picture_is_named_by_its_row(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^row test: picture: no picture"):
        splits(tmp_path, [row("test", [b"words"], "<image>")], [])


def easy_vqa(split: str) -> list[Row]:
    spec = importlib.util.find_spec("easy_vqa")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "data" / split
    questions = json.loads((folder / "questions.json").read_text())
    files = [(folder / f"images/{number}.png").read_bytes() for number in range(max(each[2] for each in questions) + 1)]
    return [
        row(f"{split} {number}", [files[image]], f"<image>\n{text}", answer=answer)
        for number, (text, answer, image) in enumerate(questions)
    ]


def test_the_official_split_of_easy_vqa_loses_no_row(tmp_path: Path) -> None:
    """Synthetic pictures of few shapes and colours, far closer to one another than photographs are."""
    train, test = easy_vqa("train")[:12_000], easy_vqa("test")[:3_000]
    trained, dropped = splits(tmp_path, test, train)
    assert len(trained) + dropped.get("exact_duplicate", 0) == 12_000
    assert "in_test" not in dropped


class Silent:
    """A tracker that stores nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def test_a_dataset_is_split_by_its_pictures(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "data/added/mine", "mine", "images") as writer:
        for n, image in enumerate(PICTURES):
            for question in ("What shape?", "What colour?", "Is it a circle?"):
                writer.write("train", row(f"{n} {question}", [image], f"<image>\n{question}"))
    overrides = {"scale": "smoke", "tune.dataset": "mine", "collect.held_out_share": 0.3}
    params = load_params(ROOT / "params.yaml", overrides)
    collect(StageRun("collect", params, Paths(tmp_path), tmp_path / "state", Silent()))  # type: ignore[arg-type]
    folder = tmp_path / "data/collected/mine"
    assert read_info(folder).dropped == {}
    by_split = {name: [each["images"][0] for each in read_rows(folder, name)] for name in ("train", "test")}
    assert not set(by_split["train"]) & set(by_split["test"])
    assert set(Counter(by_split["train"] + by_split["test"]).values()) == {3}
    assert 5 < len(set(by_split["test"])) < 40
