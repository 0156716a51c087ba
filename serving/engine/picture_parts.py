"""Messages with pictures as OpenAI's content parts, for another server: text, and each picture as a data URL."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from components.media.messages import IMAGE
from components.media.pictures import Picture


def with_picture_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose marks and `images` are content parts; one without pictures as it is."""
    pictures = message.get("images") or ()
    plain = {key: value for key, value in message.items() if key != "images"}
    if not pictures:
        return plain
    first, *texts = str(message["content"]).split(IMAGE)
    parts = [_text(first)]
    for picture, text in zip(pictures, texts, strict=True):
        parts += [_image(picture), _text(text)]
    return {**plain, "content": [part for part in parts if part.get("text", IMAGE).strip()]}


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _image(picture: Picture) -> dict[str, Any]:
    data = base64.b64encode(picture.png()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
