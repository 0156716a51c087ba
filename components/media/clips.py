"""Clips: frames sampled evenly in time from GIF, WebP and MP4 files that anyone may have sent.

Animations are decoded by Pillow, MP4 by ffmpeg through PyAV, which is in the extra `sight`. First the times of all
frames are read, which decodes nothing and needs no duration that a header claims; then no more than is allowed is
decoded.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from components.config.errors import InputError
from components.media.messages import IMAGE
from components.media.pictures import (
    DAMAGED,
    LIMITS,
    Limits,
    Picture,
    check_pixels,
    checked_format,
    open_picture,
    rgb,
    unreadable,
)

if TYPE_CHECKING:
    import av
    import av.container
    import av.video

MISSING = 'an MP4 clip needs PyAV; run pip install "loopwright[sight]"'
_MIN_DELAY, _USUAL_DELAY = 20, 100  # milliseconds: browsers show a frame of a shorter delay for the usual one
_CODECS = "h264,hevc,mpeg4,vp9,av1,libdav1d"
_STREAMS = 16
_COUNTS = re.compile(rb"(?s)(?=(?:stsz|stz2).{8}(.{4})|trun.{4}(.{4})|elst.{4}(.{4}))")
_MAX_SAMPLES, _MAX_EDITS = 100_000, 100  # of all tracks: a minute has 3,600 frames and as many packets of sound


@dataclass(frozen=True)
class Frame:
    """One sampled frame."""

    seconds: float
    """Since the first frame."""
    picture: Picture


def decode_clip(content: bytes, where: str, limits: Limits = LIMITS) -> list[Frame]:
    """Frames sampled evenly in time from the bytes of a file, first and last included; one of a still GIF or WebP.

    Raises: InputError naming `where`, the value and what is allowed.
    """
    name = checked_format(content, where, limits, clip=True)
    if name in ("PNG", "JPEG"):
        raise InputError(f"{where}: a {name} picture where a clip is expected; allowed: GIF, WebP, MP4")
    try:
        return _video(content, where, limits) if name == "MP4" else _animation(content, name, where, limits)
    except InputError:
        raise
    except DAMAGED as error:
        raise unreadable(where, name, error, limits) from None


def clip_content(frames: Sequence[Frame]) -> str:
    """The frames in a message's content: each mark of a picture behind its time."""
    return " ".join(f"{frame.seconds:.1f} s {IMAGE}" for frame in frames)


def sampled(seconds: Sequence[float], count: int) -> list[int]:
    """Indices of at most `count` frames nearest to times evenly spaced from the first to the last frame.

    `seconds` are in order. Without variable frame rates these are evenly spaced frames.
    """
    if len(seconds) <= count:
        return list(range(len(seconds)))
    times = np.asarray(seconds)
    targets = np.linspace(times[0], times[-1], count) if count > 1 else times[:1]
    after = np.clip(np.searchsorted(times, targets), 1, len(times) - 1)
    nearest = after - (targets - times[after - 1] <= times[after] - targets)
    return sorted({int(index) for index in nearest})


def _animation(content: bytes, name: str, where: str, limits: Limits) -> list[Frame]:
    delays = list(_gif_delays(content, limits) if name == "GIF" else _webp_delays(content, limits)) or [0]
    seconds = [0.0]
    for delay in delays[:-1]:
        seconds.append(seconds[-1] + (delay if delay >= _MIN_DELAY else _USUAL_DELAY) / 1000)
    frames = []
    with open_picture(content, name, where, limits) as image:
        _check_clip(seconds, image.size, where, limits, limits.animation_pixels)
        chosen = set(sampled(seconds, limits.frames))
        for index, time in enumerate(seconds):
            image.seek(index)
            check_pixels(*image.size, where, limits)  # a GIF's frame may exceed the canvas, which grows by it
            if index in chosen:
                frames.append(Frame(time, Picture(rgb(image.copy())).within(limits.frame_pixels)))
    return frames


def _check_clip(seconds: Sequence[float], size: tuple[int, int], where: str, limits: Limits, budget: int) -> None:
    """Raises: InputError for a clip too long to decode."""
    width, height = size
    pixels = len(seconds) * width * height
    if len(seconds) > limits.clip_frames:
        raise InputError(f"{where}: a clip of more than the {limits.clip_frames:,} frames that are allowed")
    if not seconds[-1] <= limits.clip_seconds:
        raise InputError(f"{where}: a clip of {seconds[-1]:,.1f} s; at most {limits.clip_seconds:g} s are allowed")
    if pixels > budget:
        raise InputError(
            f"{where}: {len(seconds):,} frames of {width:,} × {height:,} = {pixels:,} pixels; "
            f"at most {budget:,} are allowed; shorten the clip or scale it down"
        )


def _gif_delays(content: bytes, limits: Limits) -> Iterator[int]:
    """Milliseconds of each frame, of one frame more than is allowed at most: GIF89a, sections 18 to 26."""

    def colours(packed: int) -> int:
        return 3 << ((packed & 7) + 1) if packed & 0x80 else 0

    def after_blocks(position: int) -> int:
        while size := content[position]:
            position += size + 1
        return position + 1

    position, delay, count = 13 + colours(content[10]), 0, 0
    while count <= limits.clip_frames and (kind := content[position : position + 1]) not in (b"", b";"):
        if kind == b"!":
            if content[position + 1] == 0xF9:
                delay = 10 * int.from_bytes(content[position + 4 : position + 6], "little")
            position = after_blocks(position + 2)
        elif kind == b",":
            position = after_blocks(position + 11 + colours(content[position + 9]))
            count += 1
            yield delay
            delay = 0
        else:
            position += 1


def _webp_delays(content: bytes, limits: Limits) -> Iterator[int]:
    """Milliseconds of each frame, of one frame more than is allowed at most: RFC 9649, section 2.7.1.1."""
    position, count = 12, 0
    while count <= limits.clip_frames and position + 8 <= len(content):
        (size,) = struct.unpack_from("<I", content, position + 4)
        if content[position : position + 4] == b"ANMF":
            count += 1
            yield int.from_bytes(content[position + 20 : position + 23], "little")
        position += 8 + size + size % 2


def _video(content: bytes, where: str, limits: Limits) -> list[Frame]:
    try:
        import av
    except ImportError:
        raise InputError(f"{where}: {MISSING}") from None
    _check_tables(content, where)
    try:
        with _open(content, limits) as container:
            if not container.streams.video:
                raise InputError(f"{where}: an MP4 file without a video stream; allowed: H.264, HEVC, MPEG-4, VP9, AV1")
            stream = container.streams.video[0]
            times, count = _presentation_times(container, stream, limits)
            if count > limits.clip_frames or stream.frames > limits.clip_frames:
                raise InputError(f"{where}: a clip of more than the {limits.clip_frames:,} frames that are allowed")
            if stream.frames > count + 1:
                raise InputError(f"{where}: {count:,} frames of {stream.frames:,} in its index; is the clip complete?")
            return list(_decoded(content, where, limits, times, stream))
    except av.ArgumentError:  # what a codec says of too many pixels, and of little else
        raise InputError(
            f"{where}: not a readable MP4 file, or one of more than {limits.pixels:,} pixels; save it anew, smaller"
        ) from None
    except av.FFmpegError as error:
        raise unreadable(where, "MP4", error, limits) from None


def _check_tables(content: bytes, where: str) -> None:
    """Refuse an MP4 file of few bytes whose tables make ffmpeg write an index of millions of entries.

    ISO/IEC 14496-12: sample sizes (8.7.3), which may be one for all, track runs (8.8.8) and edits (8.6.6).
    """
    samples = edits = 0
    for box in _boxes(content):
        if b"cmov" in box:
            raise InputError(f"{where}: an MP4 file with a compressed index; save it anew")
        for match in _COUNTS.finditer(box):
            samples += sum(int.from_bytes(count, "big") for count in match.groups()[:2] if count)
            edits += int.from_bytes(match[3] or b"", "big")
    if samples > _MAX_SAMPLES or edits > _MAX_EDITS:
        raise InputError(
            f"{where}: an MP4 file of {samples:,} samples and {edits:,} edits; "
            f"at most {_MAX_SAMPLES:,} and {_MAX_EDITS} are allowed"
        )


def _boxes(content: bytes) -> Iterator[bytes]:
    """The boxes of an MP4 file but for its media data, and all that follows one of no size."""
    position = 0
    while position + 8 <= len(content):
        size, kind = struct.unpack_from(">I4s", content, position)
        if size == 1 and position + 16 <= len(content):
            (size,) = struct.unpack_from(">Q", content, position + 8)
        if size < 8:
            yield content[position:]
            return
        if kind != b"mdat":
            yield content[position : position + size]
        position += size


def _open(content: bytes, limits: Limits) -> av.container.InputContainer:
    """An MP4 file: no other container, which might name further files, is tried, nor any codec but the usual ones."""
    import av

    options = {"codec_whitelist": _CODECS, "max_pixels": str(limits.pixels), "max_streams": str(_STREAMS)}
    return av.open(io.BytesIO(content), "r", format="mov", options=options)


def _presentation_times(container: Any, stream: Any, limits: Limits) -> tuple[list[int], int]:
    """(when each frame is shown, in units of the stream's time base and in order, frames in the file).

    Frames that an edit list cuts off are in the file and not shown. At most one frame more than is allowed is read.
    """
    times, count = set(), 0
    for packet in container.demux(stream):
        if packet.pts is None:
            continue
        count += 1
        if not packet.is_discard:
            times.add(packet.pts)
        if count > limits.clip_frames:
            break
    return sorted(times), count


def _decoded(content: bytes, where: str, limits: Limits, times: Sequence[int], read: Any) -> Iterator[Frame]:
    """The frames sampled from those that are shown at these times. Raises: InputError where they end early."""
    if not times:
        raise InputError(f"{where}: a clip without a frame; save it anew")
    base = float(read.time_base)
    seconds = [(time - times[0]) * base for time in times]
    check_pixels(read.width, read.height, where, limits)
    _check_clip(seconds, (read.width, read.height), where, limits, limits.clip_pixels)
    chosen = [times[index] for index in sampled(seconds, limits.frames)]
    budget = limits.clip_pixels
    with _open(content, limits) as container:
        stream = container.streams.video[0]
        stream.codec_context.options = {"max_pixels": str(limits.pixels)}
        stream.codec_context.thread_count = 1
        for frame in container.decode(stream):
            budget -= frame.width * frame.height
            check_pixels(frame.width, frame.height, where, limits)
            if budget < 0:
                raise InputError(f"{where}: a clip of more than the {limits.clip_pixels:,} pixels that are allowed")
            if frame.pts is not None and frame.pts >= chosen[0]:
                yield Frame((frame.pts - times[0]) * base, _upright(frame).within(limits.frame_pixels))
                chosen = [time for time in chosen if time > frame.pts]
                if not chosen:
                    return
    raise InputError(
        f"{where}: a clip that ends {len(chosen)} of {limits.frames} sampled frames early; is it complete?"
    )


def _upright(frame: av.video.VideoFrame) -> Picture:
    """A frame, turned as the file says that it is shown: phones film lying on their side."""
    pixels = frame.to_ndarray(format="rgb24")
    return Picture(np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90) % 4)))
