"""Replay in tuning: the base's own answers to ordinary requests, so that it does not forget how to chat.

What a fine-tuning does not show, it loses (McCloskey and Cohen 1989). The base's pretraining data are not at hand, its
answers are: self-generated rehearsal (Huang et al. 2024, arXiv 2403.01244).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch

from components.config.params import InputError
from components.inference.batching import Row, generate
from components.inference.packed_weights import pack
from components.models.checkpoint import load_decoder
from components.models.devices import best_device, compute_dtype
from components.runtime.stage import StageRun
from components.token_rows.augmentation import Piece
from components.token_rows.batches import PIXELS, Batch, Indices, Rows, TokenRows
from components.token_rows.packing import RowWriter, id_type, pack_rows, write_rows_file
from components.tokenization.hf_tokenizer import load_chat_tokenizer
from components.training.distributed import rank, wait_for_all

MAX_ANSWER = 128
"""Tokens of an answer; of a longer one the beginning is learned."""


class ReplayedRows:
    """Rows of a training set, and replayed rows repeated or left out so that they are a share of all."""

    def __init__(self, rows: Rows, replayed: Rows, share: float) -> None:
        self.rows, self.replayed = rows, replayed
        self.folder, self.seq_len, self.vocab_size = rows.folder, rows.seq_len, rows.vocab_size
        self.count = round(len(rows) * share / (1 - share))
        """Replayed rows of an epoch."""

    def __len__(self) -> int:
        return len(self.rows) + self.count

    def lengths(self, indices: Indices) -> Indices:
        lengths = np.empty_like(indices)
        for rows, chosen, of in self._parts(indices):
            lengths[chosen] = rows.lengths(of)
        return lengths

    def batch(self, indices: Indices, step: int = 0) -> Batch:
        """The rows in the order of `indices`, as those of `TokenRows`."""
        batches: list[Batch] = []
        order: list[int] = []
        for rows, chosen, of in self._parts(indices):
            batches.append(rows.batch(of, step))
            order += chosen.tolist()
        places = np.argsort(order)
        # No replayed row has pictures, and rows of one's own stay in their order: their pictures do too.
        pictures = batches[0].pop(PIXELS, None)
        joined = {name: torch.cat([batch[name] for batch in batches])[places] for name in batches[0]}
        return joined if pictures is None else {**joined, PIXELS: pictures}

    def _parts(self, indices: Indices) -> list[tuple[Rows, Indices, Indices]]:
        """Of each set that has some: the set, their positions in `indices`, and their numbers in the set."""
        own = indices < len(self.rows)
        parts = [
            (self.rows, np.flatnonzero(own), indices[own]),
            (self.replayed, np.flatnonzero(~own), (indices[~own] - len(self.rows)) % len(self.replayed)),
        ]
        return [part for part in parts if len(part[1])]


def with_replay(run: StageRun, rows: TokenRows, base: Path, share: float) -> Rows:
    """`rows`, and the base's answers to the requests of data/replay_requests.txt as a share of all rows.

    Raises: InputError when there is no such file, or it has no request that fits a row.
    """
    folder = run.state / "replay"
    if rank() == 0 and not (folder / "rows.json").is_file():
        _write_answers(run, folder, base, rows.seq_len)
    wait_for_all()
    return ReplayedRows(rows, TokenRows(folder, "train"), share)


def _write_answers(run: StageRun, folder: Path, base: Path, seq_len: int) -> None:
    path = run.paths.replay_requests
    if not path.is_file():
        raise InputError(f"{path}: not found; write a request on each line, or set tune.replay_share to 0")
    requests = list(filter(None, map(str.strip, path.read_text(encoding="utf-8").splitlines())))
    tokenizer = load_chat_tokenizer(base)
    chats = [([{"role": "user", "content": request}], None) for request in requests]
    prompts = [ids for ids, _ in tokenizer.encode_chats(chats, add_generation_prompt=True) if len(ids) < seq_len]
    if not prompts:
        raise InputError(f"{path}: no request that fits a row of {seq_len} tokens; write one on each line")
    print(f"{run.name}  {run.params.tune.base} answers {len(prompts)} requests of {path.name}", flush=True)
    device = best_device()
    model = load_decoder(base, compute_dtype("auto", device) if device.type == "cuda" else torch.float32, device).eval()
    if device.type == "cpu":
        pack(model, compute_dtype("auto", device, model))
    answers = [Row(ids, min(MAX_ANSWER, seq_len - len(ids)), stop_ids=(tokenizer.end_id,)) for ids in prompts]
    generate(model, answers, max_context=seq_len)
    pieces: list[Piece] = [(row.ids, [0] * len(row.prompt) + [1] * len(row.generated)) for row in answers]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    writer = RowWriter(folder, "train", seq_len, id_type(tokenizer))
    pack_rows(iter(pieces), writer)
    writer.close()
    write_rows_file(folder, tokenizer, seq_len, {"train": writer.rows})
