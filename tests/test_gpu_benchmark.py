"""The script for a GPU runs in miniature, so that the first machine with one does not find it broken."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu


def test_every_check_of_a_cpu_gives_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "results" / "cpu.md"
    monkeypatch.setattr(sys, "argv", ["gpu", "--miniature", "--out", str(out)])
    gpu.main()
    rows = dict(line.strip("| ").split(" | ", 1) for line in out.read_text().splitlines()[4:])
    bench = gpu.Bench(torch.device("cpu"), gpu.MINIATURE)
    assert list(rows) == [name for name, _ in bench.checks()]
    assert "tokens/s" in rows["train miniature, AdamW, plain"]
    assert rows["decode miniature"].count("engine") == len(gpu.DECODED_ROWS)
    assert not any("not measured" in figures for figures in rows.values())


def test_what_time_does_not_allow_is_named() -> None:
    bench = gpu.Bench(torch.device("cpu"), gpu.MINIATURE)
    assert all("not measured: -1 s were over" in line for line in gpu.measure(bench, -1))


def test_operations_of_a_training_step_by_hand() -> None:
    """GPT-2 small as PaLM's appendix counts: 6 N, and 12 L H D T halved, for a token sees half of the others."""
    shape = gpu.SIZES[0].shape
    assert gpu.training_flops(shape, 124_000_000, 1024) == 6 * 124_000_000 + 12 * 16 * 768 * 1024 / 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_without_a_device_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu.main()
