"""A project that people have spoken to, small enough to curate, align and judge in seconds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from components.config.model_settings import DecoderModelConfig
from components.config.params import load_params
from components.config.paths import Paths
from components.datasets.formats import DatasetWriter, Row
from components.feedback.items import SCHEMA
from components.models.checkpoint import save_decoder
from components.models.decoder import Decoder, DecoderConfig
from components.runtime.stage import StageRun
from components.tokenization import chat_tokenizer as bpe
from components.tokenization.hf_tokenizer import load_chat_tokenizer

SOURCE = Path(__file__).parents[2]
SETTINGS: dict[str, Any] = {
    "scale": "smoke",
    "pretrain.decoder.dataset": "none",
    "tune.dataset": "talks",
    "prepare.decoder.seq_len": 96,
    "prepare.decoder.token_noise_rate": 0.0,
    "model.decoder.embed_dim": 16,
    "model.decoder.num_layers": 2,
    "model.decoder.num_heads": 2,
    "model.decoder.num_kv_heads": 1,
    "model.decoder.head_dim": 8,
    "model.decoder.hidden_dim": 24,
    "model.decoder.max_seq_len": 128,
    "curate.replay": 20,
    "curate.noise": 0.0,
    "align.max_steps": 24,
    "align.global_batch_size": 4,
    "align.micro_batch_size": 2,
    "align.warmup_steps": 4,
    "align.log_steps": 1,
    "align.checkpoint_seconds": 0.0001,
    "evaluate.max_new_tokens": 8,
}


class Silent:
    """A tracker that keeps nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def lookup(number: int) -> list[Row]:
    """A conversation with one call."""
    function = {"name": "lookup", "arguments": json.dumps({"name": f"name_{number}"})}
    return [
        {"role": "user", "content": f"where is name_{number}?"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "a", "type": "function", "function": function}]},
        {"role": "tool", "content": f"module_{number}", "tool_call_id": "a", "name": "lookup"},
        {"role": "assistant", "content": f"name_{number} is in module_{number}."},
    ]


def chat(number: int) -> list[Row]:
    """A conversation without a call."""
    return [
        {"role": "user", "content": f"hello number {number}"},
        {"role": "assistant", "content": f"hello, you are {number}"},
    ]


def item(number: int, question: str, skill: str = "conversation", **changes: Any) -> Row:
    """A row of a partition: a thumb down on "no idea" unless `changes` say otherwise."""
    steps: list[Row] = []
    if skill != "conversation":
        steps = [
            {"type": "call", "name": skill, "arguments": {"name": question.split()[-1].rstrip("?")}},
            {"type": "result", "name": skill, "content": f"module_{number}"},
        ]
    return {
        "feedback_id": f"fb-{number}",
        "sequence": number,
        "completion_id": f"chatcmpl-{number}",
        "created": 1.7e9 + number,
        "model": "agent/1",
        "messages": [{"role": "user", "content": question}],
        "steps": json.dumps(steps),
        "answer": "no idea",
        "rating": "down",
        "voice": "local",
        "skill": skill,
    } | changes


def correction(number: int) -> Row:
    """A corrected answer of the skill `lookup`, each of its own prompt."""
    return item(number, f"where is name_{number}?", "lookup", correction=f"in module_{number}")


def write_partition(paths: Paths, rows: Sequence[Row]) -> None:
    """One partition of `data/feedback`, as ingestion writes it."""
    paths.feedback.mkdir(parents=True, exist_ok=True)
    name = f"items-{rows[0]['sequence']:09d}-{rows[-1]['sequence']:09d}.parquet"
    pq.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA), paths.feedback / name)


def write_model(paths: Paths, folder: Path, seed: int = 0) -> None:
    """An agent without tools that has learned nothing yet."""
    vocab_size = load_chat_tokenizer(paths.tokenizer("decoder")).vocab_size
    model_config: DecoderModelConfig = load_params(SOURCE / "params.yaml", SETTINGS).model.decoder
    torch.manual_seed(seed)
    model = Decoder(DecoderConfig.from_params(model_config, vocab_size))
    files: dict[str, Path | str] = {
        "agent.json": json.dumps({"tools": [], "max_steps": 2}),
        "origin.json": json.dumps({"version": "agent/1"}),
    }
    save_decoder(model, folder, paths.tokenizer("decoder"), files)


def write_project(root: Path) -> Paths:
    """Declarations, earlier conversations with held-out suites, and the model to start from."""
    for name in ("dvc.yaml", "data/improve/dvc.yaml", "params.yaml"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(SOURCE / name, root / name)
    paths = Paths(root)
    with DatasetWriter(paths.collected / "talks", "talks", "conversations") as writer:
        for number in range(100, 120):
            writer.write("train", {"id": f"a{number}", "messages": lookup(number)})
            writer.write("train", {"id": f"b{number}", "messages": chat(number)})
        for number in range(200, 212):
            writer.write("test", {"id": f"c{number}", "messages": lookup(number), "suite": "lookup/held_out"})
            writer.write("test", {"id": f"d{number}", "messages": chat(number), "suite": "conversation/held_out"})
            writer.write("test", {"id": f"e{number}", "messages": chat(number)})
    paths.added.mkdir(parents=True)
    texts = [f"where is name_{n}? in module_{n}. hello number {n}, you are no idea, lookup" for n in range(100)]
    bpe.save(bpe.train(texts, 340), paths.tokenizer("decoder"))
    write_model(paths, paths.start)
    return paths


def new_run(paths: Paths, stage: str, **changes: Any) -> StageRun:
    """A run of a stage at tiny size; `changes` are settings by dotted name, two underscores for the dot."""
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    params = load_params(paths.params, SETTINGS | dotted)
    return StageRun(stage, params, paths, paths.root / "state" / stage, Silent())
