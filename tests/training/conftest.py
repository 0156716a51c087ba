"""A project folder with a few rows of tokens, small enough to train on in a second."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from components.config.params import load_params
from components.config.paths import Paths
from components.runtime.stage import StageRun

SOURCE = Path(__file__).parents[2]
SEQ_LEN, VOCAB = 32, 48
TINY = {
    "scale": "smoke",
    "prepare.decoder.seq_len": SEQ_LEN,
    "model.decoder.embed_dim": 16,
    "model.decoder.num_layers": 2,
    "model.decoder.num_heads": 2,
    "model.decoder.num_kv_heads": 1,
    "model.decoder.head_dim": 8,
    "model.decoder.hidden_dim": 24,
    "model.decoder.max_seq_len": 64,
} | {
    f"{stage}.{key}": value
    for stage in ("pretrain.decoder", "tune")
    for key, value in {
        "max_steps": 24,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "warmup_steps": 4,
        "log_steps": 1,
        "checkpoint_seconds": 0.0001,
    }.items()
}


@pytest.fixture
def tiny_settings() -> dict[str, Any]:
    """Every setting of the tiny runs, by dotted name."""
    return dict(TINY)


WriteRows = Callable[..., Path]


@pytest.fixture
def write_rows() -> WriteRows:
    """Write token rows: counting sequences in documents of 12, the first 4 tokens of each not learned."""

    def write(folder: Path, train: int = 20, test: int = 4, mask: int | None = None) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(0)
        for split, count in (("train", train), ("test", test)):
            place = np.arange(SEQ_LEN)
            start = random.integers(1, VOCAB, (count, 3))[:, np.minimum(place // 12, 2)]
            ids = (start + place % 12) % VOCAB
            segments = np.broadcast_to(np.where(place < 30, np.minimum(place // 12, 2) + 1, 0), ids.shape)
            learned = np.broadcast_to((place % 12 >= 4) if mask is None else mask, ids.shape)
            ids.astype("<u2").tofile(folder / f"{split}.ids.bin")
            segments.astype("<u2").tofile(folder / f"{split}.segments.bin")
            learned.astype("u1").tofile(folder / f"{split}.mask.bin")
        info = {"seq_len": SEQ_LEN, "rows": {"train": train, "test": test}, "vocab_size": VOCAB, "dtype": "uint16"}
        (folder / "rows.json").write_text(json.dumps(info))
        return folder

    return write


@pytest.fixture
def project(tmp_path: Path, write_rows: WriteRows) -> Paths:
    """A project with what pretrain and tune read."""
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(SOURCE / name, tmp_path / name)
    paths = Paths(tmp_path)
    paths.replay_requests.parent.mkdir()
    shutil.copy(Paths(SOURCE).replay_requests, paths.replay_requests)
    write_rows(paths.tokens("decoder") / "pretrain")
    write_rows(paths.tokens("decoder") / "tune")
    tokenizer = paths.tokenizer("decoder")
    tokenizer.mkdir(parents=True)
    paths.imported("decoder").mkdir(parents=True)
    paths.sight.mkdir(parents=True)
    (tokenizer / "tokenizer.json").write_text(
        json.dumps({"added_tokens": [{"id": 0, "content": "<|pad|>"}, {"id": 1, "content": "<|end|>"}]})
    )
    (tokenizer / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|end|>", "pad_token": "<|pad|>", "chat_template": ""})
    )
    facts = paths.agent_files / "tools/files/facts"
    facts.parent.mkdir(parents=True)
    facts.write_bytes(b"facts")
    agent = {"tools": ["look_up"], "forms": True, "datasets": ["stdlib-conversations"], "source": {"sha256": "0"}}
    (paths.agent_files / "agent.json").write_text(json.dumps(agent))
    return paths


class Recorder:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.children: dict[str, Recorder] = {}

    def params(self, values: Mapping[str, Any]) -> None: ...

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        self.logged.append((step, dict(values)))

    def dataset(self, name: str, digest: str, source: str, context: str) -> None: ...

    def table(self, name: str, columns: Mapping[str, list[Any]]) -> None: ...

    def artifact(self, path: Path) -> None: ...

    def figure(self, figure: Any, name: str) -> None: ...

    @contextmanager
    def child(self, name: str) -> Iterator[Recorder]:
        yield self.children.setdefault(name, Recorder())


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


NewRun = Callable[..., StageRun]


@pytest.fixture
def new_run(project: Paths) -> NewRun:
    """A run of a stage at tiny size; `changes` are keys of its own section."""

    def new(stage: str = "pretrain", seed: int = 0, **changes: Any) -> StageRun:
        name = "pretrain@decoder" if stage == "pretrain" else stage
        section = name.replace("@", ".")
        overrides = TINY | {f"{section}.{key}": value for key, value in changes.items()} | {"seed": seed}
        params = load_params(project.params, overrides)
        return StageRun(name, params, project, project.root / "state" / name, Recorder())

    return new
