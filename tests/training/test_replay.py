"""Replay in tuning: the base's own answers, as a share of the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from components.config.params import InputError, load_params
from components.config.paths import Paths
from components.models.checkpoint import load_decoder
from components.runtime.stage import StageRun
from components.token_rows.batches import IGNORED, TokenRows
from components.tokenization.hf_tokenizer import load_chat_tokenizer
from components.training.replay import ReplayedRows, with_replay
from tests.tracking.test_model_import import decoder
from tests.training.conftest import WriteRows

REQUESTS = ["What is a lake?", "Hello!", "Tell me more."]


@pytest.fixture
def rows(tmp_path: Path, write_rows: WriteRows) -> tuple[TokenRows, TokenRows]:
    return tuple(TokenRows(write_rows(tmp_path / name, train=count), "train") for name, count in (("a", 20), ("b", 3)))  # type: ignore[return-value]


@pytest.mark.parametrize("share", [0.05, 0.1, 0.5])
def test_replayed_rows_are_their_share_of_all(rows: tuple[TokenRows, TokenRows], share: float) -> None:
    mixed = ReplayedRows(*rows, share)
    assert abs(mixed.count / len(mixed) - share) < 0.03
    assert len(mixed) == 20 + mixed.count


def test_a_batch_has_its_rows_in_order(rows: tuple[TokenRows, TokenRows]) -> None:
    own, replayed = rows
    mixed = ReplayedRows(own, replayed, 0.2)
    order = np.array([24, 3, 20, 19, 23, 0])
    batch = mixed.batch(order)
    for place, index in enumerate(order.tolist()):
        rows_of, number = (own, index) if index < 20 else (replayed, (index - 20) % 3)
        expected = rows_of.batch(np.array([number]))
        assert all(torch.equal(batch[name][place], expected[name][0]) for name in expected)
    assert mixed.lengths(order).tolist() == [own.seq_len] * 6
    assert all(torch.equal(mixed.batch(np.array([5]))[name], own.batch(np.array([5]))[name]) for name in batch)


def test_the_base_answers_each_request_and_its_answers_are_learned(
    tmp_path: Path, write_rows: WriteRows, project: Paths, recorder: Any
) -> None:
    base = decoder(tmp_path / "base")
    project.replay_requests.write_text("\n".join(REQUESTS))
    conversations = TokenRows(write_rows(tmp_path / "rows"), "train")
    run = StageRun("tune", load_params(project.params, {"scale": "smoke"}), project, tmp_path / "state", recorder)
    mixed = with_replay(run, conversations, base, 0.5)
    assert isinstance(mixed, ReplayedRows)
    replayed = mixed.replayed
    tokenizer, model = load_chat_tokenizer(base), load_decoder(base).eval()
    learned = 0
    for index in range(len(replayed)):
        batch = replayed.batch(np.array([index]))
        learned += int((batch["labels"] != IGNORED).sum())
        for segment in range(1, int(batch["segment_ids"].max()) + 1):
            ids = batch["input_ids"][batch["segment_ids"] == segment].tolist()
            request = next(text for text in REQUESTS if tokenizer.decode(ids).count(text))
            prompt = tokenizer.encode_chat([{"role": "user", "content": request}], None, True)[0]
            assert ids[: len(prompt)] == prompt
            with torch.inference_mode():
                greedy = model(torch.tensor([ids]))[0, len(prompt) - 1 : -1].argmax(-1).tolist()
            assert ids[len(prompt) :] == greedy
    assert learned > 0
    before = (tmp_path / "state/replay/rows.json").stat().st_mtime_ns
    with_replay(run, conversations, base, 0.5)
    assert (tmp_path / "state/replay/rows.json").stat().st_mtime_ns == before, "a resumed training asks no second time"


@pytest.mark.parametrize(
    ("text", "message"), [("\n", "no request that fits a row"), (None, "not found; write a request")]
)
def test_requests_that_cannot_be_used_are_refused(
    tmp_path: Path, write_rows: WriteRows, project: Paths, recorder: Any, text: str | None, message: str
) -> None:
    project.replay_requests.unlink()
    if text is not None:
        project.replay_requests.write_text(text)
    run = StageRun("tune", load_params(project.params, {"scale": "smoke"}), project, tmp_path / "state", recorder)
    with pytest.raises(InputError, match=message):
        with_replay(run, TokenRows(write_rows(tmp_path / "rows"), "train"), decoder(tmp_path / "base"), 0.1)
