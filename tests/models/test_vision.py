"""Sight against transformers: SigLIP's tower, and LLaVA's folders in both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from components.config.params import InputError
from components.media.pictures import Picture, resized
from components.models.checkpoint import load_decoder, load_model, save_model
from components.models.decoder import Decoder, DecoderConfig
from components.models.vision import (
    VisionConfig,
    VisionLanguageModel,
    VisionTower,
    normalized,
    vision_language_from,
)
from components.models.vision_formats import check_processor

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
IMAGE = 99
PATCHES = 16
OUR_TOWER = VisionConfig(image_size=32, patch_size=8, embed_dim=32, num_layers=3, num_heads=2, hidden_dim=64)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pixels(count: int) -> Tensor:
    return torch.rand(count, 3, 32, 32) * 2 - 1


def prompt() -> Tensor:
    """Two pictures between words."""
    words = torch.randint(0, IMAGE, (1, 9))
    return torch.cat([words[:, :3], torch.full((1, PATCHES), IMAGE), words[:, 3:5], torch.full((1, PATCHES), IMAGE),
                      words[:, 5:]], dim=1)  # fmt: skip


def llava(kind: str, tied: bool, layer: int = -2, dtype: torch.dtype = torch.float32) -> Any:
    text_class = {"qwen3": transformers.Qwen3Config, "llama": transformers.LlamaConfig}[kind]
    config = transformers.LlavaConfig(
        vision_config=transformers.SiglipVisionConfig(**TOWER),
        text_config=text_class(**TEXT, tie_word_embeddings=tied),
        image_token_index=IMAGE,
        image_seq_length=PATCHES,
        vision_feature_layer=layer,
        vision_feature_select_strategy="full",
        tie_word_embeddings=tied,
    )
    model = transformers.LlavaForConditionalGeneration(config)
    for name, weight in model.named_parameters():  # norms' gains, biases and the probe would else be all alike
        if weight.dim() == 1 or name.endswith("probe"):
            torch.nn.init.normal_(weight, 1.0 if name.endswith("weight") else 0.0, 0.1)
    return model.to(dtype).eval()


@pytest.mark.parametrize("pooled", [True, False])
def test_a_tower_equals_siglips_in_both_directions(tmp_path: Path, pooled: bool) -> None:
    config = transformers.SiglipVisionConfig(**TOWER, vision_use_head=pooled)
    reference = transformers.SiglipVisionModel(config).eval()
    for name, weight in reference.named_parameters():
        torch.nn.init.normal_(weight, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
    reference.save_pretrained(tmp_path / "reference")
    tower = load_model(tmp_path / "reference")
    assert isinstance(tower, VisionTower)
    given = pixels(3)
    with torch.no_grad():
        expected = reference(given, output_hidden_states=True)
        torch.testing.assert_close(tower(given), expected.last_hidden_state)
        for layer in (-2, -1, 0, 1):
            torch.testing.assert_close(tower.features(given, layer), expected.hidden_states[layer])
        if pooled:
            torch.testing.assert_close(tower.pooled(given), expected.pooler_output)
    save_model(tower, tmp_path / "saved")
    again = transformers.SiglipVisionModel.from_pretrained(tmp_path / "saved").eval()
    assert all(torch.equal(weight, reference.state_dict()[name]) for name, weight in again.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "tied", "layer"), [("qwen3", True, -2), ("llama", False, -2), ("llama", True, -1)])
def test_llava_equals_transformers(tmp_path: Path, kind: str, tied: bool, layer: int, dtype: torch.dtype) -> None:
    reference = llava(kind, tied, layer, dtype)
    reference.save_pretrained(tmp_path / "reference")
    model = load_decoder(tmp_path / "reference", dtype)
    assert isinstance(model, VisionLanguageModel)
    ids, given = prompt(), pixels(2).to(dtype)
    close = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    with torch.no_grad():
        expected = reference(input_ids=ids, pixel_values=given).logits
        torch.testing.assert_close(model(ids, pixel_values=given), expected, **close)
        text = torch.randint(0, IMAGE, (2, 7))
        torch.testing.assert_close(model(text), reference(input_ids=text).logits, **close)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_transformers_reads_our_folder_and_answers_alike(tmp_path: Path, qk_norm: bool) -> None:
    decoder = Decoder(DecoderConfig(99, 48, 2, 4, 2, 16, 64, max_seq_len=128, qk_norm=qk_norm, tie_embeddings=True))
    model = vision_language_from(decoder, VisionTower(OUR_TOWER), IMAGE, 100).eval()
    torch.nn.init.normal_(model.embed.weight)
    save_model(model, tmp_path)
    reference = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    ids, given = prompt(), pixels(2)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, pixel_values=given), reference(input_ids=ids, pixel_values=given).logits)
        answer = reference.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=given, max_new_tokens=8, do_sample=False
        )
        own = ids
        for _ in range(8):
            own = torch.cat([own, model(own, pixel_values=given)[:, -1:].argmax(-1)], dim=1)
    assert own.tolist() == answer.tolist()
    again = load_decoder(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in model.state_dict().items())


def test_older_names_of_the_parts_are_read(tmp_path: Path) -> None:
    reference = llava("llama", False)
    reference.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    old = {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in tensors.items()}
    save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
    ids, given = prompt(), pixels(2)
    with torch.no_grad():
        logits = load_decoder(tmp_path)(ids, pixel_values=given)
        torch.testing.assert_close(logits, reference(input_ids=ids, pixel_values=given).logits, rtol=1e-4, atol=1e-5)


def test_a_decoder_with_sight_reads_text_as_before() -> None:
    decoder = Decoder(DecoderConfig(99, 48, 2, 4, 2, 16, 64, max_seq_len=128, tie_embeddings=True)).eval()
    model = vision_language_from(decoder, VisionTower(OUR_TOWER), IMAGE, 100).eval()
    ids = torch.randint(0, IMAGE, (2, 11))
    assert torch.equal(model(ids)[..., :99], decoder(ids))


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("vision_config", "image_size", 30, "image_size: 30 is not a multiple of patch_size 8"),
        ("vision_config", "model_type", "clip_vision_model", "model_type: 'clip_vision_model' is not supported"),
        ("text_config", "model_type", "mamba", "model_type: 'mamba' is not supported"),
        (None, "vision_feature_layer", [-2, -1], r"vision_feature_layer: \[-2, -1\] is not a layer from -4 to 3"),
        (None, "vision_feature_select_strategy", "default", "'default' is not supported; allowed: 'full'"),
        (None, "image_token_index", 100, "image_token_index: 100 is no token of the 100 of text_config"),
        (None, "vision_config", "siglip", "vision_config: 'siglip' is not an object"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    tmp_path: Path, part: str | None, field: str, value: Any, message: str
) -> None:
    llava("llama", False).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (config[part] if part else config)[field] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        load_model(tmp_path)


def test_transformers_reads_pictures_of_our_folder_as_we_do(tmp_path: Path) -> None:
    decoder = Decoder(DecoderConfig(99, 48, 2, 4, 2, 16, 64, max_seq_len=128))
    save_model(vision_language_from(decoder, VisionTower(OUR_TOWER), IMAGE, 100), tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)
    picture = Picture(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8))
    expected = processor(Image.fromarray(picture.pixels), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(normalized(torch.from_numpy(resized(picture, 32).copy())[None]), expected)
    check_processor(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.48, 0.46, 0.41]}')
    with pytest.raises(InputError, match=r"image_mean: \[0.48, 0.46, 0.41\] is not supported"):
        check_processor(tmp_path)
