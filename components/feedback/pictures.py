"""Pictures of recorded requests: the record names each by its digest, and the database has its file once.

In a recorded message a picture is `{"type": "image_url", "image_url": {"url": "loopwright:sha256:DIGEST"}}`, and a clip
`{"type": "video_url", "video_url": {"text", "frames": [{"seconds", "url"}]}}`, whose text has a mark for each frame.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, func, select

from components.config.errors import InputError
from components.datasets.formats import batched
from components.feedback.database import Database
from components.feedback.tables import PICTURES, REQUEST_PICTURES, REQUESTS
from components.media.messages import IMAGE, join_parts, plain_text
from components.media.pictures import Picture

REFERENCE = "loopwright:sha256:"
"""Before the digest, in place of a picture's data URL."""


class UnknownPicture(InputError):
    """A digest that this database has no picture of."""


@dataclass(frozen=True)
class PictureFile:
    """A picture as it is stored."""

    digest: str
    width: int
    height: int
    content: bytes
    """PNG."""

    @classmethod
    def of(cls, picture: Picture) -> PictureFile:
        height, width = picture.pixels.shape[:2]
        return cls(picture.digest, width, height, picture.png())


class Pictures(Database):
    """The part of the store that has the pictures."""

    def picture(self, digest: str, completion_id: str | None = None, viewer: str | None = None) -> bytes:
        """The PNG file of a picture: of that completion's request, which `viewer` owns (None: sees all), or of any.

        Raises: UnknownPicture.
        """
        statement = select(PICTURES.c.content).where(PICTURES.c.digest == digest)
        if completion_id is not None:
            # Who has a picture could else ask whether anybody sent it.
            request = select(REQUESTS.c.id).where(REQUESTS.c.id == completion_id.replace("\0", ""))
            if viewer is not None:
                request = request.where(REQUESTS.c.owner == viewer)
            shown = select(REQUEST_PICTURES.c.digest).where(REQUEST_PICTURES.c.request_id.in_(request))
            statement = statement.where(PICTURES.c.digest.in_(shown))
        content = self._scalar(statement)
        if content is None:
            raise UnknownPicture(f"{digest}: no such picture in {completion_id or self.address}")
        return bytes(content)

    def pictures_of(self, completion_id: str) -> list[dict[str, Any]]:
        """`digest`, `width`, `height` (pixels) and `bytes` of each picture of a request."""
        columns = (PICTURES.c.digest, PICTURES.c.width, PICTURES.c.height)
        return self._rows(
            select(*columns, func.length(PICTURES.c.content).label("bytes"))
            .join(REQUEST_PICTURES, REQUEST_PICTURES.c.digest == PICTURES.c.digest)
            .where(REQUEST_PICTURES.c.request_id == completion_id)
            .order_by(PICTURES.c.digest)
        )

    def known_pictures(self, digests: Collection[str]) -> set[str]:
        """Those of the digests whose picture is stored."""
        with self._read() as connection:
            return {known for group in batched(digests, 500) for known in _known(connection, group)}

    def _add_pictures(self, connection: Connection, completion_id: str, pictures: Iterable[PictureFile]) -> None:
        """Store the pictures of a request that is in this transaction; those stored before are only referred to."""
        files = {picture.digest: picture for picture in pictures}
        if not files:
            return
        known = _known(connection, files)
        rows = [{**vars(file), "created": time.time()} for digest, file in files.items() if digest not in known]
        if rows:
            connection.execute(PICTURES.insert(), rows)
        references = [{"request_id": completion_id, "digest": digest} for digest in files]
        connection.execute(REQUEST_PICTURES.insert(), references)


def _known(connection: Connection, digests: Collection[str]) -> set[str]:
    return set(connection.scalars(select(PICTURES.c.digest).where(PICTURES.c.digest.in_(list(digests)))))


def reference(digest: str) -> dict[str, Any]:
    """The recorded content part of a picture."""
    return {"type": "image_url", "image_url": {"url": REFERENCE + digest}}


def clip_reference(text: str, frames: Iterable[tuple[float, str]]) -> dict[str, Any]:
    """The recorded content part of a clip: its text with marks, and the time in seconds and digest of each frame."""
    named = [{"seconds": seconds, "url": REFERENCE + digest} for seconds, digest in frames]
    return {"type": "video_url", "video_url": {"text": text, "frames": named}}


def marked_content(content: str | Sequence[Mapping[str, Any]] | None) -> tuple[str, list[str]]:
    """Recorded content as text with a mark where a picture stands, and the pictures' digests.

    Pictures and clips are on lines of their own, as datasets of kind `images` have them. A mark that a person typed is
    broken, also across parts, so that marks and digests are as many.
    """
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or ()
    pieces, typed, digests = list[tuple[str, bool]](), "", list[str]()
    for part in parts:
        marks, names = _media(part)
        if names:
            pieces += [(plain_text(typed), False), (marks, True)]
            typed = ""
            digests += names
        else:
            typed += str(part.get("text") or part.get("refusal") or "")
    return join_parts([*pieces, (plain_text(typed), False)]), digests


def _media(part: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The text and digests of a picture or clip; no digests for other parts, and for those recorded without."""
    if part.get("type") == "image_url":
        digest = _digest(part.get("image_url"))
        return IMAGE, [digest] if digest else []
    if part.get("type") == "video_url":
        clip = part.get("video_url") or {}
        digests = [digest for frame in clip.get("frames") or () if (digest := _digest(frame))]
        return str(clip.get("text") or ""), digests
    return "", []


def _digest(holder: Mapping[str, Any] | None) -> str | None:
    url = str((holder or {}).get("url") or "")
    return url.removeprefix(REFERENCE) if url.startswith(REFERENCE) else None
