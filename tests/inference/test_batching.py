"""Continuous batching writes what the whole forward pass says, and changes no bit of any row: whoever comes, goes,
waits or shares a beginning.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from components.config.params import InputError
from components.inference.batching import ContinuousBatch, Row, generate
from components.inference.packed_weights import RoundedLinear, pack, packs_fp16, round_weights, rows_are_independent
from components.inference.prefix_cache import MIN_SHARED
from components.inference.sampling import greedy, sampled
from components.models.checkpoint import save_decoder
from components.models.decoder import Decoder, DecoderConfig

CONFIGS = {
    "grouped": DecoderConfig(61, 32, 2, 4, 2, 8, 48, 96, qk_norm=True),
    "llama": DecoderConfig(300, 64, 2, 2, 2, 32, 96, 96, tie_embeddings=True),
}


def random_decoder(config: DecoderConfig) -> Decoder:
    """Weights so large that what follows depends on the prompt."""
    torch.manual_seed(0)
    made = Decoder(config).eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(torch.randn_like(weight) * 0.4 + (weight.dim() == 1))
    return made


@pytest.fixture(scope="module")
def grouped() -> Decoder:
    return random_decoder(CONFIGS["grouped"])


@pytest.fixture(scope="module", params=[*CONFIGS, "packed", "rounded", "bf16", "fp16"])
def model(request: pytest.FixtureRequest) -> Decoder:
    made = random_decoder(CONFIGS.get(request.param, CONFIGS["grouped"]))
    if request.param == "packed":
        pack(made)
    elif request.param == "bf16":
        pack(made, torch.bfloat16)
    elif request.param == "fp16":
        if not packs_fp16():
            pytest.skip("FBGEMM is not here")
        pack(made, torch.float16)
    elif request.param == "rounded":
        round_weights(made)
    elif not rows_are_independent(made):
        pack(made)  # as the engine does on such a processor
    return made


class Watched(ContinuousBatch):
    """Slots that remember the logits behind each token."""

    def __init__(self, model: Decoder, count: int) -> None:
        super().__init__(model, count)
        self.logits: dict[Row, list[Tensor]] = {}
        self.positions_read = 0

    def _pick(self, rows: Sequence[Row], hidden: Tensor) -> None:
        for row, logits in zip(rows, self.model.head(hidden), strict=False):
            self.logits.setdefault(row, []).append(logits)
        super()._pick(rows, hidden)

    def _pass(self, rows: Any, tokens: Any, counts: list[int], *rest: Any) -> Tensor:
        self.positions_read += sum(counts)
        return super()._pass(rows, tokens, counts, *rest)


def run(slots: ContinuousBatch, rows: list[Row], arrivals: random.Random | None = None) -> None:
    """Drive rows to their ends; with `arrivals`, they come in bursts and some leave early."""
    waiting = list(rows)
    while waiting or slots.prefilling or slots.decoding:
        come = len(waiting) if arrivals is None else arrivals.randint(0, 3)
        if waiting and not slots.prefilling and (size := slots.group(waiting[:come])):
            slots.admit(waiting[:size])
            del waiting[:size]
        for go_on in (slots.prefill, slots.decode):
            if slots.prefilling if go_on == slots.prefill else slots.decoding:
                go_on()
            for row in list(slots.decoding):
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


@torch.inference_mode()
def uncached(model: Decoder, row: Row) -> list[int]:
    """What follows the row's prompt by the whole forward pass for each token."""
    same = Row(row.prompt, row.limit, row.temperature, row.top_p, row.seed)
    while not same.finished:
        logits = model(torch.tensor([same.ids]))[:, -1].float()
        if same.temperature > 0:
            token = sampled(logits, same.temperature, same.top_p, torch.tensor([[same.number()]]))
        else:
            token = greedy(logits)
        same.take(int(token))
    return same.generated


def continued(model: Decoder, prompts: Sequence[Sequence[int]], limit: int, **options: Any) -> list[list[int]]:
    rows = [Row(prompt, limit, **options) for prompt in prompts]
    generate(model, rows)
    return [row.generated for row in rows]


def test_rows_follow_the_whole_forward_pass(model: Decoder) -> None:
    rounded = isinstance(model.blocks[0].attention.out, RoundedLinear)
    if rounded or getattr(model.blocks[0].attention.out, "dtype", None) == torch.bfloat16:
        pytest.skip("rounding turns the last bit of what is rounded into more")
    rows = [Row(**asked(model, number)) for number in range(12)]
    run(ContinuousBatch(model, 5), rows)
    for row in rows:
        assert row.generated == uncached(model, row)


def test_greedy_rows_are_those_of_transformers(grouped: Decoder, tmp_path: Path) -> None:
    save_decoder(grouped, tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    prompts = [asked(grouped, number)["prompt"] for number in range(6)]
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)
        expected.append(out[0, len(prompt) :].tolist())
    assert continued(grouped, prompts, 20) == expected


def test_rows_end_with_their_stop_token_and_the_others_go_on(grouped: Decoder) -> None:
    prompts = [asked(grouped, number)["prompt"] for number in range(7)]
    free = continued(grouped, prompts, 20)
    stops = tuple(token for token, _ in Counter(token for row in free for token in row[2:9]).most_common(3))
    stopped = continued(grouped, prompts, 20, stop_ids=stops)
    for row, unstopped in zip(stopped, free, strict=True):
        end = next((place for place, token in enumerate(unstopped) if token in stops), 19)
        assert row == unstopped[: end + 1]
    assert len({len(row) for row in stopped}) > 2


def test_a_seed_fixes_what_is_sampled(grouped: Decoder) -> None:
    prompts = [[1, 2, 3], [7]]
    first = continued(grouped, prompts, 15, temperature=1.5, seed=11)
    assert continued(grouped, prompts, 15, temperature=1.5, seed=11) == first
    assert continued(grouped, prompts, 15, temperature=1.5, seed=12) != first
    assert continued(grouped, prompts, 15, temperature=1.5) != first
    assert continued(grouped, prompts, 15, temperature=1.5, seed=-4)


def test_sampling_follows_the_probabilities(grouped: Decoder) -> None:
    with torch.no_grad():
        expected = (grouped(torch.tensor([[9, 4]]))[0, -1] / 2.0).softmax(-1)
    rows = [Row([9, 4], 1, temperature=2.0, seed=seed) for seed in range(4000)]
    generate(grouped, rows)
    counts = torch.bincount(torch.tensor([row.ids[-1] for row in rows]), minlength=61) / 4000
    assert (counts - expected).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_top_p_leaves_out_the_unlikely(grouped: Decoder) -> None:
    with torch.no_grad():
        ordered, ids = (grouped(torch.tensor([[9, 4]]))[0, -1] / 3.0).softmax(-1).sort(descending=True)
    allowed = set(ids[: int((ordered.cumsum(0) < 0.5).sum()) + 1].tolist())
    rows = [Row([9, 4], 1, temperature=3.0, top_p=0.5, seed=seed) for seed in range(500)]
    generate(grouped, rows)
    assert {row.ids[-1] for row in rows} == allowed
    assert len(allowed) > 2


def test_a_tiny_top_p_is_greedy(grouped: Decoder) -> None:
    prompts = [[1, 2, 3], [7]]
    assert continued(grouped, prompts, 8, temperature=1.0, top_p=1e-6) == continued(grouped, prompts, 8)


def test_no_rows_are_continued_at_once() -> None:
    assert continued(random_decoder(CONFIGS["grouped"]), [], 8) == []


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_no_bit_of_a_row_depends_on_the_load(model: Decoder, threads: int) -> None:
    busy = Watched(model, 7)
    rows = [Row(**asked(model, number)) for number in range(40)]
    run(busy, rows, random.Random(threads))
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
    slots.prefill()
    assert slots.group([long, short]) == 1
    slots.admit([long])
    while slots.prefilling:
        slots.prefill()
        slots.decode()
    assert len(short.generated) == 6
    assert len(long.generated) == 2
    long.limit = 2
    if not isinstance(model.blocks[0].attention.out, RoundedLinear):
        assert long.generated == uncached(model, long)


@pytest.mark.parametrize("lengths", [(40, 3, 17), (3, 40, 17), (17, 16, 1)])
def test_prompts_of_other_lengths_are_read_in_the_same_parts(
    model: Decoder, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a long context a pass reads little, and a group takes several passes."""
    monkeypatch.setattr("components.inference.batching.SHORT", 16 * model.config.max_seq_len)
    rows, alone = ([Row([place % 50 for place in range(length)], 4) for length in lengths] for _ in range(2))
    slots = Watched(model, 3)
    assert slots.group(rows) == len(rows)
    run(slots, rows)
    for row, same in zip(rows, alone, strict=True):
        single = Watched(model, 3)
        run(single, [same])
        assert all(map(torch.equal, slots.logits[row], single.logits[same]))


@pytest.mark.parametrize("leaving", [0, 1, 2])
def test_a_row_that_leaves_while_prompts_are_read_changes_no_other(
    model: Decoder, leaving: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.inference.batching.SHORT", 16 * model.config.max_seq_len)
    rows, alone = ([Row([(place + start) % 50 for place in range(40)], 4) for start in (0, 5, 9)] for _ in range(2))
    slots = Watched(model, 3)
    slots.admit(rows)
    slots.prefill()
    slots.drop(rows[leaving])
    while slots.prefilling or slots.decoding:
        slots.advance()
    for number, (row, same) in enumerate(zip(rows, alone, strict=True)):
        if number != leaving:
            single = Watched(model, 3)
            run(single, [same])
            assert all(map(torch.equal, slots.logits[row], single.logits[same]))


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="resident memory is read from /proc")
def test_slots_take_memory_as_they_are_used(grouped: Decoder) -> None:
    """Eight times the context of a base of today is more than the machine has."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    long = Decoder(replace(grouped.config, max_seq_len=65_536)).eval()
    before = resident()
    slots = ContinuousBatch(long, 32)
    assert slots._cache.whole.nbytes > 1 << 29
    run(slots, [Row([number + 1] * 40, 4) for number in range(20)])
    assert resident() - before < slots._cache.whole.nbytes / 8


def test_what_is_kept_is_bounded(model: Decoder) -> None:
    slots = ContinuousBatch(model, 2)
    run(slots, [Row([number % 60 + 1] * 40, 4, seed=number) for number in range(20)])
    assert 0 < slots._prefix_cache.tokens <= 2 * model.config.max_seq_len
    slots.clear()
    assert slots._prefix_cache.tokens == 0


def test_generation_ends_where_the_context_does(model: Decoder) -> None:
    row = Row([1] * 90, 50)
    run(ContinuousBatch(model, 1), [row])
    assert len(row.ids) == model.config.max_seq_len + 1
    assert len(continued(model, [[5] * 96], 50)[0]) == 1
    for length in (0, 97):
        with pytest.raises(InputError, match=f"prompt: {length} tokens; the model takes 1 to 96"):
            generate(model, [Row([1] * length, 1)])


def test_short_beginnings_are_read_again(model: Decoder) -> None:
    slots = Watched(model, 2)
    for last in (2, 3):
        run(slots, [Row([1] * (MIN_SHARED - 1) + [last], 1)])
    assert slots.positions_read == 2 * MIN_SHARED


def test_products_here_are_independent_of_their_rows(model: Decoder) -> None:
    assert rows_are_independent(model)
