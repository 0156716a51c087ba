"""Pictures in continuous batching: as the whole model reads them, alone or beside others, each encoded once."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from components.config.params import InputError
from components.inference.batching import ContinuousBatch, Row, generate
from components.inference.packed_weights import pack
from components.media.pictures import Picture
from components.models.decoder import Decoder, DecoderConfig
from components.models.vision import VisionConfig, VisionLanguageModel, VisionTower, normalized, vision_language_from

IMAGE, PATCHES = 99, 16


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(99, 64, 2, 2, 1, 32, 96, max_seq_len=160, qk_norm=True))
    tower = VisionTower(VisionConfig(32, 8, embed_dim=32, num_layers=3, num_heads=2, hidden_dim=64))
    model = vision_language_from(decoder, tower, IMAGE, 100).eval()
    for weight in model.parameters():
        if weight.dim() > 1:  # far from the identity, so that what is read decides what is written
            torch.nn.init.normal_(weight, std=0.3)
    return model


def picture(seed: int, size: int = 32) -> Picture:
    return Picture(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def row(words: list[int], *pictures: Picture, limit: int = 8) -> Row:
    """The pictures behind the first two words."""
    return Row([*words[:2], *[IMAGE] * (PATCHES * len(pictures)), *words[2:]], limit, pictures=pictures)


def continued(model: VisionLanguageModel, row: Row) -> list[int]:
    """The greedy continuation without a cache."""
    pixels = [torch.from_numpy(each.pixels).unsqueeze(0) for each in row.pictures]
    values = normalized(torch.cat(pixels)) if pixels else None
    ids = list(row.prompt)
    with torch.inference_mode():
        for _ in range(row.limit):
            ids.append(int(model(torch.tensor([ids]), pixel_values=values)[0, -1].argmax()))
    return ids[len(row.prompt) :]


def rows() -> list[Row]:
    words = list(range(10, 40))
    return [
        row(words[:9], picture(1)),
        row(words[:9], picture(2)),  # the same ids, another picture
        row(words[:5]),
        row(words[:7], picture(2), picture(1)),
        row(words[:30]),
        row(words[:9], picture(1)),
        row(words[:20], picture(3), picture(1), picture(2)),
    ]


def test_rows_with_pictures_continue_as_the_whole_model_does(model: VisionLanguageModel) -> None:
    together = rows()
    generate(model, together, max_rows=4)
    assert [each.generated for each in together] == [continued(model, each) for each in together]
    assert together[0].generated != together[1].generated, "the picture is read"


def test_a_row_depends_on_no_other_and_not_on_what_is_remembered(model: VisionLanguageModel) -> None:
    """A prompt that begins alike up to its picture takes over keys and values; one with another picture none of it."""
    batch = ContinuousBatch(model, 4)
    generated = []
    for each in rows():
        batch.admit([each])
        while not each.finished:
            batch.advance()
        generated.append(each.generated)
    together = rows()
    generate(model, together, max_rows=4)
    assert generated == [each.generated for each in together]


def test_a_picture_is_encoded_once(model: VisionLanguageModel) -> None:
    batch = ContinuousBatch(model, 4)
    for each in rows():
        batch.admit([each])
        while not each.finished:
            batch.advance()
    assert batch.pictures is not None
    assert batch.pictures.encoded == 3


def test_a_picture_longer_than_a_pass_is_read_in_parts(
    model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.inference.batching.PREFILL_TOKENS", 8)
    assert PATCHES > 8
    long = rows()[-1]
    generate(model, [long])
    assert long.generated == continued(model, long)


def test_packed_weights_leave_the_tower_as_it_is(model: VisionLanguageModel) -> None:
    torch.manual_seed(0)
    before = rows()[3]
    generate(model, [before])
    packed = copy.deepcopy(model)
    pack(packed)
    after = rows()[3]
    generate(packed, [after])
    assert after.generated == before.generated
    assert isinstance(packed.projector.up, torch.nn.Linear)


def test_image_tokens_without_their_pictures_are_refused(model: VisionLanguageModel) -> None:
    with pytest.raises(InputError, match="32 image tokens are not those of 1 pictures"):
        ContinuousBatch(model, 4).admit([Row([1, *[IMAGE] * 32, 2], 4, pictures=[picture(1)])])


def test_pictures_of_any_size_are_resized(model: VisionLanguageModel) -> None:
    large = row([1, 2, 3, 4], picture(1, 80))
    generate(model, [large])
    assert len(large.generated) == 8
