"""With a base, settings follow from it and the rows; what a training takes is known before it starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from components.config.loop_settings import AlignConfig
from components.config.model_settings import Checkpointing, Follower, TuneConfig
from components.config.params import InputError, load_params
from components.models.checkpoint import save_decoder
from components.models.decoder import Decoder, DecoderConfig
from components.models.lora import add_lora
from components.runtime.stage import StageRun
from components.token_rows.batches import TokenRows
from components.training import budget
from components.training.budget import Budget, announce
from components.training.defaults import count_parameters, fit_to_base, following
from components.training.loop import train
from components.training.objectives import causal_lm

PARAMS = Path(__file__).parents[2] / "params.yaml"
SMOLLM2, ROWS = 134_515_008, 9_335
NewRun = Callable[..., StageRun]


def tune_config(**written: Any) -> TuneConfig:
    overrides = {"scale": "laptop", "tune.base": "theirs@champion"}
    return load_params(PARAMS, overrides | {f"tune.{name}": value for name, value in written.items()}).tune


def test_a_base_of_135_million_gets_what_was_measured_to_suit_it() -> None:
    assert following(tune_config(), SMOLLM2, ROWS, 256.0) == {
        "optimizer": "adamw",
        "lora_rank": 16,
        "learning_rate": 0.001,
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "max_steps": 800,
        "warmup_steps": 40,
    }


FOLLOWERS = [name for name in get_args(Follower) if name in TuneConfig.model_fields]


@pytest.mark.parametrize("name", FOLLOWERS)
def test_what_a_person_sets_does_not_follow(name: str) -> None:
    value = {"optimizer": "muon", "learning_rate": 0.5}.get(name, 3)
    config = tune_config(**{name: value})
    assert getattr(config, name) == value
    values = following(config, SMOLLM2, ROWS, 256.0)
    assert values.keys() == set(FOLLOWERS) - {name}
    settled = config.model_copy(update=values)
    assert settled.global_batch_size % settled.micro_batch_size == 0


def test_the_rate_falls_with_the_size_and_is_lower_for_all_weights() -> None:
    sizes = [22_700_000, SMOLLM2, 1_000_000_000, 8_000_000_000]
    rates = [following(tune_config(lora_rank=16), size, ROWS, 256.0)["learning_rate"] for size in sizes]
    whole = [following(tune_config(lora_rank=0), size, ROWS, 256.0)["learning_rate"] for size in sizes]
    assert rates == sorted(rates, reverse=True)
    assert whole == [5e-4, 1.9e-4, 6.2e-5, 2e-5]
    assert all(low < high / 3 for low, high in zip(whole, rates, strict=True))


def test_a_classifier_of_a_small_base_trains_all_weights_and_searches_nothing() -> None:
    config = load_params(PARAMS, {"scale": "laptop", "classifier.base": "minilm@champion"}).classifier
    assert following(config, 22_742_861, 9_000, 15.6) == {
        "optimizer": "adamw",
        "trials": 0,
        "token_dropout": 0.1,
        "lora_rank": 0,
        "learning_rate": 0.0005,
        "global_batch_size": 32,
        "micro_batch_size": 16,
        "max_steps": 3000,
        "warmup_steps": 150,
        "validation_steps": 250,
    }


def test_few_rows_are_passed_over_a_few_times_and_not_for_all_the_steps() -> None:
    few = following(tune_config(), SMOLLM2, 100, 256.0)
    assert (few["global_batch_size"], few["max_steps"], few["warmup_steps"]) == (8, 38, 2)
    many = following(tune_config(), SMOLLM2, 1_000_000, 256.0)
    assert many["global_batch_size"] > few["global_batch_size"]


def align_config(**written: Any) -> AlignConfig:
    overrides = {"scale": "laptop"} | {f"align.{name}": value for name, value in written.items()}
    return load_params(PARAMS, overrides).align.model_copy(update={"lora_rank": 16})


def test_feedback_moves_a_trained_adapter_in_smaller_steps_than_tuning_did() -> None:
    assert following(align_config(), SMOLLM2, 2_350, 256.0) == {
        "learning_rate": 0.0005,
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "max_steps": 60,
        "warmup_steps": 3,
    }
    written = following(align_config(learning_rate=0.5, max_steps=7), SMOLLM2, 2_350, 256.0)
    assert written == {"global_batch_size": 8, "micro_batch_size": 4, "warmup_steps": 1}


def test_without_a_base_nothing_follows() -> None:
    for config in load_params(PARAMS, {"scale": "laptop"}).fine_tuned.values():
        assert config.follow_base == []


def test_max_steps_that_a_person_set_is_the_maximum() -> None:
    assert load_params(PARAMS, {"scale": "laptop"}).classifier.min_epochs == 8
    assert load_params(PARAMS, {"scale": "laptop", "classifier.max_steps": 50}).classifier.min_epochs == 0
    assert load_params(PARAMS, {"scale": "laptop", "classifier.base": "theirs@champion"}).classifier.min_epochs == 0


@pytest.fixture
def based(new_run: NewRun) -> StageRun:
    """A run of `tune` whose base is in place."""
    unset = dict.fromkeys(FOLLOWERS)
    run = new_run("tune", base="theirs@champion", precision="fp32", **unset)
    save_decoder(adapted(run, lora=False), run.paths.imported("decoder"), run.paths.tokenizer("decoder"))
    return run


def adapted(run: StageRun, lora: bool = True) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(DecoderConfig.from_params(run.params.model.decoder, 48))
    if lora:
        add_lora(model, rank=4, alpha=8.0)
    return model


def rows_of(run: StageRun) -> TokenRows:
    return TokenRows(run.paths.tokens("decoder") / "tune", "train")


def test_the_values_are_printed_and_used(based: StageRun, capsys: pytest.CaptureFixture[str]) -> None:
    config = fit_to_base(based, based.params.tune, adapted(based), rows_of(based), based.params.tune.base)
    assert capsys.readouterr().out.startswith(
        "tune  theirs@champion, 20 rows: optimizer adamw, lora_rank 0, learning_rate 0.005"
    )
    assert (config.max_steps, config.global_batch_size, config.micro_batch_size) == (2, 32, 16)


def test_the_announcement_changes_nothing(
    based: StageRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not a random number, not a gradient: the weights are those without it."""
    ended = []
    config = based.params.tune.model_copy(update={"max_steps": 3, "checkpoint_seconds": 1e9, "precision": "bf16"})
    for folder in ("with", "without"):
        model, run = adapted(based), replace(based, state=based.state / folder)
        train(run, config, model, rows_of(run), causal_lm)
        ended.append((model.state_dict(), torch.get_rng_state()))
        monkeypatch.setattr("components.training.loop.announce", lambda *_: None)
    (told, random), (untold, random_untold) = ended
    assert all(torch.equal(weight, untold[name]) for name, weight in told.items())
    assert torch.equal(random, random_untold)
    assert "tune  takes 0.5 GiB of " in capsys.readouterr().out


def test_activations_are_those_that_the_backward_pass_reads(based: StageRun) -> None:
    """Eight rows' are half of sixteen rows'."""
    rows = rows_of(based)
    batches = [rows.batch(np.arange(count) % len(rows)) for count in (8, 16)]
    eight, sixteen = (budget._passes(adapted(based), batch, causal_lm)[0] for batch in batches)
    assert eight == pytest.approx(sixteen / 2, rel=0.1)


def test_what_cannot_fit_is_refused_with_what_would(based: StageRun, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = based.params.tune.model_copy(update={"global_batch_size": 8, "micro_batch_size": 8})
    model = adapted(based, lora=False)
    memory = budget.LIBRARIES + budget.COPY_BYTES * count_parameters(model) + 600_000
    monkeypatch.setattr(budget, "device_memory", lambda device: memory)
    pattern = r"params\.yaml: tune: training takes 0\.5 GiB .*, checkpoint .*; set tune\.micro_batch_size to 4$"
    with pytest.raises(InputError, match=pattern):
        announce(based, settings, model, rows_of(based), causal_lm)
    announce(based, settings.model_copy(update={"micro_batch_size": 4}), adapted(based), rows_of(based), causal_lm)
    totals: list[float] = []
    monkeypatch.setattr(budget, "device_memory", lambda device: 10**12)
    for copies in (budget.COPY_BYTES, 0):
        monkeypatch.setattr(budget, "COPY_BYTES", copies)
        monkeypatch.setattr(based.tracker, "metrics", lambda metrics, step: totals.append(metrics["expected.gib"]))
        announce(based, settings, model, rows_of(based), causal_lm)
    assert totals[0] - totals[1] == pytest.approx(24 * count_parameters(model) / budget.GIB), "copies of a checkpoint"


LORA = "set tune.lora_rank to 16"


@pytest.mark.parametrize(
    ("gib", "remedy"),
    [
        (19, "set tune.micro_batch_size to 4"),
        (9, "set tune.lora_rank to 16"),
        (6, "set tune.lora_rank to 16, tune.micro_batch_size to 2"),
        (4, "set tune.lora_rank to 16, tune.precision to bf16, tune.micro_batch_size to 4"),
        (
            2.75,
            f"{LORA}, tune.precision to bf16, tune.activation_checkpointing to selective, tune.micro_batch_size to 1",
        ),
        (2.7, f"{LORA}, tune.precision to bf16, tune.activation_checkpointing to full, tune.micro_batch_size to 2"),
        (2, "name a smaller base, or train on a larger machine"),
    ],
)
def test_the_remedy_changes_as_little_as_fits(gib: float, remedy: str) -> None:
    """Of a billion parameters in fp32: 4 GiB of weights, 12 of gradients and optimizer, a half of activations a row."""
    with torch.device("meta"):
        model = Decoder(DecoderConfig(32_000, 2048, 16, 32, 8, 64, 8192, 2048, tie_embeddings=True))
    settings = tune_config(lora_rank=0, precision="fp32", global_batch_size=8, micro_batch_size=8)
    billion = budget.GIB // 4 * 4
    asked = Budget(4 * billion, billion, 4, billion // 2, 8, 0)
    assert asked.total > 20 * budget.GIB
    by_row: dict[Checkpointing, int] = {"selective": billion // 5, "full": billion // 20}
    assert budget._remedy("tune", settings, model, asked, int(gib * budget.GIB), by_row) == remedy
