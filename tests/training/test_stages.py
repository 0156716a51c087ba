"""The stages pretrain and tune: files out, and the same weights however often they are killed."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from components.config.params import InputError
from components.config.paths import Paths
from components.models.checkpoint import load_decoder, save_decoder
from components.runtime.stage import StageRun
from components.training.pretrain import pretrain
from components.training.tune import tune

NewRun = Callable[..., StageRun]


def metrics(paths: Paths, stage: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((paths.metrics / f"{stage}.json").read_text())
    return read


def test_the_stages_leave_a_base_and_an_agent(project: Paths, new_run: NewRun) -> None:
    pretrain(new_run("pretrain"))
    tune(new_run("tune"))
    shapes = {
        name: load_decoder(folder).config
        for name, folder in (("base", project.base("decoder")), ("agent", project.agent))
    }
    assert shapes["base"] == shapes["agent"]
    assert json.loads((project.agent / "agent.json").read_text()) == {
        "tools": ["look_up"],
        "max_steps": 6,
        "forms": True,
        "source": {"sha256": "0"},
    }
    assert (project.agent / "tools/files/facts").read_bytes() == b"facts"
    for folder in (project.base("decoder"), project.agent):
        assert (folder / "tokenizer.json").read_bytes() == (
            project.tokenizer("decoder") / "tokenizer.json"
        ).read_bytes()
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 1
    for stage in ("pretrain@decoder", "tune"):
        read = metrics(project, stage)
        with (project.metrics / f"{stage}_loss.csv").open() as file:
            curve = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
        assert [step for step, _ in curve] == list(range(1, 25))
        assert read["loss"] == pytest.approx(sum(loss for _, loss in curve[-5:]) / 5)
        assert (read["steps"], read["tokens"]) == (24, 24 * 4 * 30)
        assert 0 < read["test_loss"] < 4
        kept = sorted(path.name.split("-")[1] for path in new_run(stage).state.iterdir())
        assert kept == ["00000023", "00000024"], "until DVC has stored the model"
    assert metrics(project, "tune")["loss"] < metrics(project, "pretrain@decoder")["loss"]


def test_transformers_loads_what_pretrain_leaves(project: Paths, new_run: NewRun) -> None:
    pretrain(new_run())
    theirs = AutoModelForCausalLM.from_pretrained(project.base("decoder"))
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(load_decoder(project.base("decoder"))(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_metrics_hold_nothing_that_changes_between_equal_runs(project: Paths, new_run: NewRun) -> None:
    pretrain(new_run())
    first = [(project.metrics / name).read_bytes() for name in ("pretrain@decoder.json", "pretrain@decoder_loss.csv")]
    pretrain(new_run())
    assert [
        (project.metrics / name).read_bytes() for name in ("pretrain@decoder.json", "pretrain@decoder_loss.csv")
    ] == first


def test_an_agent_of_other_conversations_has_no_tools(project: Paths, new_run: NewRun) -> None:
    pretrain(new_run())
    tune(new_run("tune", dataset=["mine", "yours"]))
    assert json.loads((project.agent / "agent.json").read_text())["tools"] == []
    assert not (project.agent / "tools").exists()


@pytest.mark.parametrize(("stage", "mask"), [("pretrain", 0), ("tune", 0), ("tune", 1)])
def test_a_stage_refuses_a_mask_that_teaches_nothing(
    stage: str, mask: int, project: Paths, new_run: NewRun, write_rows: Callable[..., Path]
) -> None:
    write_rows(project.tokens("decoder") / stage, mask=mask)
    with pytest.raises(InputError, match=f"tokens/decoder/{stage}: mask: {600 * mask} of 600 tokens are trained on"):
        {"pretrain": pretrain, "tune": tune}[stage](new_run(stage))


def test_tune_refuses_a_base_of_another_vocabulary(project: Paths, new_run: NewRun) -> None:
    pretrain(new_run())
    info = json.loads((project.tokens("decoder") / "tune/rows.json").read_text())
    (project.tokens("decoder") / "tune/rows.json").write_text(json.dumps(info | {"vocab_size": 50}))
    with pytest.raises(
        InputError, match=r"base/decoder: vocab_size 48 differs from the 50 of .*tokens/decoder/tune; run"
    ):
        tune(new_run("tune"))


def test_tune_refuses_rows_longer_than_the_base_takes(project: Paths, new_run: NewRun) -> None:
    pretrain(new_run())
    model = load_decoder(project.base("decoder"))
    model.config = replace(model.config, max_seq_len=16)
    save_decoder(model, project.base("decoder"), project.tokenizer("decoder"))
    with pytest.raises(InputError, match=r"prepare\.decoder\.seq_len: 32 exceeds the 16 tokens of the model"):
        tune(new_run("tune"))


def test_a_corrupt_base_is_an_input_error(project: Paths, new_run: NewRun) -> None:
    pretrain(new_run())
    weights = project.base("decoder") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"base/decoder/model\.safetensors: corrupt"):
        tune(new_run("tune"))


SERVER = """
import json, os, sys
import components.training.tune  # what takes seconds, once for all processes
from components.runtime.stage import run_stage
from pathlib import Path

for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if not child:
        pipe = os.open(order["output"], os.O_WRONLY)
        os.dup2(pipe, 1)
        os.dup2(pipe, 2)
        os.environ["LOOPWRIGHT_HOME"] = order["home"]
        code = 70
        try:
            code = run_stage(order["stage"], Path.cwd())
        except SystemExit as left:
            code = left.code
        finally:
            os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Forks a process per line of standard input, as DVC would start them; says its id, then its exit code."""


class Processes:
    """Stages of one project as processes of their own, that can be killed."""

    def __init__(self, paths: Paths, settings: dict[str, Any]) -> None:
        self.paths = paths
        source = Path(__file__).parents[2] / "components"
        shutil.copytree(source, paths.root / "components", ignore=shutil.ignore_patterns("__pycache__"))
        params: dict[str, Any] = {"scale": settings["scale"]}
        for dotted, value in settings.items():
            *sections, key = dotted.split(".")
            place = params
            for section in sections:
                place = place.setdefault(section, {})
            place[key] = value
        paths.params.write_text(yaml.safe_dump(params))
        # This process says that it carries the journals, so that no stage starts MLflow.
        own = {"LOOPWRIGHT_COURIER": str(os.getpid()), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", SERVER]
        pipe = subprocess.PIPE
        self.server = subprocess.Popen(
            command, cwd=paths.root, env=os.environ | own, text=True, stdin=pipe, stdout=pipe
        )

    def run(
        self, stage: str, home: str, kill_after: int = 0, by: signal.Signals = signal.SIGKILL
    ) -> tuple[int, list[str]]:
        """Run a stage, killed once it has reported so many steps; its exit code, and what it printed."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        output = self.paths.root / "output"
        output.unlink(missing_ok=True)
        os.mkfifo(output)
        self.server.stdin.write(json.dumps({"stage": stage, "home": home, "output": str(output)}) + "\n")
        self.server.stdin.flush()
        process, lines = int(self.server.stdout.readline()), list[str]()
        with output.open("rb", buffering=0) as file:
            if sys.platform == "linux":  # a page holds 60 lines: the stage cannot run further ahead of its killer
                fcntl.fcntl(file, fcntl.F_SETPIPE_SZ, 4096)
            for line in file:
                lines.append(line.decode().rstrip())
                if "/" in lines[-1] and sum("/" in said for said in lines) == kill_after:
                    os.kill(process, by)
        return int(self.server.stdout.readline()), lines

    def finish(self, stage: str, home: str) -> tuple[str, list[str]]:
        """Run to the end; the digest of the weights, and what was printed."""
        code, lines = self.run(stage, home)
        assert code == 0, lines
        return metrics(self.paths, stage)["weights_sha256"], lines


@pytest.fixture
def processes(project: Paths, tiny_settings: dict[str, Any]) -> Iterator[Processes]:
    made = Processes(project, tiny_settings | {"pretrain.decoder.max_steps": 80, "tune.max_steps": 80})
    with made.server:
        yield made
        assert made.server.stdin is not None
        made.server.stdin.close()


def test_killed_runs_end_at_the_weights_of_an_unbroken_one(processes: Processes) -> None:
    """SIGKILL at random steps, also of the run that went on; then SIGTERM, which saves and says how to go on."""
    for stage in ("pretrain@decoder", "tune"):
        expected, _ = processes.finish(stage, "unbroken")
        steps = [random.randint(2, 9) for _ in range(2)]
        for step in steps:
            code, _ = processes.run(stage, "killed", kill_after=step)
            assert code == -signal.SIGKILL, steps
        digest, lines = processes.finish(stage, "killed")
        assert any(line.startswith(f"{stage}  resumed at step ") for line in lines), (steps, lines)
        assert digest == expected, steps


def test_a_stopped_run_saves_and_says_how_to_go_on(processes: Processes) -> None:
    code, lines = processes.run("pretrain@decoder", "stopped", kill_after=3, by=signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    (said,) = (line for line in lines if "stopped at step" in line)
    step = int(said.split("stopped at step ")[1].split(";")[0])
    digest, lines = processes.finish("pretrain@decoder", "stopped")
    assert f"pretrain@decoder  resumed at step {step}" in lines
    assert digest == processes.finish("pretrain@decoder", "unbroken")[0]
