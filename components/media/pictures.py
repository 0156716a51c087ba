"""Pictures: decoded within limits from bytes that anyone may have sent, and known by the digest of their pixels.

Only PNG, JPEG, WebP and GIF are tried, by their first bytes, and a header is checked before anything is decoded.
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from PIL import Image

from components.config.errors import InputError
from components.media.limits import LIMITS as LIMITS
from components.media.limits import Limits as Limits

Pixels = npt.NDArray[np.uint8]


LOSSLESS_PIXELS = 256 * 256
"""Pixels up to which a picture is stored as PNG."""
_JPEG_SCANS = 100  # each is a pass over all pixels, and may take 40 bytes of a file; usual are 1 to 14
_SIGNATURES = {b"\x89PNG\r\n\x1a\n": "PNG", b"\xff\xd8\xff": "JPEG", b"GIF87a": "GIF", b"GIF89a": "GIF"}
_EXIF = re.compile(rb"(?s)(?<=\xff\xe1..)Exif\0\0")
_MULTI_PICTURE = re.compile(rb"(?s)(?<=\xff\xe2..)MPF\0")
_PNG_ANIMATION = re.compile(rb"(?s)\0\0\0\x08acTL.{12}")
# What Pillow raises for damaged files, by its plugins and its C decoders.
DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    ArithmeticError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    MemoryError,
    struct.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded picture."""

    pixels: Pixels
    """(height, width, 3), RGB."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of size and pixels: equal for files that show the same."""
        return hashlib.sha256(repr(self.pixels.shape).encode() + self.pixels.tobytes()).hexdigest()

    def png(self) -> bytes:
        """The picture as a PNG file without metadata."""
        return self._encoded("PNG")

    def file(self) -> bytes:
        """The picture as the file to store, without metadata: PNG to 256 × 256 pixels, else JPEG of quality 95.

        Small pictures are drawings, digits and icons, exact in a few KB. A photograph is 5 to 10 times smaller as
        JPEG, and at this quality, with full colour resolution, loses less than its camera's file did.
        """
        if self.pixels.shape[0] * self.pixels.shape[1] <= LOSSLESS_PIXELS:
            return self._encoded("PNG")
        return self._encoded("JPEG", quality=95, subsampling=0)

    def within(self, pixels: int) -> Picture:
        """The picture, scaled down to at most as many pixels, sides in proportion."""
        height, width = self.pixels.shape[:2]
        if height * width <= pixels:
            return self
        scale = (pixels / (height * width)) ** 0.5
        wide = min(max(1, int(width * scale)), pixels)
        size = wide, max(1, min(int(height * scale), pixels // wide))
        return Picture(np.asarray(Image.fromarray(self.pixels).resize(size, Image.Resampling.BOX)))

    def _encoded(self, format_: str, **options: int) -> bytes:
        file = io.BytesIO()
        Image.fromarray(self.pixels).save(file, format_, **options)
        return file.getvalue()


def format_of(content: bytes) -> str | None:
    """PNG, JPEG, WEBP, GIF or MP4 by the first bytes of a file, whatever its suffix; None for any other."""
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WEBP"
    if content[4:8] == b"ftyp":
        return "MP4"
    return next((name for signature, name in _SIGNATURES.items() if content.startswith(signature)), None)


def checked_format(content: bytes, where: str, limits: Limits, clip: bool) -> str:
    """The format of the file of a picture or a clip, of an allowed size; it may be one of the other's.

    Raises: InputError naming `where` for an empty or too large file, and for one of no format that is read.
    """
    noun, allowed = ("clip", "GIF, WebP, MP4") if clip else ("picture", "PNG, JPEG, WebP, GIF")
    if not content:
        raise InputError(f"{where}: empty file; send a {noun}: {allowed}")
    if len(content) > limits.file_bytes:
        raise InputError(f"{where}: {len(content):,} bytes; at most {limits.file_bytes:,} are allowed")
    name = format_of(content)
    if name is None:
        raise InputError(f"{where}: no {noun}: it begins with {content[:8]!r}; allowed: {allowed}")
    return name


def decode_picture(content: bytes, where: str, limits: Limits = LIMITS) -> Picture:
    """The picture in the bytes of a file, upright, over white; of an animation the first frame.

    Raises: InputError naming `where`, the value and what is allowed.
    """
    name = checked_format(content, where, limits, clip=False)
    if name == "MP4":
        raise InputError(f"{where}: an MP4 clip where a picture is expected; allowed: PNG, JPEG, WebP, GIF")
    exif = b""
    if name == "JPEG":
        if (scans := content.count(b"\xff\xda")) > _JPEG_SCANS:
            raise InputError(f"{where}: a JPEG of {scans:,} scans; at most {_JPEG_SCANS} are allowed")
        content, exif = _without_metadata(content)
    elif name == "PNG":
        content = _PNG_ANIMATION.sub(b"", content)  # Pillow warns of damaged ones
    try:
        with open_picture(content, name, where, limits) as image:
            pixels = rgb(image)
            return Picture(_upright(pixels, _orientation(exif or image.info.get("exif", b""))))
    except InputError:
        raise
    except DAMAGED as error:
        raise unreadable(where, name, error, limits) from None


def resized(picture: Picture, size: int) -> Pixels:
    """The pixels (size, size, 3) of a picture, its proportions given up, as SigLIP reads pictures."""
    if picture.pixels.shape[:2] == (size, size):
        return picture.pixels
    return np.asarray(Image.fromarray(picture.pixels).resize((size, size), Image.Resampling.BICUBIC))


def unreadable(where: str, name: str, error: BaseException, limits: Limits) -> InputError:
    """The error for a file that a decoder refuses."""
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        count = re.search(r"\d+", str(error))
        assert count is not None
        return InputError(f"{where}: {int(count[0]):,} pixels; at most {limits.pixels:,} are allowed")
    reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:120] or type(error).__name__
    return InputError(f"{where}: not a readable {name} file: {reason}; save it anew")


def open_picture(content: bytes, name: str, where: str, limits: Limits) -> Image.Image:
    """A file of an allowed number of pixels, its header read, nothing decoded.

    Raises: InputError for too many pixels; DAMAGED.
    """
    if name == "WEBP":  # libwebp takes memory for the canvas when it opens a file
        check_pixels(*_webp_size(content), where, limits)
    image = Image.open(io.BytesIO(content), formats=[name])
    check_pixels(*image.size, where, limits)
    return image


def check_pixels(width: int, height: int, where: str, limits: Limits) -> None:
    """Raises: InputError for more pixels than are allowed."""
    if width * height > limits.pixels:
        raise InputError(
            f"{where}: {width:,} × {height:,} = {width * height:,} pixels; at most {limits.pixels:,} are allowed"
        )


def rgb(image: Image.Image) -> Pixels:
    """(height, width, 3) of an image of any mode: 16 bits scaled to 8, transparent parts over white."""
    image.load()
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.uint16)
        if isinstance(transparent := image.info.get("transparency"), int):
            grey[grey == transparent] = 0xFFFF
        eight = ((grey.astype(np.uint32) + 128) // 257).astype(np.uint8)
        return np.repeat(eight[..., None], 3, axis=2)
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        image = Image.new("RGB", colours.size, "white")
        image.paste(colours, mask=colours)
    return np.asarray(image.convert("RGB"))


def _without_metadata(content: bytes) -> tuple[bytes, bytes]:
    """(a JPEG file whose EXIF data and list of further pictures Pillow does not see, the EXIF data).

    Pillow reads the resolution from them, and warns of damaged ones.
    """
    exif = b""
    if match := _EXIF.search(content):
        (length,) = struct.unpack_from(">H", content, match.start() - 2)
        exif = content[match.start() : match.start() - 2 + length]
    return _MULTI_PICTURE.sub(b"\0" * 4, _EXIF.sub(b"\0" * 6, content)), exif


def _webp_size(content: bytes) -> tuple[int, int]:
    """(width, height) by the header: RFC 9649, sections 2.5 to 2.7."""
    chunk, body = content[12:16], content[20:30].ljust(10, b"\0")
    if chunk == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if chunk == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF


def _orientation(exif: bytes) -> int:
    """Tag 0x0112 of EXIF data, 1 to 8 (CIPA DC-008, section 4.6.4); 1, upright, where it is missing or damaged."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", tiff, entry)
            if tag == 0x0112:
                return value if kind == 3 and 1 <= value <= 8 else 1
    except struct.error:
        return 1
    return 1


_TURNS: Mapping[int, Callable[[Pixels], Pixels]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: np.rot90(pixels),
}


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    turn = _TURNS.get(orientation)
    return pixels if turn is None else np.ascontiguousarray(turn(pixels))
