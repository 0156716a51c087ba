"""Rows of several adapters in one batch: each row gets, bit for bit, what it gets alone and what its model computes."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from components.inference.adapter_bank import AdapterBank
from components.inference.batching import ContinuousBatch, Row
from components.inference.packed_weights import pack
from components.models.decoder import Decoder
from components.models.lora import LowRankLinear, add_lora
from tests.inference.test_batching import CONFIGS, asked, random_decoder, run, uncached


def adapted(base: Decoder, seed: int, rank: int) -> Decoder:
    model = copy.deepcopy(base)
    torch.manual_seed(seed)
    add_lora(model, rank, 2.0 * rank)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LowRankLinear):
                module.lora_b.normal_(std=0.2)
    return model


@pytest.fixture(scope="module", params=["plain", "packed"])
def served(request: pytest.FixtureRequest) -> tuple[list[Decoder], Decoder, AdapterBank]:
    """Models by their adapter's number, and the base with all of them."""
    base = random_decoder(CONFIGS["grouped"])
    models = [base, *(adapted(base, seed, rank) for seed, rank in ((1, 4), (2, 8), (3, 4)))]
    whole = copy.deepcopy(base)
    if request.param == "packed":
        pack(whole)
    bank = AdapterBank(whole)
    assert [bank.add(model) for model in models[1:]] == [1, 2, 3]
    return models, whole, bank


def rows_of(models: list[Decoder], count: int) -> list[Row]:
    return [Row(**asked(models[0], number), adapter=number % len(models)) for number in range(count)]


def test_each_row_follows_its_own_model(served: tuple[list[Decoder], Decoder, AdapterBank]) -> None:
    models, base, _ = served
    rows = rows_of(models, 16)
    run(ContinuousBatch(base, 5), rows, random.Random(0))
    complete = [row for row in rows if row.finished]
    assert {row.adapter for row in complete} == {0, 1, 2, 3}
    for row in complete:
        assert row.generated == uncached(models[row.adapter], row)


def test_a_row_is_bit_identical_alone_and_beside_other_adapters(
    served: tuple[list[Decoder], Decoder, AdapterBank],
) -> None:
    models, base, _ = served
    together, alone = rows_of(models, 12), rows_of(models, 12)
    run(ContinuousBatch(base, 6), together)
    for row in alone:
        run(ContinuousBatch(base, 1), [row])
    assert [row.ids for row in together] == [row.ids for row in alone]


def test_a_prefix_is_reused_by_rows_of_the_same_adapter_alone(
    served: tuple[list[Decoder], Decoder, AdapterBank],
) -> None:
    models, base, _ = served
    slots = ContinuousBatch(base, 2)
    prompt = [(5 * place) % models[0].config.vocab_size for place in range(40)]
    for adapter, reused in ((1, 0), (2, 0), (1, 39), (0, 0), (2, 39)):
        row = Row(prompt, 3, adapter=adapter)
        slots.admit([row])
        assert row.cached == reused
        run(slots, [])
        assert row.generated == uncached(models[adapter], row)


def test_a_removed_adapter_leaves_the_others_and_its_number_is_not_given_again(
    served: tuple[list[Decoder], Decoder, AdapterBank],
) -> None:
    models, base, bank = served
    number = bank.add(models[1])
    bank.remove(number)
    assert bank.add(models[3]) == number + 1
    bank.remove(number + 1)
    row = Row(**asked(models[0], 1), adapter=2)
    run(ContinuousBatch(base, 2), [row])
    assert row.generated == uncached(models[2], row)
