"""Pictures: what Pillow and transposition by hand show, within limits; all else is refused by its reason."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from benchmarks.pictures_fuzz import easy_vqa_pictures, written
from components.config.errors import InputError
from components.media.messages import IMAGE, check_marks, join_parts, plain_text, with_pictures
from components.media.pictures import LOSSLESS_PIXELS, Limits, Picture, decode_picture, format_of

PHOTO = Image.fromarray(np.random.default_rng(3).integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((60, 45))


def pixels_of(content: bytes) -> Any:
    return decode_picture(content, "file").pixels


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "WEBP", "GIF"])
def test_real_pictures_of_each_format_show_what_pillow_shows(format_: str) -> None:
    for image in easy_vqa_pictures(5):
        content = written([image], format_)
        expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        np.testing.assert_array_equal(pixels_of(content), expected)
        assert format_of(content) == format_


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotation_is_honoured_and_dropped(format_: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "A camera"
    content = written([PHOTO], format_, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    picture = decode_picture(content, "file")
    np.testing.assert_array_equal(picture.pixels, np.asarray(expected))
    for file in (picture.png(), picture.file()):
        assert b"A camera" not in file
        assert not Image.open(io.BytesIO(file)).getexif()


@pytest.mark.parametrize(
    "exif", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]
)
def test_damaged_metadata_is_no_damaged_picture(exif: bytes) -> None:
    np.testing.assert_array_equal(pixels_of(written([PHOTO], "PNG", exif=exif)), np.asarray(PHOTO))
    assert pixels_of(written([PHOTO], "JPEG", exif=exif)).shape == (45, 60, 3)


def test_a_list_of_further_pictures_in_a_jpeg_is_passed_over() -> None:
    content = written([PHOTO], "JPEG")
    listed = content[:2] + b"\xff\xe2\x00\x10MPF\x00II*\x00\x08\x00\x00\x00" + content[2:]
    np.testing.assert_array_equal(pixels_of(listed), pixels_of(content))


def test_transparent_parts_are_white() -> None:
    colours = np.zeros((2, 3, 4), np.uint8)
    colours[0] = (200, 100, 0, 128)
    expected = np.full((2, 3, 3), 255, np.uint8)
    expected[0] = (227, 177, 127)  # half of it over white
    for format_, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        found = pixels_of(written([Image.fromarray(colours)], format_, **options))
        assert np.abs(found.astype(int) - expected).max() <= 1
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    for format_ in ("PNG", "GIF"):
        assert pixels_of(written([palette], format_, transparency=1)).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    grey = Image.fromarray(np.array([[7, 9]], np.uint8))
    assert pixels_of(written([grey], "PNG", transparency=9))[0, :, 0].tolist() == [7, 255]


def png16(values: list[int], transparent: int | None = None) -> bytes:
    """A grey PNG of one row in 16 bits, written by hand: Pillow's own writer cannot mark a transparent grey."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", len(values), 1, 16, 0, 0, 0, 0)
    marked = chunk(b"tRNS", struct.pack(">H", transparent)) if transparent is not None else b""
    body = zlib.compress(b"\0" + struct.pack(f">{len(values)}H", *values))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + marked + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def test_sixteen_bits_are_scaled_to_eight() -> None:
    assert pixels_of(png16([0, 128, 129, 0x7FFF, 0xFF00, 0xFFFF]))[0, :, 1].tolist() == [0, 0, 1, 127, 254, 255]
    assert pixels_of(png16([0, 5000, 0xFFFF], transparent=5000))[0].tolist() == [[0] * 3, [255] * 3, [255] * 3]


def test_one_bit_palette_and_grey_pictures_have_their_colours() -> None:
    for mode in ("1", "L", "P", "LA", "RGBA"):
        image = PHOTO.convert(mode)
        np.testing.assert_array_equal(pixels_of(written([image], "PNG")), np.asarray(image.convert("RGB")))


def test_cmyk_has_its_colours() -> None:
    plain = Image.new("RGB", (16, 16), (200, 60, 20))
    found = pixels_of(written([plain.convert("CMYK")], "JPEG", quality=100))
    assert np.abs(found.astype(int) - (200, 60, 20)).max() <= 4


def test_an_animation_as_a_picture_is_its_first_frame() -> None:
    images = easy_vqa_pictures(3)
    for format_, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})):
        first = pixels_of(written(images, format_, **options))
        np.testing.assert_array_equal(first, pixels_of(written(images[:1], format_, **options)))


def test_a_damaged_animation_of_a_png_is_its_still_picture() -> None:
    """Pillow warns of one, and a warning is no answer to whoever sent the file."""
    still = written([PHOTO], "PNG")
    body = b"acTL" + struct.pack(">II", 0, 0)
    chunk = struct.pack(">I", 8) + body + struct.pack(">I", zlib.crc32(body))
    np.testing.assert_array_equal(pixels_of(still[:33] + chunk + still[33:]), np.asarray(PHOTO))


def test_a_file_is_what_its_content_says_whatever_its_name() -> None:
    assert decode_picture(written([PHOTO], "PNG"), "photo.jpg").pixels.shape == (45, 60, 3)


def huge(width: int, height: int) -> bytes:
    """A small PNG that claims this size in its header."""
    content = bytearray(written([PHOTO], "PNG"))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def resized(content: bytes, mark: bytes, offset: int, size: bytes) -> bytes:
    position = content.index(mark) + offset
    return content[:position] + size + content[position + len(size) :]


GIF, JPEG, WEBP = (written([PHOTO], format_) for format_ in ("GIF", "JPEG", "WEBP"))
LOSSLESS = written([PHOTO], "WEBP", lossless=True)
EXTENDED = written([Image.new("RGBA", (60, 45), (9, 9, 9, 99))], "WEBP")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file; send a picture: PNG, JPEG, WebP, GIF"),
        (b"hello there", r"no picture: it begins with b'hello th'; allowed: PNG, JPEG, WebP, GIF"),
        (written([PHOTO], "BMP"), "no picture: it begins with b'BM"),
        (written([PHOTO], "TIFF"), "no picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture"),
        (b"\0\0\0\x20ftypisom" + b"\0" * 20, "an MP4 clip where a picture is expected; allowed: PNG, JPEG, WebP, GIF"),
        (huge(5_001, 5_000), r"5,001 × 5,000 = 25,005,000 pixels; at most 25,000,000 are allowed"),
        (huge(10_000, 10_000), r"100,000,000 pixels; at most 25,000,000 are allowed"),
        (huge(200_000, 200_000), r"40,000,000,000 pixels; at most"),
        (resized(GIF, b"GIF8", 6, b"\xff\xff\xff\xff"), "4,294,836,225 pixels"),
        (resized(JPEG, b"\xff\xc0", 5, b"\xff\xff\xff\xff"), "4,294,836,225 pixels"),
        (resized(WEBP, b"VP8 ", 14, b"\xff\x3f\xff\x3f"), r"16,383 × 16,383 = 268,402,689 pixels"),
        (resized(LOSSLESS, b"VP8L", 9, b"\xff\xff\xff\x0f"), r"16,384 × 16,384 = 268,435,456 pixels"),
        (resized(EXTENDED, b"VP8X", 12, b"\xff\xff\xff\xff\xff\xff"), r"16,777,216 × 16,777,216 = "),
        (JPEG[:-300], "not a readable JPEG file: image file is truncated"),
        (written([PHOTO], "PNG")[:-300], "not a readable PNG file: "),
        (WEBP[:-30], "not a readable WEBP file: "),
        (GIF[:-300], "not a readable GIF file: image file is truncated"),
        (b"\x89PNG\r\n\x1a\n", "not a readable PNG file: "),
        (JPEG + b"\xff\xda" * 100, "a JPEG of 101 scans; at most 100 are allowed"),
    ],
)
def test_what_is_no_picture_within_limits_is_refused_by_its_reason(content: bytes, reason: str) -> None:
    with pytest.raises(InputError, match=f"^photo.jpg: {reason}"):
        decode_picture(content, "photo.jpg")


def test_a_file_of_too_many_bytes_is_refused() -> None:
    with pytest.raises(InputError, match=r"^x: \d+ bytes; at most 100 are allowed$"):
        decode_picture(WEBP, "x", Limits(file_bytes=100))


def test_a_decompression_bomb_takes_no_memory() -> None:
    """25 megapixels of one colour in 24 KB are accepted; more are refused by the header."""
    content = written([Image.new("1", (5_000, 5_001))], "PNG")
    tracemalloc.start()
    with pytest.raises(InputError, match="25,005,000 pixels"):
        decode_picture(content, "bomb")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


def test_a_scaled_down_picture_keeps_its_proportions_and_colours() -> None:
    picture = Picture(np.full((300, 400, 3), 77, np.uint8))
    small = picture.within(1_200)
    assert small.pixels.shape == (30, 40, 3)
    assert (small.pixels == 77).all()
    assert small.within(1_200) is small
    for height, width in ((1, 5_000), (5_000, 1), (3_001, 7)):
        shape = Picture(np.zeros((height, width, 3), np.uint8)).within(100).pixels.shape
        assert 0 < shape[0] * shape[1] <= 100


def test_small_pictures_are_stored_exactly_and_photographs_nearly() -> None:
    picture = decode_picture(written(easy_vqa_pictures(1), "PNG"), "x")
    assert decode_picture(picture.file(), "x").digest == picture.digest
    photo = decode_picture(written([PHOTO.resize((600, 450), Image.Resampling.BICUBIC)], "PNG"), "x")
    assert photo.pixels.size > 3 * LOSSLESS_PIXELS
    assert format_of(photo.file()) == "JPEG"
    assert len(photo.file()) < len(photo.png()) / 2
    assert np.abs(decode_picture(photo.file(), "x").pixels.astype(int) - photo.pixels).mean() < 2


def test_marks_and_pictures_are_counted() -> None:
    picture = Picture(np.zeros((1, 1, 3), np.uint8))
    messages = [{"role": "user", "content": f"{IMAGE}{IMAGE} Which?"}, {"role": "assistant", "content": None}]
    first, second = with_pictures(messages, [picture, picture])
    assert first["images"] == [picture, picture]
    assert "images" not in second
    with pytest.raises(InputError, match="messages: 2 marks <image> for 1 pictures; give one for each"):
        with_pictures(messages, [picture])
    with pytest.raises(InputError, match="row 3: 2 pictures; at most 1 are allowed"):
        check_marks(messages, 2, "row 3", Limits(pictures=1))


def test_typed_marks_stand_for_no_picture() -> None:
    assert plain_text("what is <image>?") == "what is <image >?"
    assert IMAGE not in plain_text("<image><image>")


def test_parts_become_one_text() -> None:
    assert join_parts([(IMAGE, True), ("What is it?", False)]) == "<image>\nWhat is it?"
    assert join_parts([("Compare", False), (IMAGE, True), (IMAGE, True), ("and say", False), (" why", False)]) == (
        "Compare\n<image>\n<image>\nand say why"
    )
    assert join_parts([(IMAGE, True), ("\nWhat?", False)]) == "<image>\nWhat?"


def test_no_decoder_is_imported_before_it_is_needed() -> None:
    source = Path(__file__).parents[2] / "components/media/pictures.py"
    assert "import av" not in source.read_text(encoding="utf-8")
