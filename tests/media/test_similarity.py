"""Near-duplicates: copies of a picture are found, different pictures of real sets are not taken for one another."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from benchmarks.pictures_fuzz import easy_vqa_pictures
from components.media.pictures import Picture
from components.media.similarity import PictureIndex, near_duplicates, thumbnails

SHAPES = easy_vqa_pictures(400)
DIGITS = [Image.fromarray((image * 15.9).astype(np.uint8)).resize((64, 64)) for image in load_digits().images[:400]]


def picture(image: Image.Image) -> Picture:
    return Picture(np.asarray(image.convert("RGB")))


def as_jpeg(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=95)
    return Image.open(file)


@pytest.mark.parametrize(
    ("copy", "share"),
    [
        (as_jpeg, 0.9),
        (lambda image: image.resize((32, 32), Image.Resampling.LANCZOS), 0.95),
        (lambda image: image.resize((96, 96), Image.Resampling.BICUBIC), 1.0),
        (lambda image: image.resize((640, 640), Image.Resampling.NEAREST), 1.0),
    ],
)
def test_copies_are_near_duplicates(copy: Callable[[Image.Image], Image.Image], share: float) -> None:
    found = [
        near_duplicates(thumbnails([picture(image)]), thumbnails([picture(copy(image))])) for image in SHAPES + DIGITS
    ]
    assert np.mean(found) >= share


@pytest.mark.parametrize("images", [SHAPES, DIGITS])
def test_different_pictures_of_one_set_are_not(images: list[Image.Image]) -> None:
    index = PictureIndex()
    for image in images:
        small = thumbnails([picture(image)])
        assert not index.near(7, small)
        index.add(7, small)
    assert all(index.near(7, thumbnails([picture(image)])) for image in images)


def test_a_small_thing_elsewhere_is_another_picture() -> None:
    """As in frames of a clip in which little moves: on average they differ by less than copies do."""
    frames = np.zeros((2, 64, 64, 3), np.uint8)
    frames[0, 4:8, 4:8] = frames[1, 40:44, 8:12] = 200
    first, second = thumbnails([Picture(frames[0])]), thumbnails([Picture(frames[1])])
    assert np.abs(first.astype(int) - second).mean() < 2
    assert not near_duplicates(first, second)


def test_pictures_are_compared_by_key_number_and_order() -> None:
    index, (first, second) = PictureIndex(), [picture(image) for image in SHAPES[:2]]
    index.add(1, thumbnails([first, second]))
    assert 1 in index
    assert 2 not in index
    assert index.near(1, thumbnails([first, second]))
    assert not index.near(2, thumbnails([first, second]))
    assert not index.near(1, thumbnails([second, first]))
    assert not index.near(1, thumbnails([first]))


def test_the_index_finds_what_comparing_all_pairs_finds() -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (40, 16, 16, 3))
    noisy = [
        Picture(np.clip(base[i % 40] + rng.normal(0, i % 5, (16, 16, 3)), 0, 255).astype(np.uint8)) for i in range(200)
    ]
    index, added = PictureIndex(), [thumbnails([each]) for each in noisy[:80]]
    for small in added:
        index.add(0, small)
    for each in noisy[80:]:
        small = thumbnails([each])
        assert index.near(0, small) == any(near_duplicates(other, small) for other in added)
