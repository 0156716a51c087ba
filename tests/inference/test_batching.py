"""Continuous batching changes no bit of any row: whoever comes, goes, waits or shares a beginning."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from components.config.params import InputError
from components.inference.batching import MIN_SHARED, Row, Slots, rows_are_independent
from components.inference.generate import Sampling, generate
from components.inference.packed_weights import RoundedLinear, pack, round_weights
from components.models.decoder import Decoder, DecoderConfig

CONFIGS = {
    "grouped": DecoderConfig(61, 32, 2, 4, 2, 8, 48, 96, qk_norm=True),
    "llama": DecoderConfig(300, 64, 2, 2, 2, 32, 96, 96, tie_embeddings=True),
}


@pytest.fixture(scope="module", params=[*CONFIGS, "packed", "rounded"])
def model(request: pytest.FixtureRequest) -> Decoder:
    torch.manual_seed(0)
    made = Decoder(CONFIGS.get(request.param, CONFIGS["grouped"])).eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(torch.randn_like(weight) * 0.4 + (weight.dim() == 1))
    if request.param == "packed":
        pack(made)
    elif request.param == "rounded":
        round_weights(made)
    return made


class Watched(Slots):
    """Slots that remember the logits behind each token."""

    def __init__(self, model: Decoder, count: int) -> None:
        super().__init__(model, count)
        self.logits: dict[Row, list[Tensor]] = {}
        self.positions_read = 0

    def _pick(self, rows: Sequence[Row], hidden: Tensor) -> None:
        for row, logits in zip(rows, self.model.head(hidden), strict=False):
            self.logits.setdefault(row, []).append(logits)
        super()._pick(rows, hidden)

    def _pass(self, first: int, tokens: Any, starts: Any, counts: list[int], *rest: Any) -> Tensor:
        self.positions_read += sum(counts)
        return super()._pass(first, tokens, starts, counts, *rest)


def run(slots: Slots, rows: list[Row], arrivals: random.Random | None = None) -> None:
    """Drive rows to their ends; with `arrivals`, they come in bursts and some leave early."""
    waiting = list(rows)
    while waiting or slots.reading or slots.writing:
        come = len(waiting) if arrivals is None else arrivals.randint(0, 3)
        if waiting and not slots.reading and (size := slots.group(waiting[:come])):
            slots.admit(waiting[:size])
            del waiting[:size]
        for go_on in (slots.read, slots.step):
            if slots.reading if go_on == slots.read else slots.writing:
                go_on()
            for row in list(slots.writing):
                if row.finished or (arrivals is not None and arrivals.random() < 0.01):
                    slots.drop(row)


def asked(model: Decoder, number: int) -> dict[str, Any]:
    """Options of a random row, some with a beginning that others have too."""
    dice = random.Random(number)
    vocabulary = model.config.vocab_size
    beginning = [(7 * place) % vocabulary for place in range(dice.choice([0, 0, 20, 33]))]
    prompt = beginning + [dice.randrange(vocabulary) for _ in range(dice.randint(1, 40))]
    sampling = {"temperature": 1.5, "top_p": dice.choice([1.0, 0.9])} if dice.random() < 0.5 else {}
    return {"prompt": prompt, "limit": dice.randint(1, 30), "seed": number, **sampling}


def test_rows_follow_generate(model: Decoder) -> None:
    if isinstance(model.blocks[0].attention.out, RoundedLinear):
        pytest.skip("rounding turns the last bit of what is rounded into more")
    rows = [Row(**asked(model, number)) for number in range(12)]
    run(Slots(model, 5), rows)
    for row in rows:
        sampling = Sampling(row.limit, row.temperature, row.top_p, row.seed)
        assert row.generated == generate(model, [list(row.prompt)], sampling)[0]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_bit_of_a_row_depends_on_the_load(model: Decoder, seed: int) -> None:
    busy = Watched(model, 7)
    rows = [Row(**asked(model, number)) for number in range(40)]
    run(busy, rows, random.Random(seed))
    shared = 0
    for number, row in enumerate(rows):
        alone = Watched(model, 1)
        same = Row(**asked(model, number))
        run(alone, [same])
        written = len(row.generated)
        assert same.generated[:written] == row.generated
        assert all(map(torch.equal, busy.logits[row], alone.logits[same]))
        shared += alone.positions_read
    assert busy.positions_read < shared, "some beginnings were taken over"


def test_a_turn_that_goes_on_reads_only_what_is_new(model: Decoder) -> None:
    slots = Watched(model, 2)
    first = Row([5 + place % 9 for place in range(30)], 10)
    run(slots, [first])
    before = slots.positions_read
    more = [1, 2, 3, 4, 5]
    second = Row([*first.ids, *more], 3)
    run(slots, [second])
    assert slots.positions_read - before == 10 + len(more), (
        "what was read before is taken over, what was written is not"
    )
    fresh = Watched(model, 2)
    same = Row(second.prompt, 3)
    run(fresh, [same])
    assert all(map(torch.equal, slots.logits[second], fresh.logits[same]))


def test_long_prompts_are_read_in_parts_while_others_write(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.inference.batching.PREFILL_TOKENS", 16)
    slots = Watched(model, 3)
    short, long = Row([1, 2, 3], 20), Row([place % 50 for place in range(70)], 5)
    slots.admit([short])
    slots.read()
    assert slots.group([long, short]) == 1
    slots.admit([long])
    while slots.reading:
        slots.read()
        slots.step()
    assert len(short.generated) == 6
    assert len(long.generated) == 2
    assert long.generated == generate(model, [list(long.prompt)], Sampling(2))[0]


def test_what_is_kept_is_bounded(model: Decoder) -> None:
    slots = Slots(model, 2)
    run(slots, [Row([number % 60 + 1] * 40, 4, seed=number) for number in range(20)])
    assert 0 < slots._kept.tokens <= 2 * model.config.max_seq_len
    slots.clear()
    assert slots._kept.tokens == 0


def test_generation_ends_where_the_context_does(model: Decoder) -> None:
    row = Row([1] * 90, 50)
    run(Slots(model, 1), [row])
    assert len(row.ids) == model.config.max_seq_len + 1
    with pytest.raises(InputError, match="prompt: 97 tokens; the model takes 1 to 96"):
        Slots(model, 1).admit([Row([1] * 97, 1)])


def test_short_beginnings_are_read_again(model: Decoder) -> None:
    slots = Watched(model, 2)
    for last in (2, 3):
        run(slots, [Row([1] * (MIN_SHARED - 1) + [last], 1)])
    assert slots.positions_read == 2 * MIN_SHARED


def test_products_here_are_independent_of_their_rows(model: Decoder) -> None:
    assert rows_are_independent(model)
