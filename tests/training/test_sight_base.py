"""Sight on a base from elsewhere: tower and projector before an imported decoder; all is trained, or LoRA's pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from components.agent.agent import Agent
from components.agent.batch_rollout import answer_all
from components.config.params import load_params
from components.config.paths import Paths
from components.datasets.formats import DatasetWriter
from components.inference.cache_plan import context_len
from components.inference.sampling import Sampling
from components.media.messages import IMAGE
from components.media.pictures import resized
from components.models.base_store import is_adapter
from components.models.checkpoint import load_decoder, merge_folder
from components.models.vision import VisionLanguageModel
from components.runtime.stage import StageRun
from components.token_rows.batches import PIXELS, TokenRows
from components.token_rows.prepare import prepare
from components.tokenization import chat_tokenizer as bpe
from components.tokenization.hf_tokenizer import load_chat_tokenizer
from components.tracking.model_import import import_model, inspect_model
from components.tracking.registry import Registry
from components.training.replay import ReplayedRows
from components.training.tune import tune
from components.training.vision import connect, pretrain_vision
from flows.orchestration.base_models import fetch_base_models
from tests.serving.conftest import open_local
from tests.serving.test_pictures import answer, image, text
from tests.tracking.test_model_import import SOURCE, decoder
from tests.training.test_sight import COLORS, QUESTION, picture, row

TRAINED = {"max_steps": 80, "global_batch_size": 8, "micro_batch_size": 8, "warmup_steps": 2, "precision": "fp32"}
SETTINGS: dict[str, Any] = {
    "scale": "smoke",
    "prepare.decoder.seq_len": 96,
    "pretrain.decoder.dataset": "texts",
    "tune.dataset": "colors",
    "tune.base": "stranger@champion",
    "tune.replay_share": 0.1,
    "tune.optimizer": "adamw",
    "tune.learning_rate": 0.01,
    **{f"{stage}.{name}": value for stage in ("connect", "tune") for name, value in TRAINED.items()},
}
SHOWN = [picture(color, 999 + number) for number, color in enumerate(COLORS)]
CHATS: list[Any] = [([{"role": "user", "content": f"{IMAGE}\n{QUESTION}", "images": [each]}], None) for each in SHOWN]


@pytest.fixture
def paths(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Paths:
    """A project with pictures and an imported base that reads text alone."""
    monkeypatch.setenv("LOOPWRIGHT_HOME", str(home))
    paths = Paths(tmp_path)
    with DatasetWriter(paths.collected / "texts", "texts", "documents") as writer:
        for split in ("train", "test"):
            writer.write(split, {"id": split, "text": "words " * 50, "source": "here"})  # type: ignore[arg-type]
    with DatasetWriter(paths.collected / "colors", "colors", "images") as writer:
        for seed in range(0, 400, 10):
            for color in COLORS:
                writer.write("train", row(color, seed=seed))
        writer.write("test", row("green", seed=7))
    bpe.save(bpe.train(["some other text entirely"], 320), paths.tokenizer("decoder"))
    folder = decoder(tmp_path / "theirs")
    import_model(folder, inspect_model(folder), "stranger", Registry(home))
    text = (SOURCE / "params.yaml").read_text()
    paths.params.write_text(text.replace("tune:", "tune:\n  base: stranger@champion", 1))
    (paths.root / "dvc.yaml").touch()
    fetch_base_models(paths, print)
    paths.metrics.mkdir(parents=True)
    paths.agent_files.mkdir(parents=True)
    (paths.agent_files / "agent.json").write_text('{"tools": [], "datasets": []}')
    paths.replay_requests.write_text("What is a lake?\n\nHello!\n")
    return paths


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("rank", [0, 8])
def test_an_imported_base_learns_to_answer_about_pictures(
    rank: int, paths: Paths, recorder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(paths.root)
    params = load_params(SOURCE / "params.yaml", SETTINGS | {"tune.lora_rank": rank})
    for name, stage in (("prepare@decoder", prepare), ("pretrain_vision", pretrain_vision), ("connect", connect)):
        stage(StageRun(name, params, paths, tmp_path / "state" / name, recorder))
    base, joined = load_decoder(paths.imported("decoder")), load_decoder(paths.sight)
    assert torch.equal(base.embed.weight, joined.embed.weight[: len(base.embed.weight)])
    tune(StageRun("tune", params, paths, tmp_path / "state/tune", recorder))
    assert is_adapter(paths.agent) is (rank > 0)
    model = load_decoder(paths.agent).eval()
    assert isinstance(model, VisionLanguageModel)
    agent = Agent.load(paths.agent, context_len(model))
    replies = answer_all(model, agent, CHATS, Sampling(8, stop_ids=(agent.tokenizer.end_id,)), 4)
    assert [reply.content if reply else None for reply in replies] == list(COLORS)
    with open_local(paths.agent, tmp_path / "served") as app:
        parts: list[Any] = [image(SHOWN[2].png()), text(QUESTION)]
        assert answer(app.post({"messages": [{"role": "user", "content": parts}]})) == list(COLORS)[2]
    ids = torch.tensor([agent.tokenizer.encode_chat(*CHATS[0], add_generation_prompt=True)[0]])
    pixels = torch.from_numpy(resized(SHOWN[0], 32).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    reference = AutoModelForImageTextToText.from_pretrained(paths.sight if rank else paths.agent).eval()
    if rank:
        reference = PeftModel.from_pretrained(reference, paths.agent).eval()
        merged = AutoModelForImageTextToText.from_pretrained(merge_folder(paths.agent, tmp_path)).eval()
    with torch.no_grad():
        expected = model(ids, pixel_values=pixels)
        for other in (reference, *([merged] if rank else [])):
            logits = other(input_ids=ids, pixel_values=pixels).logits
            torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def test_pictures_stay_with_their_rows_beside_replayed_ones(paths: Paths, recorder: Any, tmp_path: Path) -> None:
    params = load_params(SOURCE / "params.yaml", SETTINGS)
    prepare(StageRun("prepare@decoder", params, paths, tmp_path / "state", recorder))
    own = TokenRows(paths.tokens("decoder") / "tune", "train")
    texts = TokenRows(paths.tokens("decoder") / "pretrain", "train")
    mixed = ReplayedRows(own, texts, 0.2)
    order = np.array([len(own), 3, 1, len(own), 2])
    batch = mixed.batch(order)
    assert torch.equal(batch["input_ids"][[1, 2, 4]], own.batch(order[[1, 2, 4]])["input_ids"])
    assert torch.equal(batch[PIXELS], own.batch(order[[1, 2, 4]])[PIXELS])
    alone = mixed.batch(order[[1, 2, 4]])
    assert torch.equal(alone[PIXELS], own.batch(order[[1, 2, 4]])[PIXELS])


def test_the_tokenizer_of_an_imported_base_gets_an_image_token(paths: Paths) -> None:
    tokenizer = load_chat_tokenizer(paths.imported("decoder"))
    extended = tokenizer.with_images(16)
    assert extended.image_id == tokenizer.vocab_size
    ids, _ = extended.encode_chat(*CHATS[0], add_generation_prompt=True)
    assert ids.count(extended.image_id) == 16
