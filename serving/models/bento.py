"""Built Bentos in this server's BentoML home."""

from __future__ import annotations

from pathlib import Path

from components.config.params import InputError


def find_bento(tag: str) -> Path:
    """The folder of a built Bento, by `NAME:VERSION` or `NAME:latest`.

    Raises: InputError naming the Bentos there are.
    """
    import bentoml

    try:
        return Path(bentoml.get(tag).path)
    except (bentoml.exceptions.BentoMLException, ValueError):
        known = ", ".join(str(bento.tag) for bento in bentoml.list()) or 'none; run "loopwright package"'
        raise InputError(f"--bento: {tag!r} is not a built Bento; there are: {known}") from None
