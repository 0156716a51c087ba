"""Pictures and clips of chat requests: from the parts that a client sent to pictures for the model and for the record.

Files are fetched on the event loop and decoded on threads of their own, a few at a time; a request has as many pictures
and pixels as its limits allow, and the number of requests that are read at once is bounded.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from components.config.loop_settings import ServeConfig
from components.config.params import InputError
from components.feedback.pictures import PictureFile, clip_reference, marked_content, reference
from components.media.clips import clip_content, decode_clip
from components.media.pictures import Picture, decode_picture
from serving.http.content_parts import ImagePart, MediaPart, Part, VideoPart
from serving.http.errors import ApiError
from serving.http.fetching import Hosts, fetch
from serving.http.schemas import Message

logger = logging.getLogger("loopwright.media")

T = TypeVar("T")
Place = tuple[int, int]
"""The number of a message, and the index of a part of its content."""
DECODERS = 2
"""Requests whose pictures are decoded at the same time."""
MAX_PIXELS = 32_000_000
"""Pixels of a request's pictures together: 96 MB in memory."""
FETCH_SECONDS = 10.0
"""Longest time for the files of a request that are fetched."""
RETRY = {"Retry-After": "1"}
TEXT_ONLY = "this model reads text only; send parts of type 'text'"


@dataclass(frozen=True)
class RequestMedia:
    """The pictures of one request."""

    contents: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    """Recorded content of each message with pictures, by its number."""
    pictures: dict[str, Picture] = field(default_factory=dict)
    """By digest."""
    files: list[PictureFile] = field(default_factory=list)
    """As they are stored, each once."""

    def messages(self, plain: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages for the model: those with pictures get marks in their content, and `images`."""
        return [self._message(number, message) for number, message in enumerate(plain)]

    def _message(self, number: int, message: dict[str, Any]) -> dict[str, Any]:
        if number not in self.contents:
            return message
        content, digests = marked_content(self.contents[number])
        return {**message, "content": content, "images": [self.pictures[digest] for digest in digests]}

    def recorded(self, body: dict[str, Any]) -> dict[str, Any]:
        """The request's body as it is recorded: each picture by its digest."""
        messages = [
            {**message, "content": self.contents[number]} if number in self.contents else message
            for number, message in enumerate(body["messages"])
        ]
        return {**body, "messages": messages}


NO_MEDIA = RequestMedia()


class MediaReader:
    """Reads the pictures and clips of requests."""

    def __init__(self, config: ServeConfig) -> None:
        self._max_pictures, self._max_bytes = config.max_pictures, config.max_picture_body_bytes
        self._hosts = Hosts(config.allowed_image_hosts)
        self._room = config.max_running
        """Requests that are read or wait to be, at most."""
        self._pool = ThreadPoolExecutor(DECODERS, "decode")
        self._reading = 0

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    async def read(self, messages: Sequence[Message]) -> RequestMedia:
        """The decoded pictures and clips of messages.

        Raises: ApiError that names the part which is wrong; 429 while too many requests are read.
        """
        parts = {(number, index): part for number, message in enumerate(messages) for index, part in message.media}
        self._check_count(len(parts))
        if self._reading >= self._room:
            raise ApiError(429, "the queue of pictures is full; try again in 1 s", "queue_full", None, RETRY)
        self._reading += 1
        try:
            files = await self._files(parts)
            return await asyncio.get_running_loop().run_in_executor(self._pool, self._decode, messages, files)
        finally:
            self._reading -= 1

    def _check_count(self, count: int) -> None:
        if count > self._max_pictures:
            message = f"messages: {count} pictures; send at most {self._max_pictures} (serve.max_pictures)"
            raise ApiError(400, message, "too_many_images", "messages")

    async def _files(self, parts: Mapping[Place, MediaPart]) -> dict[Place, str | bytes]:
        """The data URLs as sent, and the files that addresses lead to, in the time and of the size of one."""
        files: dict[Place, str | bytes] = {}
        left, deadline = self._max_bytes, time.monotonic() + FETCH_SECONDS
        for position, part in parts.items():
            if part.url[:5].lower() == "data:":
                files[position] = part.url
                continue
            param = f"{where(*position)}.{part.type}"
            files[position] = content = await fetch(part.url, self._hosts, left, deadline - time.monotonic(), param)
            left -= len(content)
        return files

    def _decode(self, messages: Sequence[Message], files: Mapping[Place, str | bytes]) -> RequestMedia:
        contents: dict[int, list[dict[str, Any]]] = {}
        pictures: dict[str, Picture] = {}
        count = pixels = 0
        for (number, index), file in files.items():
            content = messages[number].content
            assert isinstance(content, list)
            part = content[index]
            assert isinstance(part, MediaPart)
            recorded, decoded = _read_part(part, file, f"{where(number, index)}.{part.type}")
            count, pixels = count + len(decoded), pixels + sum(each.pixels.size // 3 for each in decoded)
            self._check_count(count)
            if pixels > MAX_PIXELS:
                message = f"messages: {pixels} pixels in its pictures; send at most {MAX_PIXELS}"
                raise ApiError(400, message, "image_too_large", "messages")
            pictures |= {each.digest: each for each in decoded}
            contents.setdefault(number, _dumped(content))[index] = recorded
        return RequestMedia(contents, pictures, [PictureFile.of(picture) for picture in pictures.values()])


def where(number: int, index: int) -> str:
    """The path of a content part in the body."""
    return f"messages[{number}].content[{index}]"


def refuse_media(messages: Sequence[Message]) -> None:
    """Raises: ApiError that names the first picture or clip, for a model that reads text only."""
    for number, message in enumerate(messages):
        for index, _ in message.media:
            param = where(number, index)
            raise ApiError(400, f"{param}: {TEXT_ONLY}", "unsupported_parameter", param)


def _read_part(part: MediaPart, file: str | bytes, param: str) -> tuple[dict[str, Any], list[Picture]]:
    """The recorded part and its pictures.

    Raises: ApiError.
    """
    kind = "image" if isinstance(part, ImagePart) else "video"
    content = file if isinstance(file, bytes) else _data(file, param, kind)
    if isinstance(part, VideoPart):
        frames = _decoded(decode_clip, content, param, kind)
        named = [(frame.seconds, frame.picture.digest) for frame in frames]
        return clip_reference(clip_content(frames), named), [frame.picture for frame in frames]
    picture = _decoded(decode_picture, content, param, kind)
    return reference(picture.digest), [picture]


def _decoded(decode: Callable[[bytes, str], T], content: bytes, param: str, kind: str) -> T:
    """What a decoder reads in bytes that anyone may have sent; its every failure is the sender's.

    Raises: ApiError.
    """
    code = f"invalid_{kind}"
    try:
        return decode(content, param)
    except InputError as error:
        raise ApiError(400, str(error), code, param) from None
    except Exception:
        logger.exception("%s: a decoder failed otherwise than by refusing its input", param)
        raise ApiError(400, f"{param}: damaged, or of a format that is not supported", code, param) from None


def _data(url: str, param: str, kind: str) -> bytes:
    """The bytes of a data URL; its media type is not read, the content tells.

    Raises: ApiError.
    """
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        message = f"{param}: not a data URL in base64; send data:{kind}/TYPE;base64,DATA"
        raise ApiError(400, message, f"invalid_{kind}_url", param)
    try:
        content = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"{param}: its data is not base64: {error}", f"invalid_base64_{kind}", param) from None
    if not content:
        raise ApiError(400, f"{param}: no data; send the bytes of a file", f"invalid_{kind}", param)
    return content


def _dumped(content: Sequence[Part]) -> list[dict[str, Any]]:
    return [part.model_dump(exclude_unset=True) for part in content]
