"""Trainings that one process and several ranks must do alike; `distributed_cases.py FOLDER RANKS:CASE...` does some."""

from __future__ import annotations

import json
import multiprocessing.connection
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from components.config.params import load_params
from components.config.paths import Paths
from components.models.decoder import Decoder, DecoderConfig
from components.models.encoder import Classifier, EncoderConfig, EncoderForPretraining
from components.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from components.models.lora import add_lora
from components.runtime.stage import StageRun
from components.token_rows.batches import IGNORED, Batch, Indices
from components.token_rows.preference_rows import Role
from components.token_rows.variable_length import LabelledRows
from components.tracking.event_log import NoTracker
from components.training import classifier
from components.training.align import align_objective
from components.training.classifier import validation_logits
from components.training.distributed import join, rank
from components.training.early_stopping import EarlyStopping
from components.training.loop import train
from components.training.objectives import (
    Objective,
    causal_lm,
    classification,
    masked_lm_next_sentence,
    sequence_to_sequence,
)

VOCAB, LENGTH, STEPS = 61, 16, 50
LABELS, LABEL_WEIGHTS = ("a", "b", "c"), (0.5, 1.0, 2.0)
VALIDATION_ROWS, VALIDATION_STEPS = 13, 7
"""Of a batch of validation, so that 32 rows are batches for two ranks and one for a rank alone; between validations."""


class RandomRows:
    """Rows of a kind of model: the same for the same index. A third of the rows of the first steps has no targets."""

    folder, seq_len, vocab_size = Path("rows"), LENGTH, VOCAB

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.at_step: dict[int, Callable[[], None]] = {}
        """What happens before the batch of a step is made."""

    def __len__(self) -> int:
        return 32

    def lengths(self, indices: Indices | None = None) -> Indices:
        return np.array([6 + int(index) % 10 for index in (range(len(self)) if indices is None else indices)])

    def batch(self, indices: Indices, step: int = 0) -> Batch:
        self.at_step.pop(step, lambda: None)()
        rows = [self._row(int(index)) for index in indices]
        if self.kind == "align":
            rows = [row for pair in rows for row in self._units(pair)]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _row(self, index: int) -> Batch:
        random = torch.Generator().manual_seed(index)
        length = 6 + index % 10
        ids = (torch.randint(5, 20, (1,), generator=random) + torch.arange(LENGTH) * (1 + index % 3)) % VOCAB
        real = torch.arange(LENGTH) < length
        ids = torch.where(real, ids, 0)
        labels = torch.where(real, ids.roll(-1), IGNORED)
        labels[length - 1 :] = IGNORED
        if self.kind == "encoder":
            chosen = real & (torch.rand(LENGTH, generator=random) < 0.3)
            return {
                "input_ids": torch.where(chosen, 3, ids),
                "labels": torch.where(chosen, ids, IGNORED),
                "token_type_ids": (torch.arange(LENGTH) > 4).long(),
                "attention_mask": real.long(),
                "next_sentence_labels": torch.tensor(index % 2),
            }
        if self.kind == "classifier":
            label = torch.tensor(index % len(LABELS))
            mask = {"attention_mask": real.long(), "token_type_ids": torch.zeros(LENGTH, dtype=torch.long)}
            return {"input_ids": ids, "labels": label} | mask
        if self.kind == "encoder_decoder":
            targets = torch.where(real, ids.flip(0), IGNORED)
            shifted = torch.where(real, ids.flip(0), 0).roll(1)
            mask = {"attention_mask": real.long(), "decoder_attention_mask": real.long()}
            return {"input_ids": ids, "decoder_input_ids": shifted, "labels": targets} | mask
        if self.kind == "decoder" and index % 3 == 0:
            labels = torch.full_like(labels, IGNORED)
        return {"input_ids": ids, "labels": labels, "segment_ids": real.long(), "position_ids": torch.arange(LENGTH)}

    def _units(self, row: Batch) -> list[Batch]:
        """A demonstration, a replayed conversation, or a pair."""
        number = int(row["input_ids"][0]) % 3
        roles = ((Role.SFT,), (Role.REPLAY,), (Role.CHOSEN, Role.REJECTED))[number]
        units = [row | {"role": torch.tensor(int(role)), "reference": torch.tensor(-30.0)} for role in roles]
        for unit in units[1:]:
            unit["input_ids"] = (unit["input_ids"] * 7 + 3) % VOCAB
        return units


DECODER = DecoderConfig(VOCAB, 16, 2, 2, 1, 8, 24, LENGTH, qk_norm=True, tie_embeddings=True)
ENCODER = EncoderConfig(VOCAB, 16, 2, 2, 24, LENGTH)
ENCODER_DECODER = EncoderDecoderConfig(VOCAB, 16, 2, 2, 2, 8, 24, LENGTH, dropout=0.0)
CLASSIFIER = replace(ENCODER, labels=LABELS)


@dataclass
class Case:
    model: nn.Module
    objective: Objective[Any]
    rows: RandomRows
    optimizer: str


def case(name: str) -> Case:
    """`KIND-OPTIMIZER`, with a model of weights that the name decides; `lora` and `bf16` in it say more of a kind."""
    kind, _, optimizer = name.removeprefix("bf16_").removeprefix("lora_").partition("-")
    torch.manual_seed(1)
    made = _case(kind, optimizer)
    if "lora" in name:
        add_lora(made.model, 3, 6.0, ("pooler", "head") if kind == "classifier" else ())
    if "bf16" in name:
        made.model.to(torch.bfloat16)
        if "lora" not in name:  # as a stage reads it, which trains all weights in fp32
            made.model.float()
    return made


def _case(kind: str, optimizer: str) -> Case:
    if kind == "encoder":
        return Case(EncoderForPretraining(ENCODER), masked_lm_next_sentence, RandomRows(kind), optimizer)
    if kind == "encoder_decoder":
        return Case(EncoderDecoder(ENCODER_DECODER), sequence_to_sequence, RandomRows(kind), optimizer)
    if kind == "classifier":
        objective = classification(torch.tensor(LABEL_WEIGHTS), label_smoothing=0.1)
        return Case(Classifier(CLASSIFIER), objective, RandomRows(kind), optimizer)
    model = Decoder(DECODER if kind != "align" else replace(DECODER, tie_embeddings=False))
    if kind != "align":
        return Case(model, causal_lm, RandomRows(kind), optimizer)
    params = load_params(Paths(Path.cwd()).params, {"scale": "smoke"})
    reference = Decoder(model.config).requires_grad_(False)
    return Case(model, align_objective(params.align, reference), RandomRows(kind), optimizer)


def run_case(name: str, folder: Path, at_step: dict[int, Callable[[], None]] | None = None, **changes: Any) -> Any:
    """Train a case with its checkpoints in `folder`; returns losses and weights, on rank 0 alone."""
    trained_case = case(name)
    trained_case.rows.at_step = at_step or {}
    settings = {"global_batch_size": 8, "micro_batch_size": 2, "max_steps": STEPS, "optimizer": trained_case.optimizer}
    # At higher rates a frozen random model, and Muon on two stacks, amplify the last bits of a sum within forty steps.
    settings |= {
        "learning_rate": 1e-3 if "lora" in name else 0.01,
        "muon_learning_rate": 0.01 if "encoder_decoder" in name else 0.02,
        "warmup_steps": 4,
        "log_steps": 1,
    }
    precision = "bf16" if "bf16" in name else "fp32"
    settings |= {"weight_decay": 0.1, "precision": precision, "checkpoint_seconds": 1e6}
    overrides = {f"pretrain.decoder.{key}": value for key, value in (settings | changes).items()}
    params = load_params(Paths(Path.cwd()).params, {"scale": "smoke"} | overrides)
    run = StageRun("pretrain@decoder", params, Paths(folder), folder, NoTracker())
    model, rows = trained_case.model, trained_case.rows
    stopping = early_stopping(rows) if rows.kind == "classifier" else None
    measured = train(run, params.pretrain.decoder, model, rows, trained_case.objective, stopping)
    result = {"losses": measured.losses, "tokens": measured.tokens, "weights": model.state_dict()}
    return result | ({"scores": stopping.scores} if stopping is not None else {})


def early_stopping(rows: RandomRows) -> EarlyStopping:
    """By a loss that grows in the end, so that the best weights are not the last; other ranks score by another."""
    classifier.VALIDATION_BATCH = VALIDATION_ROWS
    labels = torch.tensor([index % len(LABELS) for index in range(len(rows))])

    def score(model: Classifier) -> float:
        logits = validation_logits(model, cast(LabelledRows, rows))
        return -float(F.cross_entropy(logits, labels.flip(0) if rank() == 0 else labels))

    return EarlyStopping(score, VALIDATION_STEPS, STEPS, lambda *_: None)


def end(number: signal.Signals) -> Callable[[], None]:
    """Send this process a signal."""
    return lambda: os.kill(os.getpid(), number)


def run_rank(number: int, ranks: int, port: int, name: str, folder: Path) -> None:
    """Be one rank of a case; see `main`."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    plain, plus, event = name.partition("+")
    sent, _, step = event.partition("@")
    is_last = number == ranks - 1
    at_step = {int(step): end(signal.Signals(int(sent)))} if step and is_last else None
    join()
    checkpoints = folder / (f"{plain}+" if plus else f"{plain}-{ranks}")
    result = run_case(plain, checkpoints, at_step, **({"checkpoint_seconds": 1e-6} if plus else {}))
    torch.save(result, folder / f"{name}-{ranks}.pt")  # rank 0's alone comes here


def run_ranks(ranks: int, name: str, folder: Path) -> list[int]:
    """Fork the ranks of a case, which have all that this process imported; their exit codes, signals negative.

    As under torchrun, one that fails ends the others.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run_rank, args=(number, ranks, port, name, folder)) for number in range(ranks)]
    for process in processes:
        process.start()
    while alive := [process.sentinel for process in processes if process.is_alive()]:
        multiprocessing.connection.wait(alive)
        if any(process.exitcode for process in processes):
            for process in processes:
                process.join(10)  # a stop ends all of them by itself
                process.kill()
    return [process.exitcode or 0 for process in processes]


def flip(checkpoints: Path) -> None:
    """Alter the last byte of a shard of the newest checkpoint."""
    newest = max(path.parent for path in checkpoints.glob("step-*-shards/commit.json"))
    print(f"altered {checkpoints.name}/{newest.name}", flush=True)
    with max(newest.glob("*.distcp")).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))


def main(folder: Path, items: list[str]) -> None:
    """Train each RANKS:CASE and write FOLDER/CASE-RANKS.pt; FOLDER/exit_codes.json has the exit codes of each item.

    CASE+ writes a checkpoint after each step, CASE+NUMBER@STEP sends the last rank that signal before that step,
    flip:CASE+ alters the last of these checkpoints.
    """
    codes = {}
    for item in items:
        ranks, _, name = item.partition(":")
        if ranks == "flip":
            flip(folder / name)
            continue
        codes[item] = run_ranks(int(ranks), name, folder)
        (folder / "exit_codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
