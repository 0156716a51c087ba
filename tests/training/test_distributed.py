"""Several gloo ranks against one process: the same curves, the same weights after a kill, other numbers of ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml

from components.config.paths import Paths
from components.runtime.params_file import write_params
from tests.training import distributed_cases
from tests.training.distributed_cases import STEPS

SOURCE = Path(__file__).parents[2]
KINDS = ("decoder", "encoder", "encoder_decoder", "align", "classifier")
CASES = [f"{kind}-{optimizer}" for kind in KINDS for optimizer in ("adamw", "muon")]
CASES += ["lora_decoder-adamw", "lora_classifier-adamw"]
KILLED = {"encoder-muon": 23, "classifier-adamw": 33}
"""Before which step; the classifier's best weights are those of step 21, of the last checkpoint."""
STOPPED = ("decoder-muon", "classifier-muon")
BF16 = ["bf16_decoder-adamw", "bf16_decoder-muon", "bf16_lora_decoder-adamw", "bf16_lora_classifier-adamw"]
ITEMS = [f"{ranks}:{name}" for name in CASES for ranks in (1, 2)]
for killed, before in KILLED.items():
    ITEMS += [f"2:{killed}+9@{before}", f"flip:{killed}+", f"2:{killed}+"]
for stopped in STOPPED:
    ITEMS += [f"2:{stopped}+15@17", f"1:{stopped}+15@34", f"3:{stopped}+"]
"""The latter ones go on from the checkpoints of those before."""
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `ITEMS`."""
    return train_all(ITEMS, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def trained_in_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the trainings of `BF16`."""
    return train_all([f"{ranks}:{name}" for name in BF16 for ranks in (1, 2)], tmp_path_factory.mktemp("bf16"))


def train_all(items: list[str], folder: Path) -> Path:
    command = [sys.executable, distributed_cases.__file__, str(folder), *items]
    ended = subprocess.run(
        command, cwd=SOURCE, env=os.environ | {"PYTHONPATH": str(SOURCE)}, capture_output=True, text=True
    )
    (folder / "stderr").write_text(ended.stderr)
    (folder / "stdout").write_text(ended.stdout)
    assert ended.returncode == 0, ended.stderr
    return folder


def saved(folder: Path, name: str, ranks: int) -> Any:
    codes = json.loads((folder / "exit_codes.json").read_text())
    assert codes[f"{ranks}:{name}"] == [0] * ranks, (folder / "stderr").read_text()
    return torch.load(folder / f"{name}-{ranks}.pt")


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_learn_as_one_process(name: str, trained: Path) -> None:
    """Also where rows of one rank have no targets, and its gradients are none."""
    single, sharded = saved(trained, name, 1), saved(trained, name, 2)
    assert [step for step, _ in sharded["losses"]] == list(range(1, STEPS + 1))
    assert sharded["losses"][-1][1] < sharded["losses"][0][1]
    assert [loss for _, loss in sharded["losses"]] == pytest.approx([loss for _, loss in single["losses"]], abs=1e-5)
    assert sharded["tokens"] == single["tokens"]
    scores = [np.array(result.get("scores", [])) for result in (sharded, single)]
    np.testing.assert_allclose(*scores, atol=1e-5)
    assert sharded["weights"].keys() == single["weights"].keys()
    for weight, value in single["weights"].items():
        torch.testing.assert_close(sharded["weights"][weight], value, rtol=1e-3, atol=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("name", BF16)
def test_two_ranks_learn_as_one_process_from_bf16_weights(name: str, trained_in_bf16: Path) -> None:
    """All weights, or low-rank pairs beside frozen bf16 ones."""
    single, sharded = (saved(trained_in_bf16, name, ranks) for ranks in (1, 2))
    assert sharded["losses"][-1][1] < sharded["losses"][0][1]
    # Gradients are summed in fp32 in another order, which differs by 1e-7 and so flips the rounding of a few weights to
    # bf16, each by 2^-8 of itself: the losses, 1 in the end, part by no more than bf16's resolution there, 2^-7. So do
    # those in bf16 from those in fp32 (0.003 both); low-rank pairs have learnt too little to flip any.
    assert [loss for _, loss in sharded["losses"]] == pytest.approx([loss for _, loss in single["losses"]], abs=2**-7)
    assert sharded["tokens"] == single["tokens"]
    assert {part: weight.dtype for part, weight in sharded["weights"].items()} == {
        part: weight.dtype for part, weight in single["weights"].items()
    }


@pytest.mark.parametrize("name", KILLED)
def test_a_killed_rank_changes_no_bit(name: str, trained: Path) -> None:
    """Nor does a shard of the last checkpoint that is altered afterwards: the previous checkpoint is used."""
    codes = json.loads((trained / "exit_codes.json").read_text())[f"2:{name}+9@{KILLED[name]}"]
    assert codes[1] == -signal.SIGKILL
    assert codes[0] != 0
    output = (trained / "stdout").read_text()
    altered, _, rest = output.partition(f"altered {name}+/step-")[2].partition("\n")
    assert f"step-{altered}: torn checkpoint (its digest differs); skipped\n" in rest
    assert f"resumed at step {int(altered[:8]) - 1}\n" in rest
    resumed, unbroken = saved(trained, f"{name}+", 2), saved(trained, name, 2)
    assert resumed["losses"] == unbroken["losses"]
    assert resumed.get("scores") == unbroken.get("scores")
    for part, weight in unbroken["weights"].items():
        assert torch.equal(resumed["weights"][part], weight), part


@pytest.mark.parametrize("name", STOPPED)
def test_a_run_goes_on_on_another_number_of_ranks(name: str, trained: Path) -> None:
    """Two ranks, stopped by a signal that one of them got; one process, stopped too; three ranks."""
    codes = json.loads((trained / "exit_codes.json").read_text())
    assert codes[f"2:{name}+15@17"] == [128 + signal.SIGTERM] * 2
    assert codes[f"1:{name}+15@34"] == [128 + signal.SIGTERM]
    kept = sorted(path.name for path in (trained / f"{name}+").iterdir())
    assert kept == ["step-00000049-shards", "step-00000050-shards"]
    resumed, unbroken = saved(trained, f"{name}+", 3), saved(trained, name, 2)
    assert resumed["losses"][:18] == unbroken["losses"][:18]
    assert [loss for _, loss in resumed["losses"]] == pytest.approx([loss for _, loss in unbroken["losses"]], abs=1e-4)
    assert resumed["losses"][18:] != unbroken["losses"][18:], "it was resumed by others"
    for part, weight in unbroken["weights"].items():
        torch.testing.assert_close(resumed["weights"][part], weight, rtol=1e-2, atol=1e-2)


@pytest.fixture
def launched(project: Paths, tiny_settings: dict[str, Any]) -> Paths:
    """A project whose trainings run on two processes."""
    shutil.copytree(SOURCE / "components", project.root / "components", ignore=shutil.ignore_patterns("__pycache__"))
    settings = {"run.launcher": "torchrun", "run.processes": 2, "pretrain.decoder.max_steps": 400}
    write_params(project.params, tiny_settings | settings, echo=lambda _: None)
    return project


def start(stage: str, root: Path, *before: str, **environment: str) -> subprocess.Popen[str]:
    """Start a stage, by the command `before` where there is one."""
    own = {"LOOPWRIGHT_COURIER": str(os.getpid()), "PYTHONPATH": str(SOURCE), "PYTHONUNBUFFERED": "1"}
    command = [*before, sys.executable, "-m", "components.runtime.stage", stage]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=root, env=os.environ | own | environment, **pipes)


def ranks_of(root: Path) -> list[psutil.Process]:
    """The running ranks of a project, in their order."""
    ranks: dict[int, psutil.Process] = {}
    for process in psutil.process_iter(["cmdline", "cwd", "environ"]):
        environment = process.info["environ"] or {}
        if process.info["cwd"] == str(root) and "RANK" in environment and "-m" in process.info["cmdline"][1:3]:
            ranks[int(environment["RANK"])] = process
    return [ranks[number] for number in sorted(ranks)]


def test_a_stage_starts_its_ranks_and_passes_on_signals(launched: Paths) -> None:
    """Rank 0 alone reports and writes; SIGTERM saves a checkpoint, from which the ranks go on."""
    with start("pretrain@decoder", launched.root) as stage:
        assert stage.stdout is not None
        assert stage.stderr is not None
        for line in stage.stdout:
            if " 5/400 " in line:
                stage.terminate()
                break
        rest, errors = stage.stdout.read(), stage.stderr.read()
    assert stage.returncode == 128 + signal.SIGTERM, errors
    assert rest.count("stopped at step") == 1
    assert "Traceback" not in errors
    step = int(rest.partition("stopped at step ")[2].partition(";")[0])
    with start("pretrain@decoder", launched.root) as stage:
        output, errors = stage.communicate()
    assert stage.returncode == 0, errors
    assert output.count(f"resumed at step {step}") == 1
    assert output.count(" 400/400 ") == 1
    metrics = json.loads((launched.metrics / "pretrain@decoder.json").read_text())
    assert (metrics["steps"], metrics["tokens"]) == (400, 400 * 4 * 30)
    report = json.loads((launched.root / "var/stages/pretrain@decoder.json").read_text())
    assert report["exit_code"] == 0


def test_ranks_start_again_when_one_was_killed(launched: Paths) -> None:
    """And when one alone gets SIGTERM, behind a checkpoint of all: its machine goes, nobody stopped the run."""
    with start("pretrain@decoder", launched.root) as stage:
        assert stage.stdout is not None
        for line in stage.stdout:
            if " 5/400 " in line:
                ranks_of(launched.root)[1].terminate()
            if "stopped at step" in line:
                stopped = line.partition(" at ")[2].partition(";")[0]
            if "resumed at step" in line:
                assert line.endswith(f"resumed at {stopped}\n")
                ranks_of(launched.root)[1].kill()
                break
        output, errors = stage.communicate()
    assert stage.returncode == 0, errors
    restarts = [line for line in errors.splitlines() if line.endswith("2 start again from the last checkpoint")]
    assert [line.partition("2 ended with ")[2].partition(";")[0] for line in restarts] == ["signal 15", "signal 9"]
    assert output.count("resumed at step") == 1
    assert output.count(" 400/400 ") == 1


KILLS = 3


def killed_at_random(stage: str, root: Path, steps: int, seed: int) -> str:
    """Run a stage and kill one of its two ranks at each of some steps, both drawn from `seed`; returns what it printed.

    A kill comes while the ranks do any part of the steps behind the one that is printed.
    """
    random = np.random.default_rng(seed)
    kills = iter(sorted(int(step) for step in random.choice(np.arange(2, steps - 2), KILLS, replace=False)))
    output, kill, is_running = "", next(kills), True
    with start(stage, root) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        for line in running.stdout:
            output += line
            is_running = is_running or "resumed at step" in line  # lines of before the kill may still come
            step = int(line.split()[1].partition("/")[0]) if f"/{steps}  " in line else 0
            if is_running and step >= kill:
                time.sleep(random.random() * 0.1)
                ranks_of(root)[int(random.integers(2))].kill()
                kill, is_running = next(kills, steps + 1), False
        errors = running.stderr.read()
    assert running.returncode == 0, errors
    assert errors.count("ended with signal 9; 2 start again from the last checkpoint") == KILLS, errors
    assert kill > steps, "every kill came"
    return output


@pytest.mark.long
@pytest.mark.parametrize("seed", [0])
def test_kills_of_any_rank_at_any_step_change_no_bit(seed: int, launched: Paths) -> None:
    with start("pretrain@decoder", launched.root) as stage:
        _, errors = stage.communicate()
    assert stage.returncode == 0, errors
    metrics = launched.metrics / "pretrain@decoder.json"
    unbroken = json.loads(metrics.read_text())
    shutil.rmtree(launched.root / "var/checkpoints")
    output = killed_at_random("pretrain@decoder", launched.root, 400, seed)
    assert output.count("resumed at step") == KILLS
    assert json.loads(metrics.read_text()) == unbroken


def test_what_ranks_cannot_do_is_refused_in_one_line(launched: Paths) -> None:
    settings = yaml.safe_load(launched.params.read_text())
    settings["pretrain"]["decoder"] |= {"global_batch_size": 1, "micro_batch_size": 1}
    launched.params.write_text(yaml.safe_dump(settings))
    with start("pretrain@decoder", launched.root) as stage:
        _, errors = stage.communicate()
    assert stage.returncode == 1
    refused = (
        "pretrain.decoder.global_batch_size: 1 rows leave some of 2 processes without any; set it to a multiple of 2"
    )
    assert errors.splitlines() == [f"params.yaml: {refused}"]
    with start("collect", launched.root, RANK="0", WORLD_SIZE="2") as stage:
        _, errors = stage.communicate()
    assert stage.returncode == 1
    assert errors.splitlines()[-1] == "collect: runs as one process, not 2; start it without torchrun"
