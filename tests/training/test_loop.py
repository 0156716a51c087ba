"""The loop learns, accumulates, resumes bit for bit and refuses empty masks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager

from components.config.params import InputError
from components.models import devices
from components.models.decoder import Decoder, DecoderConfig
from components.models.devices import compute_dtype
from components.runtime.stage import StageRun
from components.token_rows.batches import Batch, TokenRows
from components.training.checkpoints import Checkpoints
from components.training.loop import Training, measure_loss, refuse_bad_masks, train
from components.training.objectives import causal_lm

NewRun = Callable[..., StageRun]


def new_model(run: StageRun) -> Decoder:
    torch.manual_seed(run.params.seed)
    return Decoder(DecoderConfig.from_params(run.params.model.decoder, 48))


def trained(run: StageRun) -> tuple[Decoder, Any]:
    model = new_model(run)
    return model, train(run, run.params.pretrain.decoder, model, rows(run), causal_lm)


def rows(run: StageRun, split: str = "train") -> TokenRows:
    return TokenRows(run.paths.tokens("decoder") / "pretrain", split)


def batches(run: StageRun, *parts: list[int]) -> list[Batch]:
    return [rows(run).batch(np.array(part)) for part in parts]


def assert_same(a: Decoder, b: Decoder) -> None:
    for (name, ours), (_, theirs) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_batch_is_learned_by_heart(optimizer: str, precision: str, new_run: NewRun) -> None:
    run = new_run(optimizer=optimizer, max_steps=120, learning_rate=0.02, precision=precision)
    model = new_model(run).to(compute_dtype(precision, torch.device("cpu")))
    training = Training(model, causal_lm, run.params.pretrain.decoder, seed=0)
    batch = batches(run, [0, 1])
    training.train_step(batch)
    first = training.read_loss()
    for _ in range(119):
        training.train_step(batch)
    assert first > 3.5
    with torch.no_grad():
        last = causal_lm(model, batch[0])
    assert float(last.total) / last.targets < 0.1


def test_micro_batches_add_up_to_the_large_batch(new_run: NewRun) -> None:
    """Also where one has few targets and another many: the mean is over targets, not over batches."""
    whole, parts = new_run(), new_run()
    a = Training(new_model(whole), causal_lm, whole.params.pretrain.decoder, 0)
    b = Training(new_model(parts), causal_lm, parts.params.pretrain.decoder, 0)
    large, small = batches(whole, [0, 1, 2, 3]), batches(whole, [0], [1, 2], [3])
    for batch in (large[0]["labels"][0], small[0]["labels"][0]):
        batch[:20] = -100
    for _ in range(3):
        a.train_step(large)
        b.train_step(small)
    assert a.read_loss() == pytest.approx(b.read_loss(), rel=1e-5)
    for ours, theirs in zip(a.model.parameters(), b.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4)


def test_a_step_without_targets_changes_nothing(new_run: NewRun) -> None:
    run = new_run()
    training = Training(new_model(run), causal_lm, run.params.pretrain.decoder, 0)
    (batch,) = batches(run, [0, 1])
    batch["labels"].fill_(-100)
    training.train_step([batch])
    assert training.step == 1
    assert_same(training.model, new_model(run))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_that_stopped_goes_on_bit_for_bit(optimizer: str, precision: str, new_run: NewRun) -> None:
    changes = {"optimizer": optimizer, "precision": precision, "log_steps": 5, "max_steps": 12, "global_batch_size": 6}
    run = new_run(**changes)
    dtype = compute_dtype(precision, torch.device("cpu"))

    def steps(training: Training, count: int) -> None:
        for _ in range(count):
            first = training.step % 18
            training.train_step(batches(run, [first, first + 1]))
            if training.step % 5 == 0:
                training.read_loss()

    unbroken = Training(new_model(run).to(dtype), causal_lm, run.params.pretrain.decoder, 0)
    steps(unbroken, 12)
    broken = Training(new_model(run).to(dtype), causal_lm, run.params.pretrain.decoder, 0)
    steps(broken, 7)
    checkpoints = Checkpoints(run.state)
    checkpoints.save(broken.state())
    checkpoints.wait()
    torch.manual_seed(99)
    saved = Checkpoints(run.state).load()
    assert saved is not None
    resumed = Training(Decoder(new_model(run).config).to(dtype), causal_lm, run.params.pretrain.decoder, 0)
    assert resumed.restore(saved)
    steps(resumed, 5)
    assert_same(resumed.model, unbroken.model)
    assert resumed.measured == unbroken.measured
    for name, value in unbroken.state().tensors.items():
        if not name.startswith("random"):
            assert torch.equal(value, resumed.state().tensors[name]), name


def test_a_checkpoint_of_other_settings_is_not_resumed(new_run: NewRun) -> None:
    run = new_run()
    training = Training(new_model(run), causal_lm, run.params.pretrain.decoder, 0)
    checkpoints = Checkpoints(run.state)
    checkpoints.save(training.state())
    checkpoints.wait()
    saved = Checkpoints(run.state).load()
    assert saved is not None
    for other in (new_run(learning_rate=0.1), new_run(max_steps=99)):
        assert not Training(new_model(other), causal_lm, other.params.pretrain.decoder, 0).restore(saved)
    assert not Training(new_model(run), causal_lm, run.params.pretrain.decoder, seed=1).restore(saved)
    same = new_run(checkpoint_seconds=9)
    assert Training(new_model(same), causal_lm, same.params.pretrain.decoder, 0).restore(saved)


def test_the_first_checkpoint_takes_no_new_memory(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread has taken that of the copies beside the first steps."""
    copied: list[tuple[threading.Thread, dict[str, int]]] = []
    stage = DefaultStager.stage

    def record(stager: DefaultStager, tensors: dict[str, Tensor]) -> Any:
        copies: Any = stage(stager, tensors)
        places = {name: copy.data_ptr() for name, copy in copies.items() if not name.startswith("random")}
        copied.append((threading.current_thread(), places))
        return copies

    monkeypatch.setattr(DefaultStager, "stage", record)
    trained(new_run(max_steps=1))
    (beside, taken), (training, saved) = copied
    assert beside is not training
    assert taken == saved


def test_a_run_that_starts_over_can_be_resumed(new_run: NewRun) -> None:
    """Its first checkpoints are of earlier steps than those of the other settings."""
    trained(new_run(max_steps=4))
    trained(new_run(max_steps=2))
    saved = Checkpoints(new_run().state).load()
    assert saved is not None
    assert saved.step == 2


def test_equal_seeds_give_equal_weights(new_run: NewRun) -> None:
    first, _ = trained(new_run())
    for path in new_run().state.iterdir():
        path.unlink()
    again, _ = trained(new_run())
    assert_same(first, again)
    for path in new_run().state.iterdir():
        path.unlink()
    other, _ = trained(new_run(seed=1))
    assert not torch.equal(first.norm.weight, other.norm.weight)


def test_the_loop_says_how_far_it_is(new_run: NewRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = new_run(log_steps=10)
    _, measured = trained(run)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["10/24", "20/24", "24/24"]
    assert all(word in lines[0] for word in ("loss ", "tokens_per_second ", "eta 0m"))
    logged: Any = run.tracker
    assert [step for step, _ in logged.logged] == [10, 20, 24]
    assert set(logged.logged[0][1]) == {"loss", "tokens_per_second", "learning_rate"}
    assert measured.tokens == 24 * 4 * 30
    assert measured.targets == 24 * 4 * (8 + 8 + 2)
    assert measured.losses[-1][1] < measured.losses[0][1]


def test_a_diverged_run_is_an_input_error(new_run: NewRun) -> None:
    run = new_run(learning_rate=1e30, muon_learning_rate=1e30, optimizer="adamw")
    with pytest.raises(InputError, match=r"pretrain\.decoder\.learning_rate: the loss is (nan|inf) at step \d+; lower"):
        trained(run)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks_are_those_of_the_model(new_run: NewRun) -> None:
    """Compiling is in place, so that what is trained is what is saved."""
    names = [name for name, _ in new_model(new_run()).named_parameters()]
    model = new_model(new_run())
    for block in model.blocks:
        block.compile(backend="eager")
    assert [name for name, _ in model.named_parameters()] == names
    training = Training(model, causal_lm, new_run().params.pretrain.decoder, 0)
    plain = Training(new_model(new_run()), causal_lm, new_run().params.pretrain.decoder, 0)
    for each in (training, plain):
        each.train_step(batches(new_run(), [0, 1]))
    assert training.read_loss() == pytest.approx(plain.read_loss(), rel=1e-5)


@pytest.mark.parametrize("tuning", [True, False])
def test_an_empty_mask_is_refused(tuning: bool, tmp_path: Path, write_rows: Callable[..., Path]) -> None:
    folder = write_rows(tmp_path / "tokens", mask=0)
    with pytest.raises(InputError, match="tokens: mask: 0 of 600 tokens are trained on"):
        refuse_bad_masks(TokenRows(folder, "train"), tuning)


def test_a_full_mask_is_refused_in_tuning_alone(tmp_path: Path, write_rows: Callable[..., Path]) -> None:
    full = TokenRows(write_rows(tmp_path / "tokens", mask=1), "train")
    refuse_bad_masks(full, tuning=False)
    with pytest.raises(InputError, match="mask: 600 of 600 tokens are trained on; tuning trains on the model's own"):
        refuse_bad_masks(full, tuning=True)


def test_the_test_loss_is_the_mean_over_targets(new_run: NewRun) -> None:
    run = new_run()
    model, test = new_model(run), rows(run, "test")
    with torch.no_grad():
        whole = causal_lm(model, test.batch(np.arange(4)))
    expected = float(whole.total) / whole.targets
    assert measure_loss(model, test, causal_lm, batch_size=3, max_rows=99) == pytest.approx(expected, rel=1e-5)
    assert measure_loss(model, test, causal_lm, batch_size=3, max_rows=2) != pytest.approx(expected, rel=1e-5)


def test_without_test_rows_there_is_no_test_loss(
    tmp_path: Path, write_rows: Callable[..., Path], new_run: NewRun
) -> None:
    empty = TokenRows(write_rows(tmp_path / "tokens", test=0), "test")
    assert measure_loss(new_model(new_run()), empty, causal_lm, 2, 9) is None


def test_precision_is_what_is_asked_for(new_run: NewRun) -> None:
    cpu = torch.device("cpu")
    assert compute_dtype("fp32", cpu) == torch.float32
    assert compute_dtype("bf16", cpu) == torch.bfloat16
    assert compute_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert compute_dtype("auto", cpu) == torch.float32
    model, _ = trained(new_run(precision="bf16"))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert not torch.equal(model.embed.weight, model.embed.weight.bfloat16().float())


@pytest.mark.parametrize(("cost", "picked"), [(0.7, torch.bfloat16), (0.9, torch.float32), (2.0, torch.float32)])
def test_auto_is_bf16_where_a_models_own_products_are_clearly_faster_in_it(
    cost: float, picked: torch.dtype, new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that counts the products: one in bf16 takes `cost`, one in fp32 takes 1."""
    clock, shapes = [0.0], set[tuple[int, ...]]()
    model = new_model(new_run())

    def linear(x: Tensor, weight: Tensor) -> None:
        clock[0] += cost if weight.dtype == torch.bfloat16 else 1.0
        shapes.add(tuple(weight.shape))

    monkeypatch.setattr(devices, "MEASURED_PRODUCT", 0)
    monkeypatch.setattr(devices.F, "linear", linear)
    monkeypatch.setattr(devices.time, "thread_time", lambda: clock[0])
    random = torch.get_rng_state()
    assert compute_dtype("auto", torch.device("cpu"), model) == picked
    assert shapes == set(devices.product_shapes(model)) == {(32, 16), (16, 16), (48, 16), (16, 24)}
    assert torch.equal(torch.get_rng_state(), random)


def test_small_products_are_computed_in_fp32_whatever_a_measurement_would_give(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two trainings of one tiny model beside a busy process once differed, by a measurement of microseconds."""
    monkeypatch.setattr(devices, "bf16_gain", lambda shapes: 9.0)
    cpu, model = torch.device("cpu"), new_model(new_run())
    assert compute_dtype("auto", cpu, model) == torch.float32
    monkeypatch.setattr(devices, "product_shapes", lambda model: [(128, 96), (192, 128)])
    assert compute_dtype("auto", cpu, model) == torch.bfloat16


def test_a_training_goes_on_in_the_precision_that_it_began_in(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second measurement may come out otherwise."""
    run, gains = new_run(precision="auto", max_steps=4), iter([2.0, 0.5])
    monkeypatch.setattr(devices, "MEASURED_PRODUCT", 0)
    monkeypatch.setattr(devices, "bf16_gain", lambda shapes: next(gains))
    for _ in range(2):
        trained(run)
        saved = Checkpoints(run.state).load()
        assert saved is not None
        assert (saved.step, saved.values["dtype"]) == (4, "bfloat16")
