"""Rows of kind `images` from the formats of others: turns with pictures and clips, which become marks and files.

Formats: LLaVA and ShareGPT-4V (`image`, `conversations`), LLaMA-Factory (`images`, `videos`), OpenAI content parts
(`image_url`, `video_url`), COCO captions, and Parquet with embedded files as the library `datasets` writes it.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from components.config.params import InputError
from components.datasets.coco_captions import file_names, read_captions
from components.datasets.conversations import ROLES, content_of, parsed, read_conversation, role_of, turns_of
from components.datasets.formats import Row
from components.datasets.records import Record, read_json, read_parquet
from components.media.clips import clip_content, decode_clip
from components.media.messages import IMAGE, check_marks, join_parts, plain_text
from components.media.pictures import LIMITS, Limits, decode_picture, format_of

VIDEO = "<video>"
_MARKS = re.compile(f"({IMAGE}|{VIDEO})")
# Formats begin a turn by marks with or without space; a request has them on lines of their own (join_parts).
_LEADING_MARKS = {
    with_clips: re.compile(rf"\s*(?:(?:{IMAGE}|{VIDEO if with_clips else IMAGE})\s*)+") for with_clips in (False, True)
}
_OTHER_COLUMNS = ("tools", "functions", "label", "kto_tag", "rejected", "non_preferred_output", "rejected_response")
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")
_PATH_CHARS = 4_096
_PARTS = {"image_url": IMAGE, "image": IMAGE, "video_url": VIDEO, "video": VIDEO}
"""The mark of each type of content part."""
Source = str | bytes | Mapping[str, Any]
"""A path, a data URL, the bytes of a file, or an object that holds one of these."""

read_picture_parquet = partial(read_parquet, batch_rows=8)
"""Rows of a Parquet file, few in memory at a time, for they hold pictures."""


def read_picture_json(path: Path) -> Iterator[Record]:
    """Objects of a JSON array or of JSON lines, or a row for each caption of a file of COCO's."""
    names = file_names(path) if path.suffix.lower() == ".json" else None
    return read_json(path) if names is None else read_captions(path, names)


def read_picture_row(
    location: str,
    values: Mapping[str, Any],
    folder: Path,
    roles: Mapping[str, str] = ROLES,
    limits: Limits = LIMITS,
) -> Row:
    """The columns of kind `images`, but for the id, of one record; `folder` is the one of relative paths.

    Raises: InputError naming the location, the file or value, and the reason.
    """
    turns = turns_of(location, values)
    row = _RowBuilder(location, values, turns, folder, limits)
    turns = [row.turn(number, turn, roles) for number, turn in enumerate(turns, 1)]
    others = {name: values[name] for name in _OTHER_COLUMNS if name in values}
    messages, tools = read_conversation(location, {**others, "messages": turns}, roles)
    row.finish()
    for number, message in enumerate(messages, 1):
        if message["role"] == "assistant" and IMAGE in message["content"]:
            raise InputError(f"{location}: turn {number}: a picture in an answer; the model writes words alone")
    check_marks(messages, len(row.files), location, limits)
    return {"images": row.files, "messages": messages, "tools": tools, "suite": None}


class _RowBuilder:
    """Replaces the marks and parts of turns in order by pictures and clips of the record's columns or of the parts."""

    def __init__(
        self, location: str, values: Mapping[str, Any], turns: Sequence[Any], folder: Path, limits: Limits
    ) -> None:
        self.files: list[bytes] = []
        self._location, self._folder, self._limits = location, folder, limits
        images = _sources(location, values, ("images", "image"))
        videos = _sources(location, values, ("videos", "video"))
        self._columns = {IMAGE: images or [], VIDEO: videos or []}
        self._used = {IMAGE: 0, VIDEO: 0}
        contents = [content_of(turn) for turn in turns if isinstance(turn, Mapping)]
        # LLaVA-Video and the like mark a clip as LLaVA does a picture.
        self._clips_as_images = bool(videos) and not images and VIDEO not in str(contents)
        in_parts = any(isinstance(content, list) for content in contents)
        self._typed = images is None and videos is None and in_parts

    def turn(self, number: int, turn: Any, roles: Mapping[str, str]) -> Any:
        """The turn, its content a text with the mark <image> for each picture."""
        if not isinstance(turn, Mapping):
            return turn  # refused with its reason by the reader of conversations
        content = content_of(turn)
        if role_of(turn, roles) == "call" or not isinstance(content, str | list):
            return turn
        location = f"{self._location}: turn {number}"
        return {**turn, "content": self._text(content) if isinstance(content, str) else self._parts(location, content)}

    def finish(self) -> None:
        """Raises: InputError for pictures and clips that no mark stands for."""
        for mark, column in self._columns.items():
            if self._used[mark] != len(column):
                raise self._miscounted(mark)

    def _text(self, text: str) -> str:
        if self._typed:  # pictures are in parts, so a mark was typed by someone
            return plain_text(text)
        leading = _LEADING_MARKS[bool(self._columns[VIDEO])].match(text)
        parts = [(self._marked(mark), True) for mark in _MARKS.findall(leading[0])] if leading else []
        rest = _MARKS.split(text[leading.end() :] if leading else text)
        return join_parts([*parts, ("".join(map(self._marked, rest)), False)])

    def _marked(self, mark: str) -> str:
        if mark not in (IMAGE, VIDEO) or (mark == VIDEO and not self._columns[VIDEO]):
            return mark  # text, or a word like any other, where there are no clips
        mark = VIDEO if self._clips_as_images else mark
        self._used[mark] += 1
        if self._used[mark] > len(self._columns[mark]):
            raise self._miscounted(mark)
        return self._add(self._columns[mark][self._used[mark] - 1], mark)

    def _miscounted(self, mark: str) -> InputError:
        count, column = len(self._columns[mark]), "videos" if mark == VIDEO else "images"
        marks = f"{max(self._used[mark], count + 1)} or more" if self._used[mark] > count else str(self._used[mark])
        return InputError(f"{self._location}: {marks} marks {mark} for {count} {column}; give one for each")

    def _parts(self, location: str, parts: Sequence[Any]) -> str:
        texts = []
        for part in parts:
            kind = str(part.get("type", "text")) if isinstance(part, Mapping) else type(part).__name__
            if kind == "text" and isinstance(part.get("text"), str):
                texts.append((plain_text(part["text"]), False))
            elif kind in _PARTS:
                texts.append((self._part(location, part, kind), True))
            else:
                raise InputError(
                    f"{location}: a part of type {kind!r}; allowed: text, image_url, video_url, and image and video "
                    "with a path or with columns images and videos"
                )
        return join_parts(texts)

    def _part(self, location: str, part: Mapping[str, Any], kind: str) -> str:
        source = next((part[name] for name in (kind, "url", "path") if part.get(name) is not None), None)
        if source is not None:
            return self._add(source, _PARTS[kind])
        if kind.endswith("_url"):
            raise InputError(f"{location}: {kind}: names no picture; expected {{'url': a data URL or a path}}")
        if not self._columns[_PARTS[kind]]:
            raise InputError(f"{location}: a part of type {kind!r} without a path, and no column holds one for it")
        return self._marked(_PARTS[kind])

    def _add(self, source: Source, mark: str) -> str:
        """The mark, or the marked times, of a picture or a clip, whose files are added to the row."""
        if len(self.files) >= self._limits.pictures:
            raise InputError(f"{self._location}: more than the {self._limits.pictures} pictures that are allowed")
        content, name = _read(self._location, source, self._folder, self._limits)
        where = f"{self._location}: {name}"
        if mark == IMAGE:
            self.files.append(decode_picture(content, where, self._limits).file())
            return IMAGE
        frames = decode_clip(content, where, self._limits)
        self.files += [frame.picture.file() for frame in frames]
        return clip_content(frames)


def _sources(location: str, values: Mapping[str, Any], names: Sequence[str]) -> list[Source] | None:
    """The pictures or clips of a record's column, which holds one or a list; None without the column."""
    name = next((name for name in names if values.get(name) is not None), None)
    if name is None:
        return None
    value = values[name]
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        value = parsed(location, name, value)
    sources = value if isinstance(value, list) else [value]
    for source in sources:
        if not isinstance(source, str | bytes | Mapping):
            raise InputError(f"{location}: {name}: expected paths or files, found {type(source).__name__}")
    return sources


def _read(location: str, source: Source, folder: Path, limits: Limits) -> tuple[bytes, str]:
    """(bytes of a file, its name in messages). Raises: InputError for what is no readable file."""
    if isinstance(source, Mapping):  # datasets' {"bytes", "path"}, or OpenAI's {"url"}
        names = [name for name in ("bytes", "path", "url") if source.get(name) is not None]
        if not names:
            raise InputError(f"{location}: a picture without bytes, path or url: {', '.join(source) or 'empty'}")
        content = source[names[0]]
        if names[0] == "bytes":
            path = source.get("path") or "embedded file"
            return content if isinstance(content, bytes) else str(content).encode(), str(path)
        source = content
    if isinstance(source, bytes):
        return source, "embedded file"
    if not isinstance(source, str) or not source:
        raise InputError(
            f"{location}: expected a path or a data URL, found {type(source).__name__} {str(source)[:40]!r}"
        )
    if "\0" in source and format_of(source.encode()):
        return source.encode(), "embedded file"  # of bytes that are UTF-8 throughout, which Parquet's reader decodes
    if source.startswith("data:"):
        return _from_data_url(location, source, limits), "data URL"
    return _from_path(location, source, folder, limits), source


def _from_data_url(location: str, url: str, limits: Limits) -> bytes:
    header, comma, body = url.partition(",")
    if not comma or not header.endswith(";base64"):
        raise InputError(f"{location}: {header[:60]!r}: not a data URL of base64; expected data:image/png;base64,…")
    if len(body) > limits.file_bytes * 4 // 3 + 4:
        raise InputError(
            f"{location}: data URL: {len(body) * 3 // 4:,} bytes; at most {limits.file_bytes:,} are allowed"
        )
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{location}: data URL: not base64: {error}; encode the file anew") from None


def _from_path(location: str, name: str, folder: Path, limits: Limits) -> bytes:
    """The content of a file within the folder, or of an absolute path; links are followed."""
    if name.startswith("file://"):
        name = name.removeprefix("file://")
    elif _URL.match(name):
        raise InputError(f"{location}: {name[:200]}: nothing is fetched; download the file and name its path")
    if "\0" in name or len(name) > _PATH_CHARS:
        raise InputError(f"{location}: {name[:60]!r}: not a path; expected a path, a data URL or bytes")
    path = Path(name)
    if ".." in path.parts:
        raise InputError(f"{location}: {name}: leaves the folder of pictures; name its folder with --image-folder")
    path = folder / path
    try:
        if not path.is_file():
            raise InputError(f"{location}: {name}: not found in {folder}; name the folder with --image-folder")
        if (size := path.stat().st_size) > limits.file_bytes:
            raise InputError(f"{location}: {name}: {size:,} bytes; at most {limits.file_bytes:,} are allowed")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{location}: {name}: cannot be read: {error.strerror}") from None
