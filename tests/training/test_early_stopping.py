"""The best weights are delivered, more steps end when they stop helping, and a resumed run knows what it saw."""

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
"""Of the looks at steps 2, 4, 6, ...: two looks behind the best of the first three, nothing was better."""


class Seen:
    """Scores from a list, and the weights as they were at each look."""

    def __init__(self, run: StageRun, looks: int = 0, patience: int = 3) -> None:
        torch.manual_seed(0)
        self.model = Decoder(DecoderConfig.from_params(run.params.model.decoder, 48))
        self.weights: list[torch.Tensor] = []
        self.scores: Iterator[float] = iter(SCORES[looks:])
        self.told: list[tuple[int, float]] = []
        self.watch = EarlyStopping(self.measure, 2, patience, lambda step, score: self.told.append((step, score)))

    def measure(self) -> float:
        assert not self.model.training
        self.weights.append(self.model.norm.weight.detach().clone())
        return next(self.scores)


def trained(run: StageRun, seen: Seen) -> Seen:
    train(
        run,
        run.params.pretrain.decoder,
        seen.model,
        TokenRows(run.paths.tokens("decoder") / "pretrain", "train"),
        causal_lm,
        seen.watch,
    )
    return seen


def test_the_first_of_the_best_weights_is_delivered_and_patience_ends_the_run(new_run: NewRun) -> None:
    seen = trained(new_run(precision="fp32"), Seen(new_run()))
    assert seen.told == [(2, 0.1), (4, 0.5), (6, 0.4), (8, 0.5), (10, 0.3)]
    assert torch.equal(seen.model.norm.weight, seen.weights[1])
    assert not torch.equal(seen.weights[1], seen.weights[4])
    assert (seen.watch.best_step, seen.watch.best_score, seen.watch.over) == (4, 0.5, True)


def test_the_last_step_is_looked_at(new_run: NewRun) -> None:
    seen = trained(new_run(max_steps=5), Seen(new_run(), patience=9))
    assert [step for step, _ in seen.told] == [2, 4, 5]


@pytest.mark.parametrize("stopped_behind", [1, 3])
def test_a_resumed_run_delivers_the_same_weights(stopped_behind: int, new_run: NewRun) -> None:
    run = new_run(precision="fp32")
    unbroken = trained(run, Seen(run))
    for path in run.state.iterdir():
        path.unlink()

    broken = Seen(run)
    look = broken.watch.look

    class Killed(Exception):
        pass

    def look_until(step: int, weights: dict[str, torch.Tensor]) -> None:
        if len(broken.told) == stopped_behind:
            raise Killed
        look(step, weights)

    broken.watch.look = look_until  # type: ignore[assignment, method-assign]
    with pytest.raises(Killed):
        trained(run, broken)
    torch.manual_seed(77)
    resumed = trained(run, Seen(run, looks=stopped_behind))
    assert broken.told + resumed.told == unbroken.told
    assert resumed.watch.scores == unbroken.watch.scores
    for ours, theirs in zip(resumed.model.parameters(), unbroken.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_run_that_was_over_is_over_when_resumed(new_run: NewRun) -> None:
    run = new_run(precision="fp32")
    first = trained(run, Seen(run))
    again = trained(run, Seen(run, looks=len(SCORES)))
    assert again.told == []
    assert torch.equal(again.model.norm.weight, first.model.norm.weight)
