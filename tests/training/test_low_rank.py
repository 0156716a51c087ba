"""LoRA in the one loop: it learns, it resumes bit for bit, and what is frozen stays as it was to the last bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from components.models.decoder import Decoder, DecoderConfig
from components.models.lora import add_lora, merge_lora
from components.runtime.stage import StageRun
from components.token_rows.batches import TokenRows
from components.training.checkpoints import Checkpoints
from components.training.loop import Training, train
from components.training.objectives import causal_lm

NewRun = Callable[..., StageRun]
BASE = DecoderConfig(
    vocab_size=48, embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, hidden_dim=24, max_seq_len=64
)


def adapted() -> Decoder:
    torch.manual_seed(0)
    model = Decoder(BASE)
    add_lora(model, rank=4, alpha=8.0)
    return model


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_pairs_alone_learn_and_the_base_keeps_every_bit(
    precision: str, new_run: NewRun, write_rows: Callable[..., object]
) -> None:
    run = new_run(optimizer="muon", max_steps=60, learning_rate=0.02, precision=precision)
    model, untouched = adapted(), dict(adapted().named_parameters())
    write_rows(run.paths.root / "rows")
    rows = TokenRows(run.paths.root / "rows", "train")
    measured = train(run, run.params.pretrain.decoder, model, rows, causal_lm)
    assert measured.losses[-1][1] < measured.losses[0][1] - 0.1
    for name, weight in model.named_parameters():
        assert torch.equal(weight, untouched[name]) == ("lora" not in name), name
    ids = torch.as_tensor(rows.batch(np.arange(2))["input_ids"])
    with torch.no_grad():
        told = model(ids)
        merge_lora(model)
        torch.testing.assert_close(model(ids), told, rtol=1e-4, atol=1e-4)


def test_lora_resumes_bit_for_bit(new_run: NewRun, write_rows: Callable[..., object]) -> None:
    run = new_run(optimizer="adamw")
    write_rows(run.paths.root / "rows")
    rows = TokenRows(run.paths.root / "rows", "train")

    def steps(training: Training[Decoder], count: int) -> None:
        for _ in range(count):
            training.train_step([rows.batch(np.array([training.step, training.step + 1]))])

    unbroken = Training(adapted(), causal_lm, run.params.pretrain.decoder, 0)
    steps(unbroken, 8)
    broken = Training(adapted(), causal_lm, run.params.pretrain.decoder, 0)
    steps(broken, 5)
    checkpoints = Checkpoints(run.state)
    checkpoints.save(broken.state())
    checkpoints.wait()
    saved = Checkpoints(run.state).load()
    assert saved is not None
    assert all("lora" in name for name in saved.tensors if name.startswith(("weights.", "adamw.first.")))
    resumed = Training(adapted(), causal_lm, run.params.pretrain.decoder, 0)
    assert resumed.restore(saved)
    steps(resumed, 3)
    for (name, ours), (_, theirs) in zip(
        resumed.model.named_parameters(), unbroken.model.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
