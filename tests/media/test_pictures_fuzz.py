"""Damaged pictures and clips decode or are refused by an InputError, in bounded memory; all 2,000 and more by
`python -m benchmarks.pictures_fuzz`."""

import os

from benchmarks.pictures_fuzz import FORMATS, damaged, fuzz, samples
from components.media.clips import decode_clip
from components.media.pictures import decode_picture, format_of

CASES = int(os.environ.get("LOOPWRIGHT_TEST_CASES", "600"))


def test_damaged_files_are_decoded_or_refused() -> None:
    valid = samples()
    figures = fuzz(CASES, valid)
    assert not figures.failures
    assert figures.growth < 200 << 20
    decoded = {outcome.split()[0] for outcome in figures.outcomes if outcome.endswith("decoded")}
    assert decoded == set(FORMATS)


def test_the_samples_are_valid_and_the_same_number_is_the_same_file() -> None:
    valid = samples()
    assert {format_of(content) for content in valid} == set(FORMATS)
    for content in valid:
        assert decode_clip(content, "x") if format_of(content) == "MP4" else decode_picture(content, "x")
    assert damaged(7, valid) == damaged(7, valid)
