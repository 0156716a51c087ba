"""Damaged pictures and clips through the decoders: `python -m benchmarks.pictures_fuzz [--cases 2000]`.

Valid files of all five formats are damaged: bits flipped, ends cut off, parts of other files spliced in, sizes in
headers set to huge values. Each must decode or be refused by an InputError; the process may not grow once warm.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import random
import struct
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from components.config.errors import InputError
from components.media.clips import decode_clip
from components.media.pictures import decode_picture, format_of

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "MP4")
_HUGE = (0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)


@dataclass
class Figures:
    """What became of damaged files."""

    outcomes: Counter[str] = field(default_factory=Counter)
    """Files by format and outcome: `PNG decoded`, `PNG refused`."""
    failures: list[str] = field(default_factory=list)
    """Errors other than InputError."""
    slowest: tuple[float, int] = (0.0, 0)
    """(seconds, number) of the slowest file."""
    growth: int = 0
    """Bytes of resident memory at the end beyond those after a tenth of the files."""


def easy_vqa_pictures(count: int) -> list[Image.Image]:
    """Pictures of easy-VQA's training split, from the files of its package."""
    spec = importlib.util.find_spec("easy_vqa")
    assert spec is not None, 'easy-vqa: is not installed; run pip install "loopwright[sight]"'
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "data/train/images"
    return [Image.open(folder / f"{number}.png").convert("RGB") for number in range(count)]


def written(images: Sequence[Image.Image], format_: str, **options: Any) -> bytes:
    """A file of Pillow's formats; several images are an animation."""
    file = io.BytesIO()
    animation = {"save_all": True, "append_images": list(images[1:])} if len(images) > 1 else {}
    images[0].save(file, format_, **animation, **options)
    return file.getvalue()


def mp4(frames: Sequence[Any], codec: str = "libx264", rate: int = 10, rotation: int = 0, **options: str) -> bytes:
    """An MP4 file of frames (height, width, 3) at this many a second."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options=options) as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def samples() -> list[bytes]:
    """Valid files of all formats, still and moving."""
    images = easy_vqa_pictures(12)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    photo = Image.fromarray(noise).resize((160, 120), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    return [
        *(written(images[:1], format_) for format_ in ("PNG", "JPEG", "WEBP", "GIF")),
        *(written([photo], format_, exif=exif) for format_ in ("PNG", "JPEG", "WEBP")),
        written([photo], "JPEG", progressive=True),
        written([photo.convert("CMYK")], "JPEG"),
        written([photo.convert("P")], "PNG", transparency=3),
        written([photo.convert("RGBA")], "WEBP", lossless=True),
        *(written(images, format_, duration=80) for format_ in ("GIF", "WEBP")),
        *(mp4([np.asarray(image) for image in images], codec) for codec in ("libx264", "mpeg4")),
    ]


def _flip_bits(content: bytearray, rng: random.Random, _: Sequence[bytes]) -> None:
    span = rng.choice((64, len(content)))
    for _ in range(rng.choice((1, 3, 30))):
        content[rng.randrange(min(span, len(content)))] ^= 1 << rng.randrange(8)


def _truncate(content: bytearray, rng: random.Random, _: Sequence[bytes]) -> None:
    del content[rng.randrange(len(content)) :]


def _splice(content: bytearray, rng: random.Random, others: Sequence[bytes]) -> None:
    other = rng.choice(others)
    start, length = rng.randrange(len(other)), rng.choice((4, 32, 400))
    position = rng.randrange(len(content))
    end = position + rng.choice((0, length))
    content[position:end] = other[start : start + length]


def _huge_numbers(content: bytearray, rng: random.Random, _: Sequence[bytes]) -> None:
    for _ in range(rng.choice((1, 2))):
        position = rng.randrange(min(len(content), rng.choice((40, 200, 10**9))))
        number = struct.pack(rng.choice((">I", "<I")), rng.choice(_HUGE))[: rng.choice((2, 4))]
        content[position : position + len(number)] = number


def _huge_sizes(content: bytearray, rng: random.Random, others: Sequence[bytes]) -> None:
    """Width and height in the header, checksums right."""
    name = format_of(bytes(content))
    wide, high = rng.choice((5_000, 30_000, 0xFFFF)), rng.choice((1, 30_000, 0xFFFF))
    if name == "PNG":
        content[16:24] = struct.pack(">II", wide << rng.choice((0, 15)), high)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    elif name == "GIF":
        content[6:10] = struct.pack("<HH", wide, high)
        if rng.random() < 0.5 and (frame := content.find(b",\0\0\0\0")) > 0:
            content[frame + 5 : frame + 9] = struct.pack("<HH", wide, high)
    elif name == "JPEG":
        frame = max(content.find(b"\xff\xc0"), content.find(b"\xff\xc2"))
        content[frame + 5 : frame + 9] = struct.pack(">HH", high, wide)
    elif name == "WEBP":
        content[24:30] = bytes(rng.choice((0xFF, 0x3F, rng.randrange(256))) for _ in range(6))
    else:
        tag = rng.choice((b"avc1", b"mp4v", b"tkhd"))
        if (box := content.find(tag)) > 0:
            at = box + (80 if tag == b"tkhd" else 28)
            content[at : at + 4] = struct.pack(">HH", wide, high)
        else:
            _huge_numbers(content, rng, others)


DAMAGES: tuple[Callable[[bytearray, random.Random, Sequence[bytes]], None], ...] = (
    _flip_bits,
    _truncate,
    _splice,
    _huge_numbers,
    _huge_sizes,
)


def damaged(number: int, valid: Sequence[bytes]) -> bytes:
    """The damaged file of a number; the same number, the same file."""
    rng = random.Random(number)
    content = bytearray(rng.choice(valid))
    for _ in range(rng.choice((1, 1, 2))):
        rng.choice(DAMAGES)(content, rng, valid)
        if not content:
            break
    return bytes(content)


def fuzz(cases: int, valid: Sequence[bytes] | None = None) -> Figures:
    """Decode as many damaged files as a picture and as a clip."""
    valid = valid or samples()
    figures, process, warm = Figures(), psutil.Process(), 0
    for number in range(cases):
        if number == cases // 10:
            warm = process.memory_info().rss
        content = damaged(number, valid)
        for decode in (decode_picture, decode_clip):
            started = time.perf_counter()
            try:
                decode(content, "file")
                outcome = "decoded"
            except InputError:
                outcome = "refused"
            except Exception as error:  # noqa: BLE001  whatever it is, it is reported
                outcome = "failed"
                figures.failures.append(f"{number}: {decode.__name__}: {type(error).__name__}: {error}")
            figures.slowest = max(figures.slowest, (time.perf_counter() - started, number))
            figures.outcomes[f"{format_of(content) or 'other'} {decode.__name__} {outcome}"] += 1
    figures.growth = process.memory_info().rss - warm
    return figures


def main() -> None:
    """Print the figures of as many damaged files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2_000)
    figures = fuzz(parser.parse_args().cases)
    for outcome, count in sorted(figures.outcomes.items()):
        print(f"{outcome:<32}{count:>7,}")
    seconds, number = figures.slowest
    print(f"slowest {seconds:.2f} s (file {number}), memory {figures.growth / 2**20:+.1f} MiB")
    print(f"{len(figures.failures)} failures")
    for failure in figures.failures[:20]:
        print(failure)
    raise SystemExit(bool(figures.failures))


if __name__ == "__main__":
    main()
