"""Pictures and clips beside a question: files as the content parts of a message."""

from __future__ import annotations

import base64
import io
import mimetypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.config.params import InputError

MP4 = b"ftyp"
"""At the fifth byte of an MP4 file."""


def message_content(question: str, files: Sequence[Path]) -> str | list[dict[str, Any]]:
    """The content of a message: the question, behind its pictures and clips where there are any.

    Raises: InputError when a file cannot be read.
    """
    return [*map(_part, files), {"type": "text", "text": question}] if files else question


def _part(path: Path) -> dict[str, Any]:
    try:
        content = path.expanduser().read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give the file of a picture or clip") from None
    media_type = mimetypes.guess_type(path)[0] or "application/octet-stream"
    kind = "video_url" if _is_clip(content, media_type) else "image_url"
    return {"type": kind, kind: {"url": f"data:{media_type};base64,{base64.b64encode(content).decode()}"}}


def _is_clip(content: bytes, media_type: str) -> bool:
    """Whether a file is a video or an animation; what a file is that is neither, the endpoint says."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as image:
            return getattr(image, "n_frames", 1) > 1
    except UnidentifiedImageError:
        return content[4:8] == MP4 or media_type.startswith("video/")
    except (OSError, Image.DecompressionBombError):
        return False
