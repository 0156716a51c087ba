"""Search in an encoder-decoder: as transformers does it, and never worse than looking at everything allows."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from transformers import T5ForConditionalGeneration

from components.config.params import InputError
from components.inference.seq2seq import Search, generate_targets
from components.models.checkpoint import save_model
from components.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig

END = 1
CONFIG = EncoderDecoderConfig(
    vocab_size=29,
    embed_dim=32,
    num_layers=2,
    num_decoder_layers=2,
    num_heads=2,
    head_dim=8,
    hidden_dim=32,
    max_seq_len=32,
    num_buckets=8,
    max_distance=12,
)


def drawn(seed: int, vocab_size: int = 29, size: float = 0.5) -> EncoderDecoder:
    """Weights so large that targets depend on their sources, and end sooner or later."""
    torch.manual_seed(seed)
    model = EncoderDecoder(EncoderDecoderConfig(**{**vars(CONFIG), "vocab_size": vocab_size})).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * size + (weight.dim() == 1))
    return model


def sources(count: int, vocab_size: int = 29) -> list[list[int]]:
    random = torch.Generator().manual_seed(count)
    lengths = torch.randint(1, 12, (count,), generator=random).tolist()
    return [torch.randint(2, vocab_size, (length,), generator=random).tolist() for length in lengths]


@pytest.mark.parametrize("beams", [1, 2, 4])
@pytest.mark.parametrize(("length_penalty", "unrepeated"), [(1.0, 0), (0.6, 0), (1.0, 1), (1.0, 2)])
def test_targets_are_those_of_transformers(beams: int, length_penalty: float, unrepeated: int, tmp_path: Path) -> None:
    ended = set()
    for seed in range(4):
        model = drawn(seed)
        save_model(model, tmp_path / str(seed))
        theirs = T5ForConditionalGeneration.from_pretrained(tmp_path / str(seed)).eval()
        asked = sources(6)
        found = generate_targets(model, asked, Search(12, END, beams, length_penalty, unrepeated))
        for source, target in zip(asked, found, strict=True):
            options = {"length_penalty": length_penalty, "early_stopping": False} if beams > 1 else {}
            said = theirs.generate(
                input_ids=torch.tensor([source]),
                max_new_tokens=12,
                num_beams=beams,
                do_sample=False,
                eos_token_id=END,
                pad_token_id=0,
                decoder_start_token_id=0,
                no_repeat_ngram_size=unrepeated,
                **options,
            )
            expected = said[0, 1:].tolist()
            assert [*target.ids, *([END] if target.ended else [])] == expected[: len(target.ids) + target.ended]
            assert set(expected[len(target.ids) + target.ended :]) <= {0}
            ended.add(target.ended)
            if unrepeated:
                grams = list(zip(*(target.ids[start:] for start in range(unrepeated)), strict=False))
                assert len(set(grams)) == len(grams)
    assert ended == {True, False}


def test_with_a_beam_for_every_target_the_best_of_all_is_found() -> None:
    vocab_size, most = 5, 3
    for seed in range(5):
        model = drawn(seed, vocab_size)
        source = [2, 3, 4]
        found = generate_targets(model, [source], Search(most, END, beams=vocab_size**most, length_penalty=1.0))[0]
        scores = {
            tuple(target): score_of(model, source, target)
            for length in range(1, most + 1)
            for target in product(range(vocab_size), repeat=length)
            if END not in target[:-1] and (target[-1] == END or length == most)
        }
        assert found.score == pytest.approx(max(scores.values()), abs=1e-5)


@torch.no_grad()
def score_of(model: EncoderDecoder, source: list[int], target: tuple[int, ...]) -> float:
    """Mean log-probability of a whole target, read at once."""
    shifted = torch.tensor([[model.config.start_id, *target[:-1]]])
    chances = model(torch.tensor([source]), shifted).log_softmax(-1)[0]
    return float(sum(chances[place, token] for place, token in enumerate(target)) / len(target))


@pytest.mark.parametrize("beams", [1, 3])
def test_a_source_is_answered_alike_alone_and_among_others(beams: int) -> None:
    model, asked = drawn(3), sources(9)
    search = Search(10, END, beams)
    together = generate_targets(model, asked, search)
    alone = [generate_targets(model, [source], search)[0] for source in asked]
    assert [target.ids for target in together] == [target.ids for target in alone]
    assert [target.score for target in together] == pytest.approx([target.score for target in alone], abs=1e-4)


def test_an_empty_source_is_named() -> None:
    with pytest.raises(InputError, match="source 1: 0 tokens"):
        generate_targets(drawn(0), [[2], []], Search(4, END))
