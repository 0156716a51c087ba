"""What several ranks rely on, on one process: how rows are dealt, checkpoints in folders, who starts ranks."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from components.config.params import InputError
from components.models.decoder import Decoder, DecoderConfig
from components.runtime.launcher import processes_of, refuse_ranks
from components.runtime.stage import StageRun
from components.token_rows.batches import TokenRows
from components.training import distributed
from components.training.checkpoints import COMMIT, Checkpoints
from components.training.distributed import dealt
from components.training.loop import Training
from components.training.objectives import causal_lm

NewRun = Callable[..., StageRun]


@pytest.mark.parametrize(
    ("ranks", "micro_batch_size"),
    [(1, 1), (1, 4), (1, 8), (2, 1), (2, 2), (2, 8), (3, 2), (3, 4), (4, 2), (5, 4), (8, 1), (8, 8)],
)
def test_every_row_is_dealt_once(ranks: int, micro_batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In as many micro-batches on each rank, or the ranks would wait for one another."""
    rows, shares = np.arange(8), []
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    for rank in range(ranks):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(dealt(rows, micro_batch_size))
    assert len({len(share) for share in shares}) == 1
    parts = [part.tolist() for share in shares for part in share]
    assert sorted(row for part in parts for row in part) == rows.tolist()
    assert all(1 <= len(part) <= micro_batch_size for part in parts)
    if (8 // micro_batch_size) % ranks == 0:
        assert sorted(parts) == rows.reshape(-1, micro_batch_size).tolist(), "those of one process"


def new_training(run: StageRun) -> Training[Decoder]:
    torch.manual_seed(run.params.seed)
    model = Decoder(DecoderConfig.from_params(run.params.model.decoder, 48))
    return Training(model, causal_lm, run.params.pretrain.decoder, 0)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_one_process_goes_on_from_the_checkpoint_of_several(new_run: NewRun) -> None:
    run = new_run(max_steps=4)
    rows = TokenRows(run.paths.tokens("decoder") / "pretrain", "train")
    trained = new_training(run)
    trained.train_step([rows.batch(np.array([0, 1]))])
    state = trained.state()
    folder = run.state / "step-00000001-shards"
    dcp.save({name: value for name, value in state.tensors.items() if "random" not in name}, checkpoint_id=folder)
    assert Checkpoints(run.state).load() is None, "not finished"
    (folder / COMMIT).write_text(json.dumps(state.values))
    saved = Checkpoints(run.state).load()
    assert saved is not None
    resumed = new_training(run)
    assert resumed.restore(saved)
    for training in (trained, resumed):
        training.train_step([rows.batch(np.array([2, 3]))])
    for name, value in trained.state().tensors.items():
        assert "random" in name or torch.equal(value, resumed.state().tensors[name]), name
    for step in (2, 3):
        resumed.step = step
        Checkpoints(run.state).save(resumed.state())
    assert not folder.exists(), "the last two are kept"


def test_stages_that_train_start_ranks(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    root = new_run().paths.root
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert processes_of("tune", root) == 1
    (root / "params.yaml").write_text("scale: smoke\nrun: {launcher: torchrun, processes: 3}\n")
    trainings = ("tune", "pretrain@encoder", "finetune@summarizer", "align")
    assert [processes_of(name, root) for name in trainings] == [3, 3, 3, 3]
    assert [processes_of(name, root) for name in ("collect", "finetune@classifier", "pretrain_vision")] == [1, 1, 1]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert processes_of("tune", root) == 1, "it is a rank itself"
    refuse_ranks("tune")
    with pytest.raises(InputError, match="finetune@classifier: runs as one process, not 2; start it without torchrun"):
        refuse_ranks("finetune@classifier")
