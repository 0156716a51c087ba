"""A randomly initialised checkpoint of `transformers` is imported, tuned by LoRA on conversations, and answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from components.agent.agent import Agent
from components.agent.pyfunc import Predictor
from components.config.params import load_params
from components.config.paths import Paths
from components.datasets.formats import DatasetWriter
from components.models.checkpoint import load_decoder
from components.models.lora import lora_of, merge_lora
from components.runtime.stage import StageRun
from components.token_rows.prepare import prepare
from components.tokenization import chat_tokenizer as bpe
from components.tokenization.hf_tokenizer import load_chat_tokenizer
from components.tracking.model_import import import_model, inspect_model
from components.tracking.registry import Registry
from components.training.tune import tune
from flows.orchestration.base_models import fetch_base_models
from tests.tracking.test_model_import import SOURCE, decoder

QUESTIONS = [("What does json.dumps do?", "It serializes obj."), ("question?", "answer: 42 times.")]
SETTINGS: dict[str, Any] = {
    "scale": "smoke",
    "prepare.decoder.seq_len": 64,
    "pretrain.decoder.dataset": "docs",
    "tune.dataset": "chats",
    "tune.base": "stranger@champion",
    "tune.lora_rank": 8,
    "tune.optimizer": "adamw",
    "tune.learning_rate": 0.01,
    "tune.max_steps": 60,
    "tune.global_batch_size": 2,
    "tune.micro_batch_size": 2,
}


@pytest.fixture
def paths(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, recorder: Any) -> Paths:
    """A project whose base is a stranger, with a tokenizer of its own."""
    monkeypatch.setenv("LOOPWRIGHT_HOME", str(home))
    paths = Paths(tmp_path)
    with DatasetWriter(paths.collected / "docs", "docs", "documents") as writer:
        writer.write("train", {"id": "1", "text": "words " * 50, "source": "here"})
        writer.write("test", {"id": "2", "text": "other words", "source": "here"})
    with DatasetWriter(paths.collected / "chats", "chats", "conversations") as writer:
        for number, (question, answer) in enumerate(QUESTIONS * 4):
            said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            writer.write("test" if number > 5 else "train", {"id": str(number), "messages": said})
    bpe.save(bpe.train(["some other text entirely"], 320), paths.tokenizer("decoder"))
    folder = decoder(tmp_path / "theirs")
    import_model(folder, inspect_model(folder), "stranger", Registry(home))
    paths.params.write_text(
        (SOURCE / "params.yaml").read_text().replace("tune:", "tune:\n  base: stranger@champion", 1)
    )
    fetch_base_models(paths, print)
    params = load_params(SOURCE / "params.yaml", SETTINGS)
    paths.metrics.mkdir(parents=True)
    paths.agent_files.mkdir(parents=True)
    (paths.agent_files / "agent.json").write_text('{"tools": [], "datasets": []}')
    (tmp_path / "data").mkdir(exist_ok=True)
    paths.replay_requests.write_text("What is a lake?\n\nHello!\n")
    prepare(StageRun("prepare@decoder", params, paths, tmp_path / "state", recorder))
    tune(StageRun("tune", params, paths, tmp_path / "state", recorder))
    return paths


def test_a_stranger_is_tuned_and_answers_in_its_own_words(paths: Paths) -> None:
    before, after = load_decoder(paths.imported("decoder")), load_decoder(paths.agent)
    assert torch.equal(before.embed.weight, after.embed.weight)
    assert lora_of(after) is not None
    merge_lora(after)
    assert not torch.equal(before.blocks[0].attention.qkv.weight, after.blocks[0].attention.qkv.weight)
    agent = Agent.load(paths.agent, after.config.max_seq_len)
    assert not agent.tokenizer.native
    chats = [[{"role": "user", "content": question}] for question, _ in QUESTIONS]
    assert Predictor(paths.agent).predict(chats) == [answer for _, answer in QUESTIONS]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_transformers_says_what_the_tuned_stranger_says(paths: Paths) -> None:
    base, tokenizer = paths.imported("decoder"), AutoTokenizer.from_pretrained(paths.agent)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), paths.agent)
    chat = [{"role": "user", "content": QUESTIONS[0][0]}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    assert prompt["input_ids"][0].tolist() == load_chat_tokenizer(paths.agent).encode_chat(chat, None, True)[0]
    said = theirs.generate(**prompt, max_new_tokens=30, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(said, skip_special_tokens=True) == QUESTIONS[0][1]
