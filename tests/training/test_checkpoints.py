"""A checkpoint is whole or it is not there."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from components.config.params import InputError
from components.training.checkpoints import Checkpoints, CheckpointState


def saved(step: int, size: int = 10) -> CheckpointState:
    return CheckpointState(
        step, {"weights.a": torch.full((size,), float(step)), "step": torch.tensor(step)}, {"losses": [[1, 2.5]]}
    )


def save(checkpoints: Checkpoints, state: CheckpointState) -> None:
    checkpoints.save(state)
    checkpoints.wait()


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "state")
    assert checkpoints.load() is None
    save(checkpoints, saved(7))
    loaded = checkpoints.load()
    assert loaded is not None
    assert (loaded.step, loaded.values) == (7, {"losses": [[1, 2.5]]})
    assert torch.equal(loaded.tensors["weights.a"], torch.full((10,), 7.0))
    assert loaded.tensors["step"].shape == ()


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 10):
        save(checkpoints, saved(step))
    assert [path.name[:13] for path in sorted(tmp_path.iterdir())] == ["step-00000002", "step-00000010"]


@pytest.mark.parametrize("harm", ["cut", "flip", "empty"])
def test_a_torn_one_is_skipped(harm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, saved(1))
    save(checkpoints, saved(2))
    newest = max(tmp_path.iterdir())
    content = newest.read_bytes()
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    newest.write_bytes({"cut": content[:-5], "flip": flipped, "empty": b""}[harm])
    loaded = checkpoints.load()
    assert loaded is not None
    assert loaded.step == 1
    assert f"warning: {newest}: torn checkpoint (its digest differs); skipped" in capsys.readouterr().out


def test_with_all_torn_the_run_starts_over_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        save(checkpoints, saved(step))
    for path in tmp_path.iterdir():
        path.write_bytes(b"torn")
    assert checkpoints.load() is None
    assert "no valid checkpoint is left; starting over" in capsys.readouterr().out


def test_what_a_killed_save_left_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / ".step-00000005-0.safetensors.7.tmp").write_bytes(b"half")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.load() is None
    save(checkpoints, saved(6))
    checkpoints.clear()
    assert list(tmp_path.iterdir()) == []


def test_on_a_full_disk_the_old_one_stays(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk's end: writing fails half-way, as there."""
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, saved(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(
            InputError, match=r"checkpoint of step 2 \(0\.4 MB\) cannot be written: File too large; free"
        ):
            save(checkpoints, saved(2, size=100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    loaded = checkpoints.load()
    assert loaded is not None
    assert loaded.step == 1
    assert len(list(tmp_path.iterdir())) == 1
