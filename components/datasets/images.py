"""Rows of kind `images`, as messages with their pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from components.media.messages import with_pictures
from components.media.pictures import decode_picture


def complete_messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of a row of a dataset, with the pictures of kind `images`.

    Raises: InputError naming the row when a picture is not readable.
    """
    if not row.get("images"):
        return list(row["messages"])
    pictures = [decode_picture(content, f"row {row['id']}") for content in row["images"]]
    return with_pictures(row["messages"], pictures)
