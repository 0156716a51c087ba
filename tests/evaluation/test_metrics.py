"""Figures against scipy and against a model whose probabilities are known."""

import math

import pytest
import torch

from components.evaluation.metrics import bits_per_byte, wilson_interval
from components.tokenization import chat_tokenizer as bpe
from components.tokenization.chat_tokenizer import ChatTokenizer


def test_the_interval_is_wilsons() -> None:
    assert wilson_interval(3, 10) == pytest.approx((0.1078, 0.6032), abs=1e-4)


def test_nothing_is_known_without_trials() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)


class Uniform(torch.nn.Module):
    """Gives each of its tokens the same probability."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(vocab_size))

    def forward(self, input_ids: torch.Tensor, segment_ids: torch.Tensor) -> torch.Tensor:
        return self.weight.expand(*input_ids.shape, -1)


def test_bits_per_byte_of_a_uniform_model_count_tokens_and_bytes() -> None:
    tokenizer = ChatTokenizer(bpe.train(["some text to learn"] * 9, 400), bpe.TEMPLATE_FILE.read_text())
    texts = ["hello there", "some text"]
    pieces = [([tokenizer.document_id, *ids], [0] + [1] * len(ids)) for ids in map(tokenizer.encode, texts)]
    bits, size = bits_per_byte(Uniform(tokenizer.vocab_size), tokenizer, pieces, batch_size=2)
    tokens = sum(len(ids) - 1 for ids, _ in pieces)
    assert size == sum(len(text.encode()) for text in texts)
    assert bits == pytest.approx(tokens * math.log2(tokenizer.vocab_size) / size, rel=1e-5)
