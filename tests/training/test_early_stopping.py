"""Early stopping delivers the best weights, ends a run that no longer improves, and resumes exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from components.models.decoder import Decoder, DecoderConfig
from components.runtime.stage import StageRun
from components.token_rows.batches import TokenRows
from components.training.early_stopping import EarlyStopping
from components.training.loop import train
from components.training.objectives import causal_lm

NewRun = Callable[..., StageRun]
SCORES = [0.1, 0.5, 0.4, 0.5, 0.3, 0.9]
"""At steps 2, 4, 6, ...: none of the two scores after the best of the first three is better."""


class Scored:
    """A model whose scores come from a list, with its weights at each evaluation."""

    def __init__(self, run: StageRun, evaluations: int = 0, patience: int = 3) -> None:
        torch.manual_seed(0)
        self.model = Decoder(DecoderConfig.from_params(run.params.model.decoder, 48))
        self.weights: list[torch.Tensor] = []
        self.scores: Iterator[float] = iter(SCORES[evaluations:])
        self.log: list[tuple[int, float]] = []
        self.stopping = EarlyStopping(self.measure, 2, patience, lambda step, score: self.log.append((step, score)))

    def measure(self, model: Decoder) -> float:
        assert not model.training
        self.weights.append(model.norm.weight.detach().clone())
        return next(self.scores)


def trained(run: StageRun, scored: Scored) -> Scored:
    train(
        run,
        run.params.pretrain.decoder,
        scored.model,
        TokenRows(run.paths.tokens("decoder") / "pretrain", "train"),
        causal_lm,
        scored.stopping,
    )
    return scored


def test_the_first_of_the_best_weights_is_delivered_and_patience_ends_the_run(new_run: NewRun) -> None:
    scored = trained(new_run(precision="fp32"), Scored(new_run()))
    assert scored.log == [(2, 0.1), (4, 0.5), (6, 0.4), (8, 0.5), (10, 0.3)]
    assert torch.equal(scored.model.norm.weight, scored.weights[1])
    assert not torch.equal(scored.weights[1], scored.weights[4])
    assert (scored.stopping.best_step, scored.stopping.best_score, scored.stopping.stopped) == (4, 0.5, True)


def test_the_last_step_is_scored(new_run: NewRun) -> None:
    scored = trained(new_run(max_steps=5), Scored(new_run(), patience=9))
    assert [step for step, _ in scored.log] == [2, 4, 5]


@pytest.mark.parametrize("killed_after", [1, 3])
def test_a_resumed_run_delivers_the_same_weights(killed_after: int, new_run: NewRun) -> None:
    run = new_run(precision="fp32")
    uninterrupted = trained(run, Scored(run))
    for path in run.state.iterdir():
        path.unlink()

    killed = Scored(run)
    evaluate = killed.stopping.evaluate

    class Killed(Exception):
        pass

    def evaluate_until(step: int, model: Decoder, weights: dict[str, torch.Tensor]) -> None:
        if len(killed.log) == killed_after:
            raise Killed
        evaluate(step, model, weights)

    killed.stopping.evaluate = evaluate_until  # type: ignore[assignment, method-assign]
    with pytest.raises(Killed):
        trained(run, killed)
    torch.manual_seed(77)
    resumed = trained(run, Scored(run, evaluations=killed_after))
    assert killed.log + resumed.log == uninterrupted.log
    assert resumed.stopping.scores == uninterrupted.stopping.scores
    for actual, expected in zip(resumed.model.parameters(), uninterrupted.model.parameters(), strict=True):
        assert torch.equal(actual, expected)


def test_a_stopped_run_stays_stopped_when_resumed(new_run: NewRun) -> None:
    run = new_run(precision="fp32")
    first = trained(run, Scored(run))
    again = trained(run, Scored(run, evaluations=len(SCORES)))
    assert again.log == []
    assert torch.equal(again.model.norm.weight, first.model.norm.weight)
