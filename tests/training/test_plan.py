"""What a training is planned to take, beside what its passes really do."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from components.config.model_settings import Checkpointing
from components.config.params import InputError, Params, load_params
from components.models import fused
from components.models.decoder import Decoder, DecoderConfig
from components.training import checkpoints
from components.training import plan as planning
from components.training.activations import checkpoint_blocks, watch_saved
from components.training.plan import PUBLISHED, Machine, Rate, StagePlan, plan, row_cost
from components.training.pretrain import pretrain
from loopwright.cli import app
from tests.training.conftest import NewRun

PARAMS = Path(__file__).parents[2] / "params.yaml"
SHAPE = DecoderConfig.from_params(load_params(PARAMS, {"scale": "smoke"}).model.decoder, 300)
LENGTH = 96


def test_operations_are_those_of_the_usual_formula() -> None:
    """6 for each weight of a product and token, and of attention 12 for each layer, dimension and pair of tokens."""
    stages = {stage.stage: stage for stage in plan(load_params(PARAMS, {"scale": "cluster"}))}
    stage, params = stages["pretrain@decoder"], load_params(PARAMS, {"scale": "cluster"})
    model, length = params.model.decoder, params.prepare.decoder.seq_len
    attention = 12 * model.num_layers * model.num_heads * model.head_dim * length
    assert stage.flops == pytest.approx(stage.tokens * (6 * stage.parameters + attention), rel=0.005)
    assert stage.tokens == 50_000 * 512 * length


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_what_a_pass_saves_is_what_it_is_planned_to(
    checkpointing: Checkpointing, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"):
        outline, row = Decoder(SHAPE), torch.zeros(1, LENGTH, dtype=torch.long)
    forward = partial(outline.hidden, row, torch.ones_like(row), row)
    planned = row_cost(outline, LENGTH, LENGTH, forward, checkpointing).saved
    monkeypatch.setattr(fused, "should_fuse", lambda x: False)
    monkeypatch.setattr("components.models.attention.should_fuse", lambda x: False)
    model, ids = Decoder(SHAPE), torch.zeros(1, LENGTH, dtype=torch.long)
    weights = {weight.untyped_storage() for weight in model.parameters()}
    saved: set[torch.UntypedStorage] = set()
    checkpoint_blocks(model, checkpointing, whole=1)
    with watch_saved(lambda tensor: saved.add(tensor.untyped_storage())):
        torch.autograd.backward(model.hidden(ids, torch.ones_like(ids), ids).sum())
    assert planned == pytest.approx(sum(storage.nbytes() for storage in saved - weights), rel=0.02)


def pretraining(settings: dict[str, str]) -> StagePlan:
    """Of the decoder at scale gpu on an H200."""
    params = load_params(
        PARAMS, {"scale": "gpu"} | {f"pretrain.decoder.{name}": value for name, value in settings.items()}
    )
    return planning._stage(*next(planning._trainings(params)), PUBLISHED["h200"], 1)


def test_recomputing_is_planned_as_less_memory_and_more_operations() -> None:
    """A forward pass again is up to a third of the blocks' operations; of attention on a GPU no scores are saved."""
    stages = {how: pretraining({"activation_checkpointing": how}) for how in ("none", "selective", "full")}
    params = load_params(PARAMS, {"scale": "gpu"})
    assert stages["full"].memory < stages["selective"].memory < stages["none"].memory
    head = 6 * params.train_tokenizer.decoder.vocab_size * params.model.decoder.embed_dim * stages["none"].tokens
    assert stages["selective"].flops == stages["none"].flops
    ratio = (stages["full"].flops - head) / (stages["none"].flops - head)
    assert 1.2 < ratio < 4 / 3, "the last product of a block is not needed again"
    rows, length = params.pretrain.decoder.micro_batch_size, params.prepare.decoder.seq_len
    scores = 2 * rows * params.model.decoder.num_layers * params.model.decoder.num_heads * length**2
    assert pretraining({"precision": "fp32"}).memory - stages["none"].memory > 2 * scores


def test_a_rate_between_two_that_were_measured_lies_between_them() -> None:
    machine = Machine("here", 1, (Rate(10**6, 1e9), Rate(10**8, 4e9)), 0.0, True)
    assert [machine.rate(count) for count in (1, 10**6, 10**8, 10**9)] == [1e9, 1e9, 4e9, 4e9]
    assert machine.rate(10**7) == pytest.approx(2e9)


def test_time_is_a_start_and_operations_over_the_rate() -> None:
    stages = plan(load_params(PARAMS), replace(PUBLISHED["h200"], start_seconds=3.0))
    assert all(stage.seconds == pytest.approx(3.0 + stage.flops / (0.4 * 989e12)) for stage in stages)


def test_devices_share_weights_states_and_time() -> None:
    """Of each weight 16 bytes over all devices, beside what is gathered of the model and saved of the rows."""
    params = load_params(PARAMS)
    single, pair, four = (
        {stage.stage: stage for stage in plan(params, PUBLISHED["h200"], devices)} for devices in (1, 2, 4)
    )
    decoder = pair["pretrain@decoder"]
    apart = decoder.memory - four["pretrain@decoder"].memory
    assert apart == pytest.approx(16 * decoder.parameters * (1 / 2 - 1 / 4), abs=1)
    assert decoder.seconds == single["pretrain@decoder"].seconds / 2
    assert all(pair[name].seconds == stage.seconds / 2 for name, stage in single.items() if stage.seconds)


def plan_of(name: str, params: Params) -> StagePlan:
    return next(planning._stage(*training, None, 1) for training in planning._trainings(params) if training[0] == name)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_training_takes_the_disk_that_is_planned(
    optimizer: str, new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of checkpoints the two that are kept and the one that is written; of token rows those of its steps, twice."""
    run, sizes = new_run("pretrain", max_steps=5, optimizer=optimizer), []

    def note(path: Path, remove: Callable[[Path], None] = checkpoints._remove) -> None:
        sizes.append(sum(file.stat().st_size for file in path.parent.iterdir()))
        remove(path)

    monkeypatch.setattr(checkpoints, "_remove", note)
    rows = run.paths.tokens("decoder") / "pretrain"
    info = json.loads((rows / "rows.json").read_text())
    info["vocab_size"] = run.params.train_tokenizer.decoder.vocab_size
    (rows / "rows.json").write_text(json.dumps(info))
    pretrain(run)
    planned = plan_of("pretrain@decoder", run.params)
    headers_and_random_state = 3 * 14_000
    assert planned.disk < max(sizes) < planned.disk + headers_and_random_state
    row = sum(file.stat().st_size for file in rows.glob("train.*.bin")) / info["rows"]["train"]
    assert planned.rows == 2 * row * run.params.pretrain.decoder.global_batch_size * 5


def test_every_phase_of_the_classifier_keeps_checkpoints_with_its_best_weights() -> None:
    values = {"scale": "smoke", "classifier.adapt_steps": 1}
    params = [load_params(PARAMS, values | {"classifier.trials": trials}) for trials in (0, 3)]
    plans = [plan_of("finetune@classifier", each) for each in params]
    assert plans[1].disk / plans[0].disk == (2 * 5 + 1) / (2 * 2 + 1), "adapting, three trials, the long training"
    assert plans[0].disk / 5 > 4 * 2 * plans[0].parameters, "weights and best weights, beside the optimizers' states"


def test_stages_on_a_base_are_left_out() -> None:
    names = [stage.stage for stage in plan(load_params(PARAMS, {"tune.base": "theirs@champion"}))]
    assert "tune" not in names
    assert "pretrain@decoder" in names


def test_a_machine_is_measured_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(planning.MEASURED_WIDTHS, "cpu", (64,))
    monkeypatch.setitem(planning.MEASURED_TOKENS, "cpu", 256)
    monkeypatch.setattr(planning, "MEASURED_SECONDS", 0.0)
    lines: list[str] = []
    machine = planning.measure_machine(load_params(PARAMS).pretrain.decoder, lines.append)
    machine.write(tmp_path / "machine.json")
    assert Machine.read(tmp_path / "machine.json") == machine
    assert machine.rates[0].flops > 0
    assert machine.start_seconds > 0
    assert len(lines) == 2
    (tmp_path / "machine.json").write_text('{"rates": 1}')
    with pytest.raises(InputError, match="bench-machine"):
        Machine.read(tmp_path / "machine.json")


def test_the_command_prints_days_and_cost_and_refuses_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PARAMS.parent)
    shown = CliRunner().invoke(app, ["plan", "--scale", "cluster", "--device", "h200", "--price", "3"])
    assert "pretrain@decoder" in shown.output
    assert "days of training on one h200" in shown.output
    based = ["plan", "--scale", "smoke", "--set", "tune.base=theirs@champion"]
    assert "tune: not above: on the base theirs@champion; its" in CliRunner().invoke(app, based).output
    assert json.loads(CliRunner().invoke(app, [*based, "--json"]).output)["on_base"] == {"tune": "theirs@champion"}
    refused = CliRunner().invoke(app, ["plan", "--device", "h300"])
    assert isinstance(refused.exception, InputError)
    assert "h300" in str(refused.exception)
