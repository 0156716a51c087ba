"""Corrected answers about pictures: from the endpoint's record to a candidate that answers as corrected."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from components.agent.agent import Agent
from components.agent.batch_rollout import answer_all
from components.config.loop_settings import FeedbackConfig
from components.config.params import load_params
from components.config.paths import Paths
from components.datasets.formats import DatasetWriter, Row, row_id
from components.evaluation.compare_agents import judge
from components.feedback.curate import curate
from components.feedback.ingest import ingest
from components.feedback.items import read_items
from components.inference.cache_plan import context_len
from components.inference.sampling import Sampling
from components.media.messages import IMAGE
from components.media.pictures import Picture
from components.models.checkpoint import load_decoder
from components.models.vision import VisionLanguageModel
from components.runtime.params_file import write_params
from components.runtime.stage import StageRun
from components.token_rows.prepare import prepare
from components.tokenization.chat_tokenizer import save, train
from components.tracking.registry import Registry
from components.training.align import align
from components.training.pretrain import pretrain
from components.training.tune import tune
from components.training.vision import connect, pretrain_vision
from components.validation.validate import Validator
from loopwright.registry import compare
from tests.serving.conftest import ROOT, open_local
from tests.serving.test_pictures import answer, image, text
from tests.training.test_sight import COLORS, QUESTION, TRAINED, picture

RENAMED = {"red": "crimson", "green": "lime", "blue": "navy", "white": "snow"}
"""What the user wants each color to be called."""
COUNT = "How many pictures are there?"
COUNTS = ("none", "one", "two")
SETTINGS: dict[str, Any] = {
    "scale": "smoke",
    "tune.dataset": ["colors", "chats"],
    "pretrain.decoder.dataset": "texts",
    "prepare.decoder.seq_len": 128,
    "prepare.decoder.token_noise_rate": 0.0,
    "pretrain.decoder.max_steps": 2,
    **{f"tune.{name}": value for name, value in (TRAINED | {"max_steps": 120}).items()},
    "tune.learning_rate": 0.01,
    "curate.replay": 200,
    **{f"align.{name}": value for name, value in (TRAINED | {"max_steps": 60}).items()},
    "align.learning_rate": 0.005,
    "align.trained_share": 1.0,  # the new words too
    "evaluate.max_new_tokens": 8,
}
RunOf = Callable[..., StageRun]


def conversation(*colors: str, seed: int, first: str = QUESTION, suite: str | None = None) -> Row:
    """A conversation about pictures: their colors and their number; a suite has the first question alone."""
    pictures = [picture(color, seed + number) for number, color in enumerate(colors)]
    replies = {QUESTION: " and ".join(colors), COUNT: COUNTS[len(colors)]}
    marks = "\n".join([IMAGE] * len(pictures))
    messages: list[Row] = []
    for question in sorted(replies, key=lambda each: each != first)[: 1 if suite else 2]:
        content = question if messages else f"{marks}\n{question}"
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": replies[question]}]
    images = [each.png() for each in pictures]
    return {"id": row_id(*colors, first, str(seed)), "images": images, "messages": messages, "suite": suite}


@pytest.fixture
def stage_run(project: Paths, recorder: Any) -> RunOf:
    def run(name: str, **changes: Any) -> StageRun:
        dotted = {key.replace("__", "."): value for key, value in changes.items()}
        params = load_params(project.params, SETTINGS | dotted)
        return StageRun(name, params, project, project.root / "state" / name, recorder)

    return run


def write_datasets(paths: Paths) -> None:
    with DatasetWriter(paths.collected / "colors", "colors", "images") as writer:
        for seed in range(0, 300, 10):
            for color in COLORS:
                for first in (QUESTION, COUNT):
                    writer.write("train", conversation(color, seed=seed, first=first))
            writer.write("train", conversation("red", "blue", seed=seed))
        for seed in range(5000, 5050, 10):
            for color in COLORS:
                writer.write("test", conversation(color, seed=seed, suite="shown/color"))
                writer.write("test", conversation(color, seed=seed + 5, first=COUNT, suite="shown/count"))
    with DatasetWriter(paths.collected / "chats", "chats", "conversations") as writer:
        for number in range(60):
            messages = [{"role": "user", "content": f"Hello {number}"}, {"role": "assistant", "content": "Hello!"}]
            split, suite = ("train", None) if number < 40 else ("test", "small_talk/hello")
            writer.write(split, {"id": str(number), "messages": messages, "suite": suite})  # type: ignore[arg-type]
    with DatasetWriter(paths.collected / "texts", "texts", "documents") as writer:
        for split in ("train", "test"):
            writer.write(split, {"id": split, "text": "red and green and blue and white " * 40, "source": "texts"})  # type: ignore[arg-type]
    words = [*COLORS, *RENAMED.values(), *COUNTS]
    save(
        train([f"{QUESTION} {COUNT} {' and '.join(words)} Hello! {IMAGE} 0123456789"], 340), paths.tokenizer("decoder")
    )


@pytest.fixture
def champion(project: Paths, stage_run: RunOf) -> Paths:
    """A project whose champion answers about colors and numbers of pictures."""
    write_datasets(project)
    for stage in (prepare, pretrain, pretrain_vision, connect, tune):
        name = {prepare: "prepare@decoder", pretrain: "pretrain@decoder"}.get(stage, stage.__name__)
        stage(stage_run(name))
    assert answered(project.agent, range(9000, 9020, 10)) == [*COLORS] * 2
    for folder in (project.champion, project.start):
        shutil.copytree(project.agent, folder)
    (project.start / "origin.json").write_text(json.dumps({"version": "agent/1"}))
    return project


def answered(folder: Path, seeds: range, question: str = QUESTION) -> list[str | None]:
    """What the model of a folder answers about a picture of each color, for each seed."""
    model = load_decoder(folder).eval()
    assert isinstance(model, VisionLanguageModel)
    agent = Agent.load(folder, context_len(model))
    shown = [picture(color, seed) for seed in seeds for color in COLORS]
    chats = [([{"role": "user", "content": f"{IMAGE}\n{question}", "images": [each]}], None) for each in shown]
    replies = answer_all(model, agent, chats, Sampling(8, stop_ids=(agent.tokenizer.end_id,)), 16)
    return [reply.content if reply else None for reply in replies]


def correct(paths: Paths, home: Path, count: int = 40) -> None:
    """Ask the champion's endpoint about new pictures, correct each answer, and ingest the votes."""
    with open_local(paths.champion, home) as app:
        for number in range(count):
            shown: Picture = picture(list(COLORS)[number % 4], 20_000 + number)
            parts = [image(shown.png()), text(QUESTION)]
            reply = app.post({"messages": [{"role": "user", "content": parts}]})
            correction = RENAMED[answer(reply)]
            vote = {"completion_id": reply.json()["id"], "rating": "down", "correction": correction}
            assert app.client.post("/v1/feedback", json=vote).status_code == 202
        validator = Validator(ROOT / "data/expectations")
        config: FeedbackConfig = load_params(paths.params).feedback
        result = ingest(app.serving.store, paths.feedback, config, lambda rows: validator.failing(rows, "feedback"))
    assert result.accepted == count, result


def test_corrected_answers_about_pictures_are_learned_and_promoted(
    champion: Paths, stage_run: RunOf, tmp_path: Path
) -> None:
    correct(champion, tmp_path / "home")
    assert all(item.images for item in read_items(champion.feedback))
    for stage in (curate, align, judge):
        stage(stage_run(stage.__name__))
    decision = json.loads((champion.metrics / "judge.json").read_text())
    assert decision["promote"], decision
    seeds = range(30_000, 30_050, 10)
    assert answered(champion.candidate, seeds) == [*RENAMED.values()] * len(seeds)
    assert answered(champion.candidate, seeds, COUNT) == ["one"] * 4 * len(seeds)
    before, after = (load_decoder(folder).state_dict() for folder in (champion.champion, champion.candidate))
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("vision."))
    findings = {finding["skill"]: finding for finding in decision["findings"]}
    assert findings.keys() == {"feedback/pictures", "shown", "shown reworded (calls)", "small_talk"}
    # What nobody corrected of the same pictures is guarded: its answers, and not only that no tool is called.
    assert findings["shown"]["questions"] == 20
    assert findings["shown"]["candidate"] == findings["small_talk"]["candidate"] == 1.0


def test_text_suites_are_tested_before_and_after_sight(
    champion: Paths, stage_run: RunOf, registry: Registry, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The candidate sees, the champion reads text alone: what it cannot read counts as wrong."""
    seeing = champion.champion
    for folder in (champion.sight, champion.tokens("decoder")):
        shutil.rmtree(folder)
    for name, stage in (("prepare@decoder", prepare), ("tune", tune)):
        stage(stage_run(name, tune__dataset="chats"))
    assert not load_decoder(champion.agent).sees_pictures
    for folder in (champion.agent, seeing):
        registry.register(folder, "agent", {"score": 0.0}, {}, None)
    write_params(champion.params, SETTINGS, lambda line: None)
    monkeypatch.chdir(champion.root)
    monkeypatch.setenv("LOOPWRIGHT_HOME", str(registry.home))
    capsys.readouterr()
    compare("agent", "1", "2", gate=True, as_json=True)
    decision = json.loads(capsys.readouterr().out)
    findings = {finding["skill"]: finding for finding in decision["findings"]}
    assert (findings["shown"]["champion"], findings["shown"]["candidate"]) == (0.0, 1.0)
    assert findings["small_talk"]["questions"] == 20
    assert findings["small_talk"]["outcome"] == "even"
    assert decision["promote"], decision["reason"]
