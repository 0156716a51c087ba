"""COCO's captions: `images` and `annotations` of one JSON object, read item by item.

Format: cocodataset.org, Data format, sections 1 and 5. Memory holds the file name of each picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from components.config.params import InputError
from components.datasets.records import JsonStream, Record
from components.media.messages import IMAGE

INSTRUCTION = "Describe the picture."
"""What the user says of every picture; the caption is the answer."""


def file_names(path: Path) -> dict[Any, str] | None:
    """The file name of each picture by its id; None for a file that is not COCO's.

    Raises: InputError for an image without id or file name, and for damaged JSON.
    """
    names: dict[Any, str] = {}
    annotated = False
    for name, location, item in _items(path):
        if name == "annotations":
            annotated = True
        elif not isinstance(item, Mapping):
            return None  # a row of another format with a list of pictures
        else:
            identity, file = item.get("id"), item.get("file_name")
            if not isinstance(identity, int | str) or not isinstance(file, str):
                raise InputError(f"{location}: expected id and file_name, found {', '.join(item) or 'neither'}")
            names[identity] = file
    return names if annotated else None


def read_captions(path: Path, names: Mapping[Any, str]) -> Iterator[Record]:
    """A question and its answer for each caption.

    Raises: InputError for an annotation without caption, or of a picture that is not listed.
    """
    for name, location, item in _items(path):
        if name != "annotations":
            continue
        caption = item.get("caption") if isinstance(item, Mapping) else None
        if not isinstance(caption, str):
            raise InputError(f"{location}: no caption; of COCO's annotations, captions alone are read")
        identity = item.get("image_id")
        if not isinstance(identity, int | str) or identity not in names:
            raise InputError(f"{location}: image_id {identity!r} is not among the {len(names):,} images of the file")
        question = {"role": "user", "content": f"{IMAGE}\n{INSTRUCTION}"}
        answer = {"role": "assistant", "content": caption.strip()}
        yield Record(location, {"image": names[identity], "messages": [question, answer]})


def _items(path: Path) -> Iterator[tuple[str, str, Any]]:
    """(images or annotations, location, value) of each item of the two lists; of no other value of the file."""
    with path.open(encoding="utf-8-sig") as file:
        stream = JsonStream(path.name, file)
        if not stream.take("{"):
            return
        first = True
        while not stream.take("}"):
            if not first:
                stream.expect(",")
            first = False
            _, name = stream.value()
            stream.expect(":")
            if name not in ("images", "annotations") or not stream.take("["):
                stream.value()
                continue
            number = 0
            while not stream.take("]"):
                if number:
                    stream.expect(",")
                number += 1
                line, value = stream.value()
                yield name, f"{path.name}: {name} {number} (line {line})", value
