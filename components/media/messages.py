"""Pictures within messages: marks in their content, and what they mark."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from components.config.errors import InputError
from components.media.limits import LIMITS, Limits

if TYPE_CHECKING:
    from components.media.pictures import Picture

IMAGE = "<image>"
"""Stands in a message's content where a picture is; the pictures are in the message's `images`, in order."""

_MARK = re.compile(rf"(?:\d+\.\d s )?{IMAGE}")
"""A picture's mark, of a clip's frame with its time."""


class PicturesUnsupported(InputError):
    """Messages with pictures for a model that reads text only."""


def plain_text(text: str) -> str:
    """A text that someone typed, whose marks stand for no picture: broken, so that none is taken for one."""
    return text.replace(IMAGE, "<image >")


def without_marks(text: str) -> str:
    """A message's content without the marks of pictures."""
    return _MARK.sub("", text)


def join_parts(parts: Sequence[tuple[str, bool]]) -> str:
    """A message's content of its parts, (text, whether it is of pictures): texts as they are, pictures on own lines.

    The one rule by which content parts of a request and of a dataset become the same text.
    """
    content, after_pictures = "", False
    for text, of_pictures in parts:
        border = content and text and (of_pictures or after_pictures) and content[-1:] != "\n" and text[:1] != "\n"
        content += ("\n" if border else "") + text
        after_pictures = of_pictures
    return content


def with_pictures(
    messages: Sequence[Mapping[str, Any]], pictures: Sequence[Picture], limits: Limits = LIMITS
) -> list[dict[str, Any]]:
    """Messages as read from a row of kind `images`, each with its pictures, which its marks count, in `images`.

    Raises: InputError when there are more or fewer marks than pictures, or more pictures than are allowed.
    """
    left, complete = list(pictures), []
    for message in messages:
        count = str(message.get("content") or "").count(IMAGE)
        complete.append({**message, "images": left[:count]} if count else dict(message))
        del left[:count]
    check_marks(messages, len(pictures), "messages", limits)
    return complete


def check_marks(messages: Sequence[Mapping[str, Any]], pictures: int, where: str, limits: Limits = LIMITS) -> None:
    """Raises: InputError when there are more or fewer marks than pictures, or more pictures than are allowed."""
    marks = sum(str(message.get("content") or "").count(IMAGE) for message in messages)
    if marks != pictures:
        raise InputError(f"{where}: {marks} marks {IMAGE} for {pictures} pictures; give one for each")
    if pictures > limits.pictures:
        raise InputError(f"{where}: {pictures} pictures; at most {limits.pictures} are allowed")


def pictures_of(messages: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """The pictures of messages, in order."""
    return [picture for message in messages for picture in message.get("images") or ()]
