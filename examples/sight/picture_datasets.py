"""The datasets of pictures by name."""

from __future__ import annotations

from collections.abc import Callable

from components.config.project import Collecting, Rows
from examples.sight.caption_rows import caption_rows
from examples.sight.clip_rows import clip_rows
from examples.sight.digit_rows import digit_rows
from examples.sight.shapes import vqa

_ROWS: dict[str, Callable[[Collecting], Rows]] = {
    "sight-vqa": vqa,
    "sight-digits": digit_rows,
    "sight-captions": caption_rows,
    "sight-clips": clip_rows,
}


def dataset_rows(name: str, collecting: Collecting) -> Rows:
    """The rows of a dataset of pictures.

    Raises: InputError when a package of the extra `sight` is not installed.
    """
    return _ROWS[name](collecting)
