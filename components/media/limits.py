"""What is accepted of pictures and clips that anyone may have sent."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What is accepted of a file that anyone may have sent."""

    file_bytes: int = 20 << 20
    """Size of the file of a picture or a clip."""
    pixels: int = 25_000_000
    """Width times height of a picture or a clip; decoding takes up to 15 bytes for each."""
    pictures: int = 64
    """Pictures of a list of messages, a clip's frames among them."""
    frames: int = 16
    """Frames sampled from a clip."""
    frame_pixels: int = 640 * 640
    """Width times height of a sampled frame; larger frames are scaled down, for a clip is many pictures."""
    clip_frames: int = 3_600
    """Frames of a clip in its file."""
    clip_seconds: float = 60.0
    """Length of a clip."""
    clip_pixels: int = 2_000_000_000
    """Pixels of all frames of an MP4 clip together, which bound the time to decode it."""
    animation_pixels: int = 400_000_000
    """The same of GIF and WebP, which take several times as long."""


LIMITS = Limits()
