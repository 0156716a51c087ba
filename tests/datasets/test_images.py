"""Kind `images`: every format becomes the same rows; what breaks a rule is named, or left out with its reason."""

from __future__ import annotations

import base64
import json
import os
import random
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as PillowImage

from benchmarks.pictures_fuzz import easy_vqa_pictures, mp4, written
from components.config.params import InputError, Refused
from components.datasets import coco_captions, formats
from components.datasets.conversations import named_roles
from components.datasets.formats import SCHEMAS, DatasetWriter, read_info, read_rows, shards
from components.datasets.importers import Columns, add
from components.datasets.quarantine import Quarantine
from components.media.pictures import decode_picture
from components.validation.report import Check, Example, ValidationReport

CASES = int(os.environ.get("LOOPWRIGHT_TEST_CASES", "150"))
Row = dict[str, Any]
FIRST, SECOND, *MORE = easy_vqa_pictures(6)
CLIP = mp4([np.asarray(image) for image in MORE])
TIMES = "0.0 s <image> 0.1 s <image> 0.2 s <image> 0.3 s <image>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures and a clip, in the folder `p`."""
    (tmp_path / "p").mkdir()
    FIRST.save(tmp_path / "p/1.png")
    SECOND.save(tmp_path / "p/2.png")
    (tmp_path / "p/c.mp4").write_bytes(CLIP)
    return tmp_path


def human(text: str) -> Row:
    return {"from": "human", "value": text}


def gpt(text: str) -> Row:
    return {"from": "gpt", "value": text}


def user(content: Any) -> Row:
    return {"role": "user", "content": content}


def assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


def file(path: Path, content: Any) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(content), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in content), encoding="utf-8")
    else:
        path.write_text(json.dumps(content), encoding="utf-8")
    return path


def added(path: Path, **options: Any) -> list[Row]:
    add("images", [path], "mine", path.parent / "added", **options)
    return list(read_rows(path.parent / "added/mine", "train"))


def words(row: Row) -> list[str]:
    return [message["content"] for message in row["messages"]]


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


PNG = written([FIRST], "PNG")
PARTS = [{"type": "image_url", "image_url": {"url": data_url(PNG), "detail": "low"}}, {"type": "text", "text": "What?"}]
ONE_PICTURE = {
    "llava.json": [{"id": "7", "image": "p/1.png", "conversations": [human("<image>\nWhat?"), gpt("A circle")]}],
    "spaced.jsonl": [{"image": "p/1.png", "conversations": [human("<image> What?"), gpt("A circle")]}],
    "sharegpt4v.json": [{"image": ["p/1.png"], "conversations": [human("<image>What?"), gpt("A circle")]}],
    "factory.jsonl": [{"messages": [user("<image>What?"), assistant("A circle")], "images": ["p/1.png"]}],
    "factory.json": [{"conversations": [human("<image>What?"), gpt("A circle")], "images": ["p/1.png"], "system": ""}],
    "alpaca.json": [{"instruction": "<image>", "input": "What?", "output": "A circle", "images": ["p/1.png"]}],
    "coco.json": {
        "annotations": [{"id": 3, "image_id": 11, "caption": " A circle\n"}],
        "info": {"year": 2017},
        "images": [{"id": 11, "file_name": "p/1.png", "height": 64}],
    },
    "openai.jsonl": [{"messages": [user(PARTS), assistant("A circle")]}],
    "openai-path.jsonl": [
        {"messages": [user([{"type": "image_url", "image_url": "p/1.png"}, PARTS[1]]), assistant("A circle")]}
    ],
    "trl.jsonl": [{"messages": [user([{"type": "image"}, PARTS[1]]), assistant("A circle")], "images": ["p/1.png"]}],
    "bytes.parquet": [{"messages": [user("<image>What?"), assistant("A circle")], "images": [PNG]}],
    "structs.parquet": [
        {"messages": [user("<image>What?"), assistant("A circle")], "images": [{"bytes": PNG, "path": None}]}
    ],
    "image.parquet": [
        {"conversations": [human("<image>\nWhat?"), gpt("A circle")], "image": {"bytes": PNG, "path": "x"}}
    ],
    "path.parquet": [
        {"messages": [user("<image>What?"), assistant("A circle")], "image": {"bytes": None, "path": "p/1.png"}}
    ],
}


@pytest.mark.parametrize("name", ONE_PICTURE)
def test_every_format_becomes_the_same_row(folder: Path, name: str) -> None:
    (row,) = added(file(folder / name, ONE_PICTURE[name]))
    question = {"alpaca.json": "<image>\nWhat?", "coco.json": "<image>\nDescribe the picture."}
    assert words(row) == [question.get(name, "<image>\nWhat?"), "A circle"]
    (image,) = row["images"]
    np.testing.assert_array_equal(decode_picture(image, "x").pixels, np.asarray(FIRST))
    assert (row["tools"], row["suite"]) == (None, None)
    (shard,) = shards(folder / "added/mine", "train")
    assert pq.read_schema(shard).equals(SCHEMAS["images"])


CLIPS = {
    "factory.jsonl": [{"messages": [user("<video>What?"), assistant("x")], "videos": ["p/c.mp4"]}],
    "llava.json": [{"video": "p/c.mp4", "conversations": [human("<image>\nWhat?"), gpt("x")]}],
    "marked.json": [{"video": "p/c.mp4", "conversations": [human("<video>\nWhat?"), gpt("x")]}],
    "openai.jsonl": [
        {
            "messages": [
                user([{"type": "video_url", "video_url": {"url": data_url(CLIP, "video/mp4")}}, PARTS[1]]),
                assistant("x"),
            ]
        }
    ],
    "bytes.parquet": [{"messages": [user("<video>What?"), assistant("x")], "videos": [CLIP]}],
}


@pytest.mark.parametrize("name", CLIPS)
def test_a_clip_is_its_frames_with_their_times(folder: Path, name: str) -> None:
    (row,) = added(file(folder / name, CLIPS[name]))
    assert words(row) == [f"{TIMES}\nWhat?", "x"]
    assert len(row["images"]) == 4
    brightness = [decode_picture(image, "x").pixels.mean() for image in row["images"]]
    assert brightness == pytest.approx([np.asarray(image).mean() for image in MORE], abs=3)


def test_pictures_and_clips_stand_where_their_marks_are(folder: Path) -> None:
    turns = [user("First <image>, then <video>"), assistant("x"), user("and <image>?"), assistant("y")]
    rows = [{"messages": turns, "images": ["p/1.png", "p/2.png"], "videos": ["p/c.mp4"]}]
    (row,) = added(file(folder / "a.jsonl", rows))
    assert words(row) == [f"First <image>, then {TIMES}", "x", "and <image>?", "y"]
    shown = [decode_picture(image, "x").pixels for image in row["images"]]
    np.testing.assert_array_equal(shown[0], np.asarray(FIRST))
    np.testing.assert_array_equal(shown[5], np.asarray(SECOND))


def test_a_gif_is_its_first_frame_as_a_picture_and_all_as_a_clip(folder: Path) -> None:
    (folder / "p/a.gif").write_bytes(written(MORE, "GIF", duration=100))
    rows = [
        {"messages": [user("<image>"), assistant("x")], "images": ["p/a.gif"]},
        {"messages": [user("<video>"), assistant("x")], "videos": ["p/a.gif"]},
    ]
    assert [len(row["images"]) for row in added(file(folder / "a.jsonl", rows))] == [1, 4]


def test_marks_that_were_typed_stand_for_no_picture(folder: Path) -> None:
    typed = {"type": "text", "text": "What is <image>?"}
    rows = [{"messages": [user([PARTS[0], typed]), assistant("a mark, <image>")]}]
    (row,) = added(file(folder / "a.jsonl", rows))
    assert words(row) == ["<image>\nWhat is <image >?", "a mark, <image >"]


def test_rows_without_pictures_stay_text(folder: Path) -> None:
    rows = [{"id": "1", "conversations": [human("Say <video>"), gpt("x")]}]
    (row,) = added(file(folder / "a.json", rows))
    assert (row["images"], words(row)) == ([], ["Say <video>", "x"])


def test_tools_and_systems_are_read_as_in_conversations(folder: Path) -> None:
    turns = [
        human("<image>What?"),
        {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "<image>"}}'},
        {"from": "observation", "value": "a circle"},
        gpt("It is"),
    ]
    rows = [{"conversations": turns, "image": "p/1.png", "system": "Be brief.", "tools": '[{"name": "look"}]'}]
    (row,) = added(file(folder / "a.json", rows))
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant", "tool", "assistant"]
    assert json.loads(row["tools"])[0]["function"]["name"] == "look"
    renamed = [{"conversations": [{"from": "caller", "value": "<image>"}, gpt("x")], "image": "p/1.png"}]
    columns = Columns(roles=named_roles(["caller=user"]))
    assert words(added(file(folder / "b.json", renamed), columns=columns, replace=True)[0]) == ["<image>", "x"]


def test_metadata_is_dropped_and_rotation_honoured(folder: Path) -> None:
    exif = PillowImage.Exif()
    exif[0x0112], exif[0x010F] = 6, "A camera"
    lying = PillowImage.fromarray(np.zeros((300, 400, 3), np.uint8))
    (folder / "p/1.png").write_bytes(written([lying], "JPEG", exif=exif))
    (row,) = added(file(folder / "a.json", ONE_PICTURE["llava.json"]))
    assert b"A camera" not in row["images"][0]
    assert decode_picture(row["images"][0], "x").pixels.shape == (400, 300, 3)


def test_relative_paths_begin_at_the_file_or_at_the_folder_that_is_named(folder: Path) -> None:
    (folder / "json").mkdir()
    path = file(folder / "json/a.json", ONE_PICTURE["llava.json"])
    with pytest.raises(InputError, match=r"p/1\.png: not found in .*json; name the folder with --image-folder$"):
        added(path)
    assert added(path, columns=Columns(image_folder=folder))
    absolute = [{"image": str(folder / "p/1.png"), "conversations": [human("<image>"), gpt("x")]}]
    assert added(file(folder / "json/b.json", absolute), replace=True)
    os.symlink(folder / "p", folder / "json/p")
    assert added(path, replace=True)
    with pytest.raises(InputError, match="--image-folder: is not supported by documents; allowed: images"):
        add("documents", [path], "other", folder, Columns(image_folder=folder))


LOCATION = r"^a\.json: row 1 \(line 1\): "
NO_PATH = {"conversations": [human("<image>"), gpt("x")]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**NO_PATH, "image": "p/9.png"}, r"p/9\.png: not found in "),
        ({**NO_PATH, "image": "p"}, "p: not found in "),
        (
            {**NO_PATH, "image": "../x.png"},
            r"\.\./x\.png: leaves the folder of pictures; name its folder with --image-folder",
        ),
        ({**NO_PATH, "image": "p/../p/1.png"}, r"p/\.\./p/1\.png: leaves the folder"),
        ({**NO_PATH, "image": "/nowhere/1.png"}, "/nowhere/1.png: not found"),
        ({**NO_PATH, "image": "https://example.org/1.png"}, "https://example.org/1.png: nothing is fetched; download"),
        ({**NO_PATH, "image": "s3://bucket/1.png"}, "s3://bucket/1.png: nothing is fetched"),
        ({**NO_PATH, "image": "x" * 5000}, "'xxx.*not a path; expected a path, a data URL or bytes"),
        ({**NO_PATH, "image": "p\0x"}, r"'p\\x00x': not a path"),
        ({**NO_PATH, "image": ""}, "expected a path or a data URL, found str ''"),
        ({**NO_PATH, "image": {}}, "a picture without bytes, path or url: empty"),
        ({**NO_PATH, "image": 7}, "image: expected paths or files, found int"),
        ({**NO_PATH, "image": "data:image/png,abc"}, "'data:image/png': not a data URL of base64"),
        ({**NO_PATH, "image": "data:image/png;base64,%%%"}, "data URL: not base64: "),
        (
            {**NO_PATH, "image": "data:image/png;base64,aGVsbG8="},
            "data URL: no picture: it begins with b'hello'",
        ),
        ({**NO_PATH, "image": "p/c.mp4"}, r"p/c\.mp4: an MP4 clip where a picture is expected"),
        ({**NO_PATH, "video": "p/1.png"}, r"p/1\.png: a PNG picture where a clip is expected"),
        ({**NO_PATH, "image": "p/empty.png"}, r"p/empty\.png: empty file"),
        ({**NO_PATH, "image": "p/cut.png"}, r"p/cut\.png: not a readable PNG file"),
        (NO_PATH, "1 or more marks <image> for 0 images; give one for each"),
        ({**NO_PATH, "image": ["p/1.png", "p/2.png"]}, "1 marks <image> for 2 images"),
        ({"image": "p/1.png", "conversations": [human("What?"), gpt("x")]}, "0 marks <image> for 1 images"),
        (
            {"videos": ["p/c.mp4"], "conversations": [human("<video><video>"), gpt("x")]},
            "2 or more marks <video> for 1",
        ),
        ({"image": "p/1.png", "conversations": [human("Draw"), gpt("<image>")]}, "turn 2: a picture in an answer"),
        ({"image": "p/1.png", "conversations": [human("<image>")]}, "no assistant turn among 1"),
        ({"image": "p/1.png", "text": "x"}, "no conversation; found columns: image, text"),
        ({"image": "p/1.png", "conversations": "words"}, "conversations: not JSON: 'words'"),
        ({"image": "p/1.png", "conversations": ["x"]}, "turn 1: expected an object with role and content, found str"),
        (
            {"messages": [user([{"type": "input_audio"}]), assistant("x")]},
            "turn 1: a part of type 'input_audio'; allowed",
        ),
        ({"messages": [user([{"type": "image_url"}]), assistant("x")]}, "turn 1: image_url: names no picture"),
        ({"messages": [user([{"type": "image_url", "image_url": {}}]), assistant("x")]}, "a picture without bytes"),
        ({"messages": [user([{"type": "image"}]), assistant("x")]}, "turn 1: a part of type 'image' without a path"),
        ({"messages": [user([{"type": "video"}]), assistant("x")]}, "turn 1: a part of type 'video' without a path"),
        (
            {"messages": [user("<image>" * 65), assistant("x")], "images": ["p/1.png"] * 65},
            "more than the 64 pictures that are allowed",
        ),
    ],
)
def test_what_breaks_a_rule_is_named_and_nothing_is_kept(folder: Path, row: Row, message: str) -> None:
    (folder / "p/empty.png").touch()
    (folder / "p/cut.png").write_bytes(PNG[:-60])
    path = file(folder / "a.json", [row])
    with pytest.raises(InputError, match=LOCATION + message):
        added(path)
    assert not list((folder / "added").iterdir())


def test_a_large_file_is_not_read(folder: Path) -> None:
    with (folder / "p/1.png").open("r+b") as large:
        large.truncate(1 << 42)  # more than any memory holds
    with pytest.raises(InputError, match=r"p/1\.png: 4,398,046,511,104 bytes; at most 20,971,520 are allowed"):
        added(file(folder / "a.json", ONE_PICTURE["llava.json"]))


COCO = ONE_PICTURE["coco.json"]
assert isinstance(COCO, dict)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"annotations": [{"image_id": 4, "caption": "x"}]},
            r"annotations 1 \(line 1\): image_id 4 is not among the 1 ",
        ),
        (
            {"annotations": [{"image_id": 11, "bbox": []}]},
            r"annotations 1 \(line 1\): no caption; of COCO's annotations",
        ),
        ({"annotations": ["x"]}, "no caption"),
        ({"images": [{"id": 11}]}, r"images 1 \(line 1\): expected id and file_name, found id"),
        ({"annotations": []}, "no conversation; found columns: annotations, info, images"),
    ],
)
def test_captions_of_no_picture_are_named(folder: Path, changed: Row, message: str) -> None:
    with pytest.raises(InputError, match=message):
        added(file(folder / "coco.json", {**COCO, **changed}))


@pytest.mark.parametrize("cut", range(20, len(json.dumps(COCO)) - 1, 10))
def test_damaged_coco_files_are_refused(folder: Path, cut: int) -> None:
    (folder / "coco.json").write_text(json.dumps(COCO)[:cut], encoding="utf-8")
    with pytest.raises(InputError, match=r"^coco\.json"):
        added(folder / "coco.json")


def test_each_caption_of_a_picture_is_a_row(folder: Path) -> None:
    captions = [{"image_id": 11, "caption": f"Caption {number}"} for number in range(5)]
    rows = added(file(folder / "coco.json", {**COCO, "annotations": captions}))
    assert [words(row)[1] for row in rows] == [caption["caption"] for caption in captions]
    assert coco_captions.INSTRUCTION in words(rows[0])[0]
    assert len({row["id"] for row in rows}) == 5


def test_rows_are_identified_by_their_pictures_and_words(folder: Path) -> None:
    def row(picture: str, answer: str) -> Row:
        return {"image": picture, "conversations": [human("<image>"), gpt(answer)]}

    FIRST.save(folder / "p/copy.bmp.webp", "WEBP", lossless=True)  # the same pixels in another file
    rows = [row("p/1.png", "a"), row("p/2.png", "a"), row("p/1.png", "b"), row("p/copy.bmp.webp", "a")]
    assert len({each["id"] for each in added(file(folder / "a.json", rows))}) == 3
    assert read_info(folder / "added/mine").dropped == {"exact_duplicate": 1}


def test_a_dataset_of_its_own_kind_is_added_as_it_is(folder: Path) -> None:
    rows = added(file(folder / "a.jsonl", CLIPS["factory.jsonl"] + ONE_PICTURE["factory.jsonl"]))
    (shard,) = shards(folder / "added/mine", "train")
    again = folder / "again.parquet"
    again.write_bytes(shard.read_bytes())
    add("images", [again], "again", folder / "added")
    assert list(read_rows(folder / "added/again", "train")) == rows


def test_rows_are_written_as_they_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty pictures of 1.5 MB each take the memory of a few."""
    monkeypatch.setattr(formats, "PICTURE_BYTES_PER_GROUP", 4 << 20)
    rng = np.random.default_rng(0)
    rows = []
    for number in range(40):
        PillowImage.fromarray(rng.integers(0, 256, (700, 700, 3), dtype=np.uint8)).save(
            folder / f"p/{number}.jpg", quality=95
        )
        rows.append({"image": f"p/{number}.jpg", "conversations": [human("<image>"), gpt("x")]})
    path = file(folder / "a.json", rows)
    tracemalloc.start()
    info = add("images", [path], "mine", folder / "added")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    (shard,) = shards(folder / "added/mine", "train")
    assert info.rows == {"train": 40}
    assert shard.stat().st_size > 20 << 20
    assert pq.ParquetFile(shard).num_row_groups > 4
    assert peak < 20 << 20


def failing(rows: Sequence[Row]) -> Mapping[int, str]:
    return {number: "Every turn says something" for number, row in enumerate(rows) if not words(row)[1]}


def test_rows_that_break_a_rule_go_to_the_quarantine(folder: Path) -> None:
    def row(picture: str, answer: str = "x") -> Row:
        return {"image": picture, "conversations": [human("<image>"), gpt(answer)]}

    (folder / "p/cut.png").write_bytes(PNG[:-60])
    path = file(
        folder / "a.jsonl", [row("p/1.png"), row("p/cut.png"), row("p/2.png", ""), row("p/9.png"), row("p/2.png")]
    )
    left_out = folder / "left_out.jsonl"
    with Quarantine(left_out, failing) as quarantine:
        rows = added(path, quarantine=quarantine)
    assert [words(each)[1] for each in rows] == ["x", "x"]
    assert read_info(folder / "added/mine").dropped == {"quarantined": 3}
    lines = [json.loads(line) for line in left_out.read_text().splitlines()]
    assert [(line["location"], line["reason"].partition(":")[0]) for line in lines] == [
        ("a.jsonl:2", "p/cut.png"),
        ("a.jsonl:4", "p/9.png"),
        ("a.jsonl:3", "Every turn says something"),
    ]
    assert lines[1]["row"] == row("p/9.png")
    assert lines[2]["row"]["images"][0].endswith(" bytes)")


def test_a_quarantine_without_rows_or_without_a_dataset_is_no_file(folder: Path) -> None:
    left_out = folder / "left_out.jsonl"
    with Quarantine(left_out) as quarantine:
        added(file(folder / "a.json", ONE_PICTURE["llava.json"]), quarantine=quarantine)
    assert not left_out.exists()
    all_bad = file(folder / "b.json", [{**NO_PATH, "image": "p/9.png"}])
    with (
        pytest.raises(InputError, match="mine: no row is left: each breaks a rule"),
        Quarantine(left_out) as quarantine,
    ):
        added(all_bad, quarantine=quarantine, replace=True)
    assert not left_out.exists()
    left_out.touch()
    with pytest.raises(InputError, match=r"--quarantine: .*left_out\.jsonl exists already; name a new file"):
        Quarantine(left_out).__enter__()
    with pytest.raises(InputError, match="--quarantine: /nowhere/x: cannot be written: "):
        Quarantine(Path("/nowhere/x")).__enter__()
    with (
        pytest.raises(InputError, match="--quarantine: is not supported by documents; allowed: images"),
        Quarantine(folder / "new") as quarantine,
    ):
        add("documents", [all_bad], "other", folder, quarantine=quarantine)


def test_rows_refused_after_quarantine_are_named_by_their_own_lines(folder: Path) -> None:
    """The files are read a second time: what was left out the first time is not counted."""

    def row(picture: str, answer: str = "x") -> Row:
        return {"image": picture, "conversations": [human("<image>"), gpt(answer)]}

    def refusing(dataset: Path) -> ValidationReport:
        check = Check("rule", None, "a rule", "train-00000.parquet", rows=2, failed=1)
        check.note(Example("train-00000.parquet", 2, "id", "value"))
        return ValidationReport("mine", "images", {"train": 2}, [check])

    path = file(folder / "a.jsonl", [row("p/9.png"), row("p/1.png"), row("p/2.png", ""), row("p/2.png")])
    with pytest.raises(Refused, match=r"a\.jsonl:4 \(id id\)"), Quarantine(folder / "out", failing) as quarantine:
        added(path, check=refusing, quarantine=quarantine)
    assert not (folder / "out").exists()


def test_the_writer_bounds_a_row_group_by_the_bytes_of_its_pictures(tmp_path: Path) -> None:
    large = bytes(30 << 20)
    with DatasetWriter(tmp_path / "d", "d", "images") as writer:
        for number in range(5):
            writer.write("train", {"id": str(number), "images": [large], "messages": []})
    (shard,) = shards(tmp_path / "d", "train")
    groups = pq.ParquetFile(shard).metadata
    assert [groups.row_group(number).num_rows for number in range(groups.num_row_groups)] == [3, 2]


def test_formats_are_checked_before_anything_is_read(folder: Path) -> None:
    (folder / "a.csv").write_text("image,caption\n", encoding="utf-8")
    refused: Callable[[], object] = lambda: added(folder / "a.csv")  # noqa: E731
    with pytest.raises(
        InputError, match=r"'\.csv' is not a format of this kind; allowed: \.jsonl, \.ndjson, \.json, \.parquet"
    ):
        refused()


ODD: list[Any] = [
    None,
    "",
    " ",
    0,
    1.5,
    True,
    [],
    {},
    [None],
    [[]],
    {"a": None},
    "[]",
    "[1]",
    "<image>",
    "p/1.png",
    "\0",
    "data:,",
]
SHAPES = [content[0] for content in (*ONE_PICTURE.values(), *CLIPS.values()) if isinstance(content, list)]


def damaged(value: Any, rng: random.Random) -> Any:
    """The value with something odd in a place within it."""
    if rng.random() < 0.2 or not value or not isinstance(value, dict | list):
        return rng.choice(ODD)
    if isinstance(value, list):
        number = rng.randrange(len(value))
        return [*value[:number], damaged(value[number], rng), *value[number + 1 :]]
    name = rng.choice(list(value))
    if rng.random() < 0.15:
        return {key: each for key, each in value.items() if key != name}
    return {**value, name: damaged(value[name], rng)}


def test_odd_rows_are_added_or_refused_in_a_line(folder: Path) -> None:
    rng = random.Random(5)
    reasons = []
    for _ in range(CASES):
        row = damaged(rng.choice(SHAPES), rng)
        suffix = rng.choice((".json", ".jsonl"))
        try:
            path = file(folder / f"odd{suffix}", [row])
        except TypeError:
            continue  # bytes of a Parquet file
        try:
            added(path, replace=True)
        except InputError as error:
            reasons.append(str(error))
    assert len(reasons) > CASES / 10
    assert not [reason for reason in reasons if "\n" in reason]
