"""Tuning on pictures, from rows of kind images to an agent that answers about new ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from components.agent.agent import Agent
from components.agent.batch_rollout import answer_all
from components.config.params import InputError, load_params
from components.config.paths import Paths
from components.datasets.formats import DatasetWriter, row_id
from components.inference.cache_plan import context_len
from components.inference.sampling import Sampling
from components.media.pictures import Picture, resized
from components.models.checkpoint import load_decoder, load_model
from components.models.vision import VisionLanguageModel, VisionTower
from components.runtime.stage import StageRun
from components.token_rows.batches import TokenRows
from components.token_rows.prepare import prepare
from components.tokenization.chat_tokenizer import save, train
from components.tokenization.hf_tokenizer import load_chat_tokenizer
from components.training.pretrain import pretrain
from components.training.tune import tune
from components.training.vision import connect, pretrain_vision

COLORS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "white": (240, 240, 240)}
QUESTION = "Which color is it?"
TRAINED = {"max_steps": 60, "global_batch_size": 8, "micro_batch_size": 8, "warmup_steps": 2, "precision": "fp32"}
SETTINGS: dict[str, Any] = {
    "scale": "smoke",
    "tune.dataset": ["colors", "chats"],
    "pretrain.decoder.dataset": "texts",
    "prepare.decoder.seq_len": 96,
    "pretrain.decoder.max_steps": 2,
    **{f"tune.{name}": value for name, value in TRAINED.items()},
    "tune.learning_rate": 0.01,
}
RunOf = Callable[..., StageRun]


def picture(color: str, seed: int) -> Picture:
    """A field of a color, with noise; not of the tower's size."""
    noise = np.random.default_rng(seed).integers(-15, 16, (20, 24, 3))
    return Picture(np.clip(np.array(COLORS[color]) + noise, 0, 255).astype(np.uint8))


def row(*colors: str, seed: int = 0) -> dict[str, Any]:
    pictures = [picture(color, seed + number) for number, color in enumerate(colors)]
    marks = "\n".join(["<image>"] * len(pictures))
    messages = [
        {"role": "user", "content": f"{marks}\n{QUESTION}"},
        {"role": "assistant", "content": " and ".join(colors)},
    ]
    return {"id": row_id(*colors, str(seed)), "images": [each.png() for each in pictures], "messages": messages}


@pytest.fixture
def stage_run(project: Paths, recorder: Any) -> RunOf:
    def run(name: str) -> StageRun:
        return StageRun(name, load_params(project.params, SETTINGS), project, project.root / "state" / name, recorder)

    return run


@pytest.fixture
def colors(project: Paths, stage_run: RunOf) -> Paths:
    """A project with pictures, chats and texts, and a tokenizer of its words."""
    with DatasetWriter(project.collected / "colors", "colors", "images") as writer:
        for seed in range(40):
            for color in COLORS:
                writer.write("train", row(color, seed=10 * seed))
            writer.write("train", row("red", "blue", seed=10 * seed))
        writer.write("test", row("green", seed=7))
    with DatasetWriter(project.collected / "chats", "chats", "conversations") as writer:
        for split in ("train", "test"):
            messages = [{"role": "user", "content": "Hello <image>"}, {"role": "assistant", "content": "Hello!"}]
            writer.write(split, {"id": split, "messages": messages})  # type: ignore[arg-type]
    with DatasetWriter(project.collected / "texts", "texts", "documents") as writer:
        for split in ("train", "test"):
            writer.write(split, {"id": split, "text": "red and green and blue and white " * 40, "source": "texts"})  # type: ignore[arg-type]
    words = [f"{QUESTION} {' and '.join(COLORS)} Hello! <image>"]
    save(train(words, 320), project.tokenizer("decoder"))
    prepare(stage_run("prepare@decoder"))
    return project


def test_rows_name_their_pictures_and_break_marks_that_someone_typed(colors: Paths) -> None:
    rows = TokenRows(colors.tokens("decoder") / "tune", "train")
    tokenizer = load_chat_tokenizer(colors.tokenizer("decoder")).with_images(16)
    assert rows.images is not None
    assert rows.vocab_size == tokenizer.vocab_size
    seen = []
    for index in range(len(rows)):
        batch = rows.batch(np.array([index]))
        ids = batch["input_ids"][0]
        shown = batch.get("pixel_values", torch.zeros(0))
        assert int((ids == rows.images.image_id).sum()) == 16 * len(shown)
        seen += [each.numpy() for each in shown]
        assert not batch["labels"].eq(rows.images.image_id).any(), "a picture is read, never written"
    assert len(seen) == 40 * 6
    expected = {resized(picture("white", 10 * seed), 32).tobytes() for seed in range(40)}
    assert expected <= {each.tobytes() for each in seen}
    assert any("Hello < image>" in tokenizer.decode(rows.batch(np.array([index]))["input_ids"][0].tolist())
               for index in range(len(rows)))  # fmt: skip


def test_an_agent_learns_to_answer_about_pictures(colors: Paths, stage_run: RunOf) -> None:
    """Each stage as `run` starts it; the folder is LLaVA's to transformers."""
    pretrain(stage_run("pretrain@decoder"))
    pretrain_vision(stage_run("pretrain_vision"))
    assert isinstance(load_model(colors.vision_tower), VisionTower)
    connect(stage_run("connect"))
    joined = load_decoder(colors.sight)
    base = load_decoder(colors.base("decoder"))
    assert torch.equal(joined.blocks[0].attention.qkv.weight, base.blocks[0].attention.qkv.weight), "frozen"  # type: ignore[union-attr]
    tune(stage_run("tune"))
    model = load_decoder(colors.agent).eval()
    assert isinstance(model, VisionLanguageModel)
    agent = Agent(load_chat_tokenizer(colors.agent), [], 1, context_len(model))
    chats = [
        ([{"role": "user", "content": f"<image>\n{QUESTION}", "images": [picture(color, 999 + number)]}], None)
        for number, color in enumerate(COLORS)
    ]
    two = [picture("red", 77), picture("blue", 78)]
    chats.append(([{"role": "user", "content": f"<image>\n<image>\n{QUESTION}", "images": two}], None))
    answers = answer_all(model, agent, chats, Sampling(8, stop_ids=(agent.tokenizer.end_id,)), 4)
    assert [answer.content if answer else None for answer in answers] == [*COLORS, "red and blue"]
    reference = transformers.AutoModelForImageTextToText.from_pretrained(colors.agent).eval()
    ids = torch.tensor([agent.tokenizer.encode_chat(*chats[0], add_generation_prompt=True)[0]])
    pixels = torch.from_numpy(resized(chats[0][0][0]["images"][0], 32).copy()).permute(2, 0, 1)[None] / 127.5 - 1  # type: ignore[index]
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids, pixel_values=pixels), reference(input_ids=ids, pixel_values=pixels).logits, rtol=1e-4, atol=1e-4
        )


def test_without_pictures_the_stages_leave_no_model(project: Paths, stage_run: RunOf) -> None:
    for name, stage in (("pretrain_vision", pretrain_vision), ("connect", connect)):
        stage(stage_run(name))
        assert (project.metrics / f"{name}.json").is_file()
    for folder in (project.vision_tower, project.sight):
        assert [file.name for file in folder.iterdir()] == ["no_model.txt"], "DVC warns of an empty folder"


def test_pictures_that_fit_no_row_are_named(project: Paths, stage_run: RunOf, tmp_path: Path) -> None:
    with DatasetWriter(project.collected / "colors", "colors", "images") as writer:
        for split in ("train", "test"):
            writer.write(split, row(*["red"] * 6, seed=0))  # type: ignore[arg-type]
    for name, kind, value in (
        (
            "chats",
            "conversations",
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]},
        ),
        ("texts", "documents", {"text": "red " * 200, "source": "texts"}),
    ):
        with DatasetWriter(project.collected / name, name, kind) as writer:  # type: ignore[arg-type]
            for split in ("train", "test"):
                writer.write(split, {"id": split, **value})  # type: ignore[arg-type]
    save(train([QUESTION, "Hello!"], 300), project.tokenizer("decoder"))
    prepare(stage_run("prepare@decoder"))
    pretrain(stage_run("pretrain@decoder"))
    with pytest.raises(InputError, match="no picture is alone in a conversation"):
        pretrain_vision(stage_run("pretrain_vision"))
