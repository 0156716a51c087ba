"""Clips as video files: H.264 in MP4, written by PyAV."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction

from components.config.errors import InputError
from components.media.pictures import Pixels

FRAMES_PER_SECOND = 2


def write_clip(frames: Sequence[Pixels]) -> bytes:
    """An MP4 file of frames (height, width, 3), FRAMES_PER_SECOND a second, without loss but for chroma at half size.

    Raises: InputError when PyAV is not installed.
    """
    try:
        import av
    except ImportError:
        raise InputError('av: is not installed; run pip install "loopwright[sight]"') from None
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(FRAMES_PER_SECOND))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        # One thread: the same bytes on every machine.
        stream.options = {"qp": "0", "preset": "ultrafast", "threads": "1"}
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()
