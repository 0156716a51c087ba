"""Rows that are held to rules obey them, whatever else is in the batch; the others never notice."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from components.inference.batching import Row, generate
from components.inference.sampling import Allowed, Constraint, mask_logits
from components.models.decoder import Decoder, DecoderConfig

CONFIG = DecoderConfig(
    vocab_size=40,
    embed_dim=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    hidden_dim=48,
    max_seq_len=64,
    qk_norm=True,
)
PROMPTS = [[3, 4, 5], [7], [9, 8, 7, 6, 5, 4]]


@pytest.fixture(scope="module")
def model() -> Decoder:
    torch.manual_seed(0)
    return Decoder(CONFIG).eval()


class Counting:
    """Even tokens alone, and then nothing after `length` of them; it keeps what it was told."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.taken: list[int] = []
        self.left: list[int] = []

    @property
    def finished(self) -> bool:
        return len(self.taken) == self.length

    fallback_tokens: tuple[list[int], list[int]] | None = None

    def allowed(self, left: int) -> Allowed:
        self.left.append(left)
        return np.arange(CONFIG.vocab_size - 4) % 2 == 0

    def advance(self, token_id: int) -> None:
        self.taken.append(token_id)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_constrained_rows_keep_their_rules_and_the_others_do_not_notice(model: Decoder, temperature: float) -> None:
    def continued(*constraints: Constraint | None) -> list[list[int]]:
        given = zip(PROMPTS, constraints, strict=True)
        rows = [Row(prompt, 12, temperature, seed=1, constraint=rules) for prompt, rules in given]
        generate(model, rows)
        return [row.generated for row in rows]

    first, last = Counting(5), Counting(50)
    mixed = continued(first, None, last)
    assert mixed[1] == continued(None, None, None)[1]
    assert mixed[0] == first.taken
    assert mixed[2] == last.taken
    assert (len(mixed[0]), len(mixed[2])) == (5, 12)
    assert all(token % 2 == 0 and token < 36 for token in mixed[0] + mixed[2])
    assert first.left == [12, 11, 10, 9, 8]


def test_without_rules_the_logits_are_left_alone() -> None:
    logits = torch.randn(2, 40)
    none: list[Constraint | None] = [None, None]
    assert mask_logits(logits, none, [1, 1]) is logits
    masked = mask_logits(logits, [None, Counting(3)], [1, 1])
    assert torch.equal(masked[0], logits[0])
    assert torch.isinf(masked[1]).sum() == 22


def test_what_the_model_would_give_to_the_forbidden_goes_to_what_is_named_instead() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 40)
    rules = [Counting(3), Counting(3)]
    rules[1].fallback_tokens = [7, 9, 11], [8, 10]
    before, after = logits.softmax(-1), mask_logits(logits, rules, [1, 1]).softmax(-1)
    # Row 0: the forbidden are shared out among all that is allowed.
    allowed = before[0, :36:2] / before[0, :36:2].sum()
    assert torch.allclose(after[0, :36:2], allowed)
    # Row 1: they count for 8 and 10 first.
    wished = before[1, 7:12].sum()
    rest = before[1, :36:2].sum() - before[1, [8, 10]].sum()
    assert torch.isclose(after[1, [8, 10]].sum(), wished / (wished + rest))
    assert torch.isclose(after[1, 8] / after[1, 10], before[1, 8] / before[1, 10])
    assert torch.equal(after[1] > 0, torch.arange(40).lt(36) & torch.arange(40).remainder(2).eq(0))
