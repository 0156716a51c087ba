"""Clips: frames by time, first and last included, from every format; caps hold whatever a header claims."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from benchmarks.pictures_fuzz import easy_vqa_pictures, mp4, written
from components.config.errors import InputError
from components.media.clips import MISSING, Frame, clip_content, decode_clip, sampled
from components.media.pictures import Limits, Picture, decode_picture

ROOT = Path(__file__).parents[2]
GREYS = [Image.new("RGB", (64, 48), (8 * number,) * 3) for number in range(31)]
ARRAYS = [np.asarray(image) for image in GREYS]
CLIPS = {
    "h264": mp4(ARRAYS),
    "mpeg4": mp4(ARRAYS, "mpeg4"),
    "vp9": mp4(ARRAYS, "libvpx-vp9"),
    "gif": written(GREYS, "GIF", duration=100),
    "webp": written(GREYS, "WEBP", duration=100, lossless=True),
}


def numbers(frames: list[Frame]) -> list[int]:
    """Which of the grey frames these are."""
    return [round(float(frame.picture.pixels.mean()) / 8) for frame in frames]


@pytest.mark.parametrize("name", CLIPS)
def test_frames_are_sampled_evenly_from_first_to_last(name: str) -> None:
    frames = decode_clip(CLIPS[name], "clip", Limits(frames=7))
    assert numbers(frames) == [0, 5, 10, 15, 20, 25, 30]
    assert [round(frame.seconds, 3) for frame in frames] == [0, 0.5, 1, 1.5, 2, 2.5, 3]
    assert numbers(decode_clip(CLIPS[name], "clip", Limits(frames=1))) == [0]
    assert len(decode_clip(CLIPS[name], "clip", Limits(frames=99))) == 31


def test_real_frames_of_a_lossless_animation_are_exact() -> None:
    images = easy_vqa_pictures(5)
    frames = decode_clip(written(images, "WEBP", lossless=True, duration=40), "clip")
    for frame, image in zip(frames, images, strict=True):
        np.testing.assert_array_equal(frame.picture.pixels, np.asarray(image))


def test_variable_frame_rates_are_sampled_by_time() -> None:
    delays = [1_000, 1_000, *[100] * 10, 1_000]  # ten frames within the third second
    images = [Image.new("RGB", (8, 8), (8 * number,) * 3) for number in range(13)]
    for format_, options in (("GIF", {}), ("WEBP", {"lossless": True})):
        frames = decode_clip(written(images, format_, duration=delays, **options), "clip", Limits(frames=4))
        assert [frame.seconds for frame in frames] == pytest.approx([0, 1, 2, 3])
        assert numbers(frames) == [0, 1, 2, 12]


def test_frames_of_too_short_a_delay_take_as_long_as_browsers_show_them() -> None:
    frames = decode_clip(written(GREYS[:3], "GIF", duration=0), "clip")
    assert [frame.seconds for frame in frames] == pytest.approx([0, 0.1, 0.2])


def test_sampled_frames_are_the_nearest_to_even_times() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        times = np.cumsum(rng.exponential(size=rng.integers(1, 60))).tolist()
        count = int(rng.integers(1, 20))
        indices = sampled(times, count)
        assert len(indices) <= count or len(times) <= count
        assert indices == sorted(set(indices))
        assert indices[0] == 0
        if count > 1:
            assert indices[-1] == len(times) - 1
            for target in np.linspace(times[0], times[-1], min(count, len(times))):
                if len(times) > count:
                    assert int(np.argmin(np.abs(np.asarray(times) - target))) in indices


def test_a_still_file_of_a_moving_format_is_one_frame() -> None:
    for format_ in ("GIF", "WEBP"):
        (frame,) = decode_clip(written(GREYS[5:6], format_), "clip")
        assert frame.seconds == 0
        assert frame.picture.digest == decode_picture(written(GREYS[5:6], format_), "x").digest


def test_a_clip_filmed_lying_on_its_side_is_upright() -> None:
    lying = [np.zeros((32, 64, 3), np.uint8) for _ in range(3)]
    for frame in lying:
        frame[:, :32] = 255  # the left half is white
    content = bytearray(mp4(lying))
    # The matrix of the track's header (ISO/IEC 14496-12, 8.3.2): turned by 90 degrees clockwise when shown.
    matrix = content.index(b"tkhd") + 4 + 40
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 32 << 16, 0, 1 << 30)
    upright = decode_clip(bytes(content), "clip")[0].picture.pixels
    assert upright.shape == (64, 32, 3)
    assert upright[:30].mean() > 240
    assert upright[34:].mean() < 15


def test_large_frames_are_scaled_down() -> None:
    for content in (mp4(ARRAYS[:3]), written(GREYS[:3], "GIF", duration=50)):
        frames = decode_clip(content, "clip", Limits(frame_pixels=12 * 16))
        assert {frame.picture.pixels.shape for frame in frames} == {(12, 16, 3)}


def test_times_stand_before_their_frames() -> None:
    picture = Picture(np.zeros((1, 1, 3), np.uint8))
    assert clip_content([Frame(0.0, picture), Frame(0.5, picture)]) == "0.0 s <image> 0.5 s <image>"


def damaged(name: str, mark: bytes, offset: int, value: bytes) -> bytes:
    content = CLIPS[name]
    position = content.index(mark) + offset
    return content[:position] + value + content[position + len(value) :]


@pytest.mark.parametrize(
    ("content", "limits", "reason"),
    [
        (b"", {}, "empty file"),
        (written(GREYS[:1], "PNG"), {}, "a PNG picture where a clip is expected; allowed: GIF, WebP, MP4"),
        (written(GREYS[:1], "JPEG"), {}, "a JPEG picture where a clip is expected"),
        *((CLIPS[name], {"clip_frames": 30}, "a clip of more than the 30 frames") for name in CLIPS),
        *((CLIPS[name], {"clip_seconds": 2.5}, r"a clip of 3\.0 s; at most 2\.5 s") for name in CLIPS),
        (CLIPS["h264"], {"clip_pixels": 95_000}, "31 frames of 64 × 48 = 95,232 pixels; at most 95,000 are allowed"),
        (CLIPS["gif"], {"animation_pixels": 95_000}, "31 frames of 64 × 48 = 95,232 pixels"),
        *(
            (CLIPS[name], {"pixels": 3_000}, r".*(pixels; at most|more than) 3,000")
            for name in ("gif", "webp", "h264", "vp9")
        ),
        *((CLIPS[name][:-200], {}, r"(not a readable|.*is it complete\?)") for name in CLIPS),
        (damaged("gif", b"GIF8", 6, b"\xff\xff\xff\xff"), {}, "4,294,836,225 pixels"),
        (b"\0\0\0\x20ftypisom" + b"\0" * 400, {}, "not a readable MP4 file"),
        (b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n", {}, "no clip"),
    ],
)
def test_what_is_no_clip_within_limits_is_refused_by_its_reason(
    content: bytes, limits: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InputError, match=f"^clip.mp4: {reason}"):
        decode_clip(content, "clip.mp4", Limits(**limits))


def test_animated_one_pixel_files_are_bounded() -> None:
    dots = [Image.new("L", (1, 1), 255 * (number % 2)) for number in range(4_000)]
    for format_ in ("GIF", "WEBP"):
        with pytest.raises(InputError, match="a clip of more than the 3,600 frames"):
            decode_clip(written(dots, format_, duration=20), "dots", Limits(clip_seconds=1e9))


def test_a_frame_that_exceeds_the_canvas_of_a_gif_is_refused_undecoded() -> None:
    content = bytearray(written(GREYS[:2], "GIF", duration=50))
    second = content.rindex(b",\0\0\0\0")
    for size in ((6_000, 6_000), (0xFFFF, 0xFFFF)):
        content[second + 5 : second + 9] = struct.pack("<HH", *size)
        with pytest.raises(InputError, match=r"pixels; at most 25,000,000"):
            decode_clip(bytes(content), "clip")


def test_the_size_that_the_codec_claims_is_bounded_too() -> None:
    """A large stream in a track of 64 × 48: what its own headers say is what a decoder would take memory for."""
    large = mp4([np.zeros((1_024, 1_024, 3), np.uint8)] * 3)
    position = large.index(b"avc1") + 28
    lying = large[:position] + struct.pack(">HH", 64, 48) + large[position + 4 :]
    assert decode_clip(lying, "clip")
    with pytest.raises(InputError, match=r"^clip: "):
        decode_clip(lying, "clip", Limits(pixels=500_000))


def test_tables_of_a_small_file_make_no_index_of_millions() -> None:
    """One size for all of a hundred million samples: ffmpeg would write 24 bytes for each."""
    content = bytearray(CLIPS["mpeg4"])
    sizes, chunks = content.index(b"stsz") + 4, content.index(b"stsc") + 4
    struct.pack_into(">II", content, sizes + 4, 1, 100_000_000)
    struct.pack_into(">I", content, chunks + 12, 100_000_000)
    with pytest.raises(InputError, match="an MP4 file of 100,000,000 samples and 1 edits; at most 100,000 and 100"):
        decode_clip(bytes(content), "clip")
    edited = bytearray(CLIPS["h264"])
    struct.pack_into(">I", edited, edited.index(b"elst") + 8, 5_000)
    with pytest.raises(InputError, match="31 samples and 5,000 edits"):
        decode_clip(bytes(edited), "clip")
    fragmented = bytearray(mp4(ARRAYS, movflags="frag_keyframe+empty_moov"))
    assert numbers(decode_clip(bytes(fragmented), "clip", Limits(frames=3))) == [0, 15, 30]
    struct.pack_into(">I", fragmented, fragmented.index(b"trun") + 8, 100_000_000)
    with pytest.raises(InputError, match=r"100,000,0.. samples"):
        decode_clip(bytes(fragmented), "clip")
    with pytest.raises(InputError, match="an MP4 file with a compressed index"):
        decode_clip(CLIPS["h264"] + b"\0\0\0\x10moov\0\0\0\x08cmov", "clip")


_MEASURE = """
import sys
from pathlib import Path

import av

from components.config.errors import InputError
from components.media.clips import decode_clip
from components.media.pictures import Limits


def peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


content = sys.stdin.buffer.read()
before = peak()
try:
    decode_clip(content, "clip", Limits(pixels=1_000_000))
except InputError:
    print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read as Linux tells it")
def test_a_stream_larger_than_its_track_claims_takes_no_memory() -> None:
    """16 megapixels where a million are allowed: neither reading the header nor the first frame decodes them."""
    large = mp4([np.zeros((4_000, 4_000, 3), np.uint8)], "libvpx-vp9")
    position = large.index(b"vp09") + 28
    lying = large[:position] + struct.pack(">HH", 64, 48) + large[position + 4 :]
    measured = subprocess.run([sys.executable, "-c", _MEASURE], input=lying, cwd=ROOT, capture_output=True, check=True)
    assert int(measured.stdout) < 12 << 20


def test_what_an_edit_list_cuts_off_is_not_shown() -> None:
    content = bytearray(CLIPS["h264"])
    edit = content.index(b"elst") + 12
    _, start = struct.unpack_from(">Ii", content, edit)
    struct.pack_into(">i", content, edit + 4, start + 10 * 1_024)  # 1,024 units of the media a frame
    frames = decode_clip(bytes(content), "clip", Limits(frames=5))
    assert numbers(frames) == [10, 15, 20, 25, 30]
    assert [frame.seconds for frame in frames] == pytest.approx([0, 0.5, 1, 1.5, 2])


def test_a_clip_cut_short_behind_its_index_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fast.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream: Any = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in ARRAYS:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    content = path.read_bytes()
    assert numbers(decode_clip(content, "clip", Limits(frames=2))) == [0, 30]
    for cut, reason in ((60, "28 frames of 31 in its index; is the clip complete"), (20, "not a readable MP4 file")):
        with pytest.raises(InputError, match=f"^clip: {reason}"):
            decode_clip(content[:-cut], "clip")


def test_a_duration_in_the_header_is_not_believed() -> None:
    content = damaged("h264", b"mvhd", 16 + 4, struct.pack(">I", 0xFFFFFF))
    assert numbers(decode_clip(content, "clip", Limits(frames=3))) == [0, 15, 30]


def test_without_pyav_an_mp4_is_refused_by_the_name_of_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match=r'^clip: an MP4 clip needs PyAV; run pip install "loopwright\[sight\]"$'):
        decode_clip(CLIPS["h264"], "clip")
    assert "sight" in MISSING
    assert decode_clip(CLIPS["gif"], "clip")


def test_a_file_in_memory_is_all_that_is_read() -> None:
    assert decode_clip(io.BytesIO(CLIPS["h264"]).getvalue(), "clip")
