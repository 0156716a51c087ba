"""`finetune@classifier` on two gloo ranks: adaptation, search, training, early stopping and calibration."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from components.config.paths import Paths
from components.runtime.params_file import write_params
from tests.training.test_distributed import KILLS, SOURCE, killed_at_random, start
from tests.training.test_finetune import TINY, write_project

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]
STAGE = "finetune@classifier"
STEPS = 4 + 3 * 8 + 40
"""Of adaptation, trials and training."""
SETTINGS = {"classifier.dropout": 0.0, "classifier.log_steps": 1, "classifier.patience": 99}
"""Ranks draw other dropout than one process."""


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_project(tmp_path_factory.mktemp("pretrained"))


@pytest.fixture
def launched(pretrained: Path, tmp_path: Path) -> Paths:
    """A project whose trainings run on two processes."""
    root = tmp_path / "project"
    shutil.copytree(pretrained, root)
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(SOURCE / name, root / name)
    shutil.copytree(SOURCE / "components", root / "components", ignore=shutil.ignore_patterns("__pycache__"))
    paths = Paths(root)
    paths.imported("encoder").mkdir(parents=True)
    write_params(paths.params, TINY | SETTINGS | {"run.launcher": "torchrun", "run.processes": 2}, echo=lambda _: None)
    return paths


def finetune(paths: Paths) -> str:
    """Run the stage; returns what it printed."""
    with start(STAGE, paths.root) as stage:
        output, errors = stage.communicate()
    assert stage.returncode == 0, output + errors
    return output


def results(paths: Paths) -> tuple[dict[str, Any], list[float]]:
    """Metrics, with the digest of the weights, and losses."""
    metrics = json.loads((paths.metrics / f"{STAGE}.json").read_text())
    lines = (paths.metrics / f"{STAGE}_loss.csv").read_text().splitlines()[1:]
    return metrics, [float(line.split(",")[1]) for line in lines]


def test_two_ranks_classify_as_one_process(launched: Paths) -> None:
    """With the same trials, the same best step and the same temperature; rank 0 alone reports."""
    output = finetune(launched)
    assert output.count(f" {STEPS}/{STEPS}  part final  loss ") == 1
    sharded, losses = results(launched)
    shutil.rmtree(launched.root / "var/checkpoints")
    write_params(launched.params, {"run.launcher": "local", "run.processes": 1}, echo=lambda _: None)
    finetune(launched)
    single, single_losses = results(launched)
    assert losses == pytest.approx(single_losses, abs=1e-5)
    for metrics in (sharded, single):
        metrics.pop("weights_sha256")
    assert sharded == pytest.approx(single, abs=1e-4)


@pytest.mark.long
def test_kills_in_any_part_change_no_bit(launched: Paths) -> None:
    finetune(launched)
    unbroken = results(launched)
    shutil.rmtree(launched.root / "var/checkpoints")
    output = killed_at_random(STAGE, launched.root, STEPS, seed=0)
    assert output.count("resumed at step") >= KILLS
    assert results(launched) == unbroken
