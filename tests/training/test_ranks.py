"""What several ranks rely on, on one process: how rows are dealt, checkpoints in folders, who starts ranks."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from components.config.params import InputError
from components.models.decoder import Decoder, DecoderConfig
from components.runtime.launcher import launcher_settings, refuse_ranks
from components.runtime.stage import StageRun, digest
from components.token_rows.batches import TokenRows
from components.training import checkpoints as checkpoints_module
from components.training import distributed
from components.training.checkpoints import COMMIT, VALUES, Checkpoints, CheckpointState
from components.training.distributed import dealt, passes
from components.training.loop import Training
from components.training.objectives import causal_lm

NewRun = Callable[..., StageRun]


@pytest.mark.parametrize(
    ("ranks", "micro_batch_size"),
    [(1, 1), (1, 4), (1, 8), (2, 1), (2, 2), (2, 8), (3, 1), (3, 2), (3, 4), (4, 2), (5, 4), (7, 1), (8, 1), (8, 8)],
)
def test_every_row_is_dealt_once(ranks: int, micro_batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In no more micro-batches than passes, and at least one on each rank."""
    rows, shares = np.arange(8), list[list[Any]]()
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    for rank in range(ranks):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(dealt(rows, micro_batch_size))
    count = passes(8, micro_batch_size)
    assert all(len(share) in (count, max(1, count - 1)) for share in shares)
    parts = [part.tolist() for share in shares for part in share]
    assert sorted(row for part in parts for row in part) == rows.tolist()
    assert all(1 <= len(part) <= micro_batch_size for part in parts)
    if (8 // micro_batch_size) % ranks == 0:
        assert sorted(parts) == rows.reshape(-1, micro_batch_size).tolist(), "those of one process"


def new_training(run: StageRun) -> Training[Decoder]:
    torch.manual_seed(run.params.seed)
    model = Decoder(DecoderConfig.from_params(run.params.model.decoder, 48))
    return Training(model, causal_lm, run.params.pretrain.decoder, 0)


def write_shards(folder: Path, state: CheckpointState) -> None:
    """A checkpoint as several ranks write it, here in one shard."""
    dcp.save({name: value for name, value in state.tensors.items() if "random" not in name}, checkpoint_id=folder)
    (folder / VALUES).write_text(json.dumps(state.values))
    (folder / COMMIT).write_text(json.dumps({path.name: digest(path) for path in folder.iterdir()}))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_one_process_goes_on_from_the_checkpoint_of_several(
    new_run: NewRun, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the previous checkpoint, where the newest is not finished or a byte of it differs."""
    run = new_run(max_steps=4)
    rows = TokenRows(run.paths.tokens("decoder") / "pretrain", "train")
    trained = new_training(run)
    trained.train_step([rows.batch(np.array([0, 1]))])
    folder, later = run.state / "step-00000001-shards", run.state / "step-00000009-shards"
    for path in (folder, later):
        write_shards(path, trained.state())
    for name in (VALUES, ".metadata", "__0_0.distcp"):
        content = (later / name).read_bytes()
        (later / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        saved = Checkpoints(run.state).load()
        assert saved is not None
        assert saved.step == 1
        assert capsys.readouterr().out == f"warning: {later}: torn checkpoint (its digest differs); skipped\n"
        (later / name).write_bytes(content)
    (later / COMMIT).unlink()
    saved = Checkpoints(run.state).load()
    assert saved is not None
    assert saved.step == 1
    resumed = new_training(run)
    assert resumed.restore(saved)
    for training in (trained, resumed):
        training.train_step([rows.batch(np.array([2, 3]))])
    for name, value in trained.state().tensors.items():
        assert "random" in name or torch.equal(value, resumed.state().tensors[name]), name
    checkpoints = Checkpoints(run.state)
    for step in (2, 3):
        resumed.step = step
        checkpoints.save(resumed.state())
    checkpoints.wait()
    assert sorted(path.suffix for path in run.state.iterdir()) == [".safetensors"] * 2, "the last two are kept"


def test_training_goes_on_while_its_checkpoint_is_written(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is the state of the step that it was saved at."""
    run, may_write = new_run(), Event()
    write = checkpoints_module.tensors_to_bytes
    monkeypatch.setattr(checkpoints_module, "tensors_to_bytes", lambda *words: may_write.wait(60) and write(*words))
    training = new_training(run)
    state = training.state()
    before = {name: tensor.clone() for name, tensor in state.tensors.items()}
    checkpoints = Checkpoints(run.state)
    checkpoints.save(state)
    for weight in training.trained:
        weight.data += 1.0
    assert checkpoints.load() is None
    may_write.set()
    checkpoints.wait()
    saved = checkpoints.load()
    assert saved is not None
    assert all(torch.equal(tensor, before[name]) for name, tensor in saved.tensors.items())


@pytest.mark.parametrize("failing", ["_remove", "write_text", "digest"])
def test_what_the_disk_refuses_rank_0_alone_is_raised_by_all(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nobody waits for it. Threads stand in for two ranks."""
    this, barrier, gathered = threading.local(), threading.Barrier(2, timeout=5), [None, None]

    def gather(outcomes: list[object], outcome: Any, _: object) -> None:
        gathered[this.rank] = outcome
        barrier.wait()
        outcomes[:] = gathered
        barrier.wait()

    def save(*_: object, checkpoint_id: Path, process_group: object) -> None:
        checkpoint_id.mkdir(parents=True, exist_ok=True)
        (checkpoint_id / f"__{this.rank}_0.distcp").write_text("rows")

    def refuse(path: Path, *_: object) -> str:
        if this.rank == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return "digest"

    def write(rank: int) -> None:
        this.rank = rank
        Checkpoints(tmp_path)._write_shards(1, {}, "{}")

    monkeypatch.setattr(checkpoints_module, "rank", lambda: this.rank)
    monkeypatch.setattr(checkpoints_module, "world_size", lambda: 2)
    monkeypatch.setattr(checkpoints_module, failing, refuse)
    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    monkeypatch.setattr("torch.distributed.checkpoint.state_dict_saver.save", save)
    with ThreadPoolExecutor(2) as pool:
        for writing in [pool.submit(write, rank) for rank in range(2)]:
            with pytest.raises(InputError, match="shards: cannot be written: No space left on device; free"):
                writing.result()
    assert not list(tmp_path.glob(f"*/{COMMIT}"))


def test_stages_that_train_start_ranks(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    root = new_run().paths.root
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launcher_settings("tune", root) is None
    (root / "params.yaml").write_text("scale: smoke\nrun: {launcher: torchrun, processes: 3}\n")
    trainings = ("tune", "pretrain@encoder", "finetune@classifier", "align")
    settings = [launcher_settings(name, root) for name in trainings]
    assert [each and each.processes for each in settings] == [3, 3, 3, 3]
    assert not any(launcher_settings(name, root) for name in ("collect", "assess@classifier", "pretrain_vision"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launcher_settings("tune", root) is None, "it is a rank itself"
    refuse_ranks("tune")
    with pytest.raises(InputError, match="assess@classifier: runs as one process, not 2; start it without torchrun"):
        refuse_ranks("assess@classifier")
