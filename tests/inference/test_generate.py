"""Decoding with a cache says what the whole forward pass says, whatever else is in the batch."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
import torch

from components.config.params import InputError
from components.inference.generate import Sampling, generate, stream
from components.models.decoder import Decoder, DecoderConfig

CONFIG = DecoderConfig(
    vocab_size=61,
    embed_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    hidden_dim=48,
    max_seq_len=64,
    qk_norm=True,
)


@pytest.fixture(scope="module")
def model() -> Decoder:
    torch.manual_seed(0)
    made = Decoder(CONFIG).eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(torch.randn_like(weight) * 0.5 + (weight.dim() == 1))
    return made


def prompts(count: int = 7, shortest: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    lengths = torch.randint(shortest, 30, (count,), generator=generator).tolist()
    return [torch.randint(0, 61, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def uncached(model: Decoder, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_cached_decoding_equals_the_whole_forward_pass(model: Decoder) -> None:
    expected = [uncached(model, prompt, 12) for prompt in prompts()]
    assert [generate(model, [prompt], Sampling(12))[0] for prompt in prompts()] == expected


def test_a_row_does_not_depend_on_its_batch(model: Decoder) -> None:
    alone = [generate(model, [prompt], Sampling(20))[0] for prompt in prompts()]
    assert generate(model, prompts(), Sampling(20)) == alone
    assert generate(model, prompts()[::-1], Sampling(20)) == alone[::-1]


def test_prompts_are_read_in_parts_with_the_same_result(model: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = generate(model, prompts(), Sampling(8))
    monkeypatch.setattr("components.inference.generate.PREFILL_TOKENS", 40)
    assert generate(model, prompts(), Sampling(8)) == expected


def test_rows_end_with_their_stop_token_and_the_others_go_on(model: Decoder) -> None:
    free = generate(model, prompts(), Sampling(20))
    stops = tuple(token for token, _ in Counter(token for row in free for token in row[2:9]).most_common(3))
    stopped = generate(model, prompts(), Sampling(20, stop_ids=stops))
    for row, unstopped in zip(stopped, free, strict=True):
        end = next((place for place, token in enumerate(unstopped) if token in stops), 19)
        assert row == unstopped[: end + 1]
    assert len({len(row) for row in stopped}) > 2


def test_streaming_gives_the_tokens_of_generate(model: Decoder) -> None:
    for sampling in (Sampling(9), Sampling(9, temperature=1.0, top_p=0.9, seed=3)):
        for prompt in prompts():
            assert list(stream(model, prompt, sampling)) == generate(model, [prompt], sampling)[0]


def test_streaming_leaves_gradients_on_between_tokens(model: Decoder) -> None:
    for _ in islice(stream(model, [1, 2], Sampling(3)), 2):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


def test_generation_ends_where_the_context_does(model: Decoder) -> None:
    prompt = [5] * 60
    assert generate(model, [prompt], Sampling(50))[0] == uncached(model, prompt, 5)
    both = generate(model, [prompt, [7, 8]], Sampling(50))
    assert both == [uncached(model, prompt, 5), uncached(model, [7, 8], 50)]
    assert len(generate(model, [[5] * 64], Sampling(50))[0]) == 1


def test_a_seed_fixes_what_is_sampled(model: Decoder) -> None:
    sampling = Sampling(15, temperature=1.5, seed=11)
    first = generate(model, prompts(), sampling)
    assert generate(model, prompts(), sampling) == first
    assert generate(model, prompts(), Sampling(15, temperature=1.5, seed=12)) != first
    assert generate(model, prompts(), Sampling(15, temperature=1.5)) != first
    assert generate(model, [[1, 2]], Sampling(15, temperature=1.5, seed=-4))


def test_rows_with_equal_prompts_sample_apart(model: Decoder) -> None:
    rows = generate(model, [[1, 2, 3]] * 4, Sampling(15, temperature=1.5, seed=1))
    assert len({tuple(row) for row in rows}) == 4


def test_sampling_follows_the_probabilities(model: Decoder) -> None:
    with torch.no_grad():
        expected = (model(torch.tensor([[9, 4]]))[0, -1] / 2.0).softmax(-1)
    drawn = generate(model, [[9, 4]] * 4000, Sampling(1, temperature=2.0, seed=0))
    counts = torch.bincount(torch.tensor(drawn)[:, 0], minlength=61) / 4000
    assert (counts - expected).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_top_p_leaves_out_the_unlikely(model: Decoder) -> None:
    with torch.no_grad():
        ordered, ids = (model(torch.tensor([[9, 4]]))[0, -1] / 3.0).softmax(-1).sort(descending=True)
    allowed = set(ids[: int((ordered.cumsum(0) < 0.5).sum()) + 1].tolist())
    drawn = {row[0] for row in generate(model, [[9, 4]] * 500, Sampling(1, temperature=3.0, top_p=0.5, seed=0))}
    assert drawn == allowed
    assert len(allowed) > 2


def test_a_tiny_top_p_is_greedy(model: Decoder) -> None:
    assert generate(model, prompts(), Sampling(8, temperature=1.0, top_p=1e-6)) == generate(
        model, prompts(), Sampling(8)
    )


def test_no_prompts_and_no_tokens_give_nothing(model: Decoder) -> None:
    assert generate(model, [], Sampling(4)) == []
    assert generate(model, [[1], [2]], Sampling(0)) == [[], []]
    assert list(stream(model, [1], Sampling(0))) == []


@pytest.mark.parametrize("length", [0, 65])
def test_a_prompt_that_does_not_fit_is_an_input_error(model: Decoder, length: int) -> None:
    with pytest.raises(InputError, match=f"prompt: {length} tokens; the model takes 1 to 64"):
        generate(model, [[1] * length], Sampling(4))
