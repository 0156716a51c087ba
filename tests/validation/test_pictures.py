"""Validation of kind `images`: every fault is named with its row, and pages show the pictures themselves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.pictures_fuzz import easy_vqa_pictures, written
from components.datasets.formats import DatasetWriter
from components.datasets.importers import add
from components.datasets.quarantine import Quarantine
from components.validation.report import ValidationReport, refusal, write_page
from components.validation.thumbnails import SAMPLES, picture_rows
from components.validation.validate import Validator

EXPECTATIONS = Path(__file__).parents[2] / "data/expectations"
PICTURES = [written([image], "PNG") for image in easy_vqa_pictures(30)]
Row = dict[str, Any]


@pytest.fixture(scope="module")
def validator() -> Validator:
    return Validator(EXPECTATIONS)


def row(
    number: int, images: list[bytes] | None = None, question: str = "<image>\nWhat?", answer: str = "A circle"
) -> Row:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    files = [PICTURES[number % 30]] if images is None else images
    return {"id": f"row-{number}", "images": files, "messages": messages, "tools": None, "suite": None}


def dataset(folder: Path, train: list[Row], test: list[Row] = []) -> Path:  # noqa: B006
    with DatasetWriter(folder, folder.name, "images") as writer:
        for each in train:
            writer.write("train", each)
        for each in test:
            writer.write("test", each)
    return folder


def failed(report: ValidationReport) -> dict[str, list[str]]:
    return {f"{check.expectation}({check.column or ''})": list(map(str, check.examples)) for check in report.failed}


def good(count: int = 5) -> list[Row]:
    return [row(number) for number in range(count)]


def test_valid_pictures_pass(validator: Validator, tmp_path: Path) -> None:
    clip = row(20, PICTURES[:2], "0.0 s <image> 0.5 s <image>\nWhat?")
    text = row(21, [], "Only words")
    report = validator.check(dataset(tmp_path / "d", [*good(), clip, text], [row(25), row(26, [], "Others")]))
    assert report.success, refusal([report])


HUGE = written([Image.new("1", (5_000, 5_001))], "PNG")


@pytest.mark.parametrize(
    ("faulty", "column", "value"),
    [
        (row(7, [PICTURES[0][:-60]]), "unreadable_pictures", "picture 1: not a readable PNG file"),
        (row(7, [PICTURES[0], b"words"], "<image><image>"), "unreadable_pictures", "picture 2: no picture"),
        (row(7, [HUGE]), "unreadable_pictures", "picture 1: 5,000 × 5,001 = 25,005,000 pixels; at most 25,000,000"),
        (row(7, [b""]), "unreadable_pictures", "picture 1: empty file"),
        (row(7, question="What?"), "miscounted_pictures", "messages: 0 marks <image> for 1 pictures"),
        (row(7, [], "<image>"), "miscounted_pictures", "messages: 1 marks <image> for 0 pictures"),
        (row(7, PICTURES[:1] * 65, "<image>" * 65), "miscounted_pictures", "messages: 65 pictures; at most 64"),
        (row(7, question="Draw", answer="<image>"), "pictures_in_answers", "turn 2: <image>"),
        (row(7, answer=" "), "empty_answers", "turn 2: an assistant turn without text"),
        ({**row(7), "messages": [{"role": "user", "content": "<image>"}]}, "roles", "user"),
    ],
)
def test_a_fault_is_named_with_its_row(
    validator: Validator, tmp_path: Path, faulty: Row, column: str, value: str
) -> None:
    report = validator.check(dataset(tmp_path / "d", [*good(3), faulty, row(9)]))
    ((name, examples),) = failed(report).items()
    assert name.endswith(f"({column})")
    assert len(examples) == 1
    assert examples[0].startswith("train-00000.parquet row 4 (id row-7): ")
    assert value in examples[0]


def test_rows_with_the_same_content_are_named_across_shards(validator: Validator, tmp_path: Path) -> None:
    again = {**row(1), "id": "another"}
    report = validator.check(dataset(tmp_path / "d", [*good(), again], [row(12), {**row(12), "id": "third"}]))
    examples = failed(report)["rows_are_unique()"]
    assert [re.findall(r"\(id (.+?)\)", example)[0] for example in examples] == ["row-12", "third", "row-1", "another"]


def test_near_duplicates_of_test_pictures_are_named(validator: Validator, tmp_path: Path) -> None:
    copy = written(easy_vqa_pictures(1), "JPEG", quality=95)
    train = [row(1), row(2), row(3, [copy]), row(4, [copy], "<image>\nAnother question")]
    report = validator.check(dataset(tmp_path / "d", train, [row(0)]))
    (example,) = failed(report)["held_out_pictures_are_not_trained_on(images)"]
    assert example.startswith("train-00000.parquet row 3 (id row-3): ")
    same = validator.check(dataset(tmp_path / "e", [row(1), {**row(0), "id": "x"}], [row(0, answer="A square")]))
    assert set(failed(same)) == {"held_out_rows_are_not_trained_on()", "held_out_pictures_are_not_trained_on(images)"}


def data_urls(page: Path) -> list[str]:
    return re.findall(r'<img src="(data:image/png;base64,[A-Za-z0-9+/=]+)"', page.read_text(encoding="utf-8"))


def test_pages_show_offending_pictures_and_some_of_the_others(validator: Validator, tmp_path: Path) -> None:
    rows = [*good(20), row(22, [b"words", PICTURES[22]], "<image><image>\nWhat is <this>?"), row(23, question="What?")]
    report = validator.check(dataset(tmp_path / "d", rows), docs=tmp_path / "docs")
    assert [(each.row, each.offending) for each in report.pictures] == [
        *((number, False) for number in range(1, SAMPLES + 1)),
        (21, True),
        (22, True),
    ]
    page = write_page(tmp_path / "page/index.html", [report])
    docs = tmp_path / "docs/d/train-00000.html"
    for html in (page, docs):
        text = html.read_text(encoding="utf-8")
        assert len(data_urls(html)) == SAMPLES + 2
        assert text.count("unreadable</span>") == 1
        assert text.count("offending</span>") == 2
        assert "What is &lt;this&gt;?" in text
        assert not re.search(r'src="https?:', text)
        assert len(text) < 500_000
    assert "base64" not in str(report.to_json())


def test_thumbnails_are_small_and_of_the_rows_that_are_asked_for(tmp_path: Path) -> None:
    photo = written([Image.fromarray(np.random.default_rng(0).integers(0, 256, (900, 1200, 3), np.uint8))], "JPEG")
    folder = dataset(tmp_path / "d", [row(number, [photo] * 12, "<image>" * 12) for number in range(40)])
    rows = picture_rows(folder / "train-00000.parquet", {39})
    assert [each.row for each in rows] == [1, 2, 3, 4, 5, 6, 39]
    assert {len(each.pictures) for each in rows} == {8}
    assert max(len(picture) for each in rows for picture in each.pictures) < 40_000


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(PICTURES[number])
    return tmp_path


def test_rows_that_fail_the_suite_go_to_the_quarantine(validator: Validator, files: Path) -> None:
    lines = [
        f'{{"image": "{number}.png", "conversations": [{{"from": "human", "value": "<image>"}}, '
        f'{{"from": "gpt", "value": "{answer}"}}]}}'
        for number, answer in enumerate(("a", "", "c"))
    ]
    path = files / "a.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    left_out = files / "out.jsonl"
    with Quarantine(left_out, lambda rows: validator.failing_rows(rows, "images")) as quarantine:
        info = add("images", [path], "mine", files / "added", check=validator.check, quarantine=quarantine)
    assert info.rows == {"train": 2}
    assert "Every assistant turn says something or calls a tool" in left_out.read_text()
