"""The objectives of the encoder and the encoder-decoder: `transformers`' losses, cases by hand, and that they learn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, BertForPreTraining, T5ForConditionalGeneration

from components.models.checkpoint import save_model
from components.models.encoder import Classifier, EncoderConfig, EncoderForPretraining
from components.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from components.runtime.stage import StageRun
from components.token_rows.batches import IGNORED, Batch
from components.training.loop import Training
from components.training.objectives import (
    classification,
    linear_cross_entropy,
    masked_lm_next_sentence,
    sequence_to_sequence,
)
from components.training.rows import corrupt_spans, mask_tokens

NewRun = Callable[..., StageRun]
VOCAB, LABELS = 60, ("a", "b", "c")
ENCODER = EncoderConfig(VOCAB, embed_dim=32, num_layers=2, num_heads=2, hidden_dim=64, max_seq_len=32, labels=LABELS)
ENCODER_DECODER = EncoderDecoderConfig(
    VOCAB, embed_dim=32, num_layers=2, num_decoder_layers=2, num_heads=2, head_dim=16, hidden_dim=48, max_seq_len=64
)


def pairs(count: int, seed: int = 0) -> Batch:
    """[1] A [2] B [2] with some of it masked; B goes on counting where A ends, or anywhere."""
    random = np.random.default_rng(seed)
    rows: dict[str, list[Any]] = {name: [] for name in ("input_ids", "labels", "token_type_ids", "attention_mask")}
    follows = random.integers(0, 2, count)
    for other in follows:
        start = random.integers(5, 30)
        first = np.arange(start, start + 7)
        second = np.arange(7) + (random.integers(5, 50) if other else start + 7)
        ids = np.concatenate([[1], first, [2], second, [2], [0]])
        shown, labels = mask_tokens(ids, ids > 4, random, 3, np.arange(5, VOCAB), 0.25, None)
        for name, value in zip(rows, (shown, labels, (np.arange(18) > 8), ids != 0), strict=True):
            rows[name].append(value.astype(np.int64))
    batch = {name: torch.from_numpy(np.stack(value)) for name, value in rows.items()}
    return batch | {"next_sentence_labels": torch.from_numpy(follows)}


def spans(count: int, seed: int = 0) -> Batch:
    random = np.random.default_rng(seed)
    made = [
        corrupt_spans(np.arange(20) + random.integers(5, 20), random, [50, 51, 52], 1, 0.3, 3.0) for _ in range(count)
    ]
    source, target = (torch.tensor([pair[side] for pair in made]) for side in (0, 1))
    shifted = F.pad(target[:, :-1], (1, 0))
    return {
        "input_ids": source,
        "attention_mask": torch.ones_like(source),
        "decoder_input_ids": shifted,
        "labels": target,
    }


def texts(count: int, seed: int = 0) -> Batch:
    """Label 0, 1 or 2 is said by one token somewhere in the text."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=random)
    ids = torch.randint(10, VOCAB, (count, 12), generator=random)
    ids[torch.arange(count), torch.randint(1, 12, (count,), generator=random)] = labels + 5
    return {
        "input_ids": ids,
        "labels": labels,
        "token_type_ids": torch.zeros_like(ids),
        "attention_mask": torch.ones_like(ids),
    }


def test_masked_lm_and_next_sentence_are_the_loss_of_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = EncoderForPretraining(ENCODER).eval()
    nn.init.normal_(model.head.bias)
    batch = pairs(6)
    loss = masked_lm_next_sentence(model, batch)
    save_model(model, tmp_path / "model")
    theirs = BertForPreTraining.from_pretrained(tmp_path / "model").eval()
    names = {"next_sentence_labels": "next_sentence_label"}
    expected = theirs(**{names.get(name, name): value for name, value in batch.items()})
    assert loss.targets == int((batch["labels"] != IGNORED).sum())
    torch.testing.assert_close(loss.total / loss.targets, expected.loss, rtol=1e-5, atol=1e-5)


def test_the_two_means_of_pretraining_by_hand() -> None:
    """Untrained heads of zeros say 1/60 and 1/2, whatever they are asked."""
    model = EncoderForPretraining(ENCODER)
    for layer in (model.embed, model.next_sentence):
        nn.init.zeros_(layer.weight)
    batch = pairs(4)
    loss = masked_lm_next_sentence(model, batch)
    expected = torch.tensor(60.0).log() + torch.tensor(2.0).log()
    torch.testing.assert_close(loss.total / loss.targets, expected)
    batch["next_sentence_labels"][:3] = IGNORED
    loss = masked_lm_next_sentence(model, batch)
    torch.testing.assert_close(loss.total / loss.targets, expected)
    batch["next_sentence_labels"][:] = IGNORED
    loss = masked_lm_next_sentence(model, batch)
    torch.testing.assert_close(loss.total / loss.targets, torch.tensor(60.0).log())


@pytest.mark.parametrize("tied", [True, False])
def test_sequence_to_sequence_is_the_loss_of_transformers(tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {**vars(ENCODER_DECODER), "tie_embeddings": tied, "scale_outputs": tied}
    model = EncoderDecoder(EncoderDecoderConfig(**shape)).eval()
    batch = spans(4)
    batch["attention_mask"][0, -3:] = 0
    batch["labels"][1, -2:] = IGNORED
    loss = sequence_to_sequence(model, batch)
    save_model(model, tmp_path / "model")
    theirs = T5ForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        expected = theirs(**batch).loss
    torch.testing.assert_close(loss.total.detach() / loss.targets, expected, rtol=1e-4, atol=1e-4)


def test_classification_is_the_loss_of_transformers_and_torch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Classifier(ENCODER).eval()
    batch = texts(8)
    save_model(model, tmp_path / "model")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    expected = theirs(**batch)
    loss = classification(torch.ones(3), 0.0)(model, batch)
    assert loss.targets == 8
    torch.testing.assert_close(loss.total / loss.targets, expected.loss, rtol=1e-5, atol=1e-5)
    weights = torch.tensor([0.5, 1.0, 3.0])
    loss = classification(weights, 0.1)(model, batch)
    wanted = F.cross_entropy(expected.logits, batch["labels"], weights, label_smoothing=0.1)
    torch.testing.assert_close(loss.total / loss.targets, wanted, rtol=1e-5, atol=1e-5)


def test_a_bias_in_the_head_is_learned_as_in_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    stream, weight, bias = (torch.randn(*size, requires_grad=True) for size in ((20, 16), (31, 16), (31,)))
    labels = torch.randint(0, 31, (20,))
    expected = F.cross_entropy(F.linear(stream, weight, bias), labels, reduction="sum") * 3
    wanted = torch.autograd.grad(expected, (stream, weight, bias))
    monkeypatch.setattr("components.training.objectives.chunk_rows", lambda *_: 7)
    got = linear_cross_entropy(stream, weight, labels, bias) * 3
    torch.testing.assert_close(got, expected)
    for ours, theirs in zip(torch.autograd.grad(got, (stream, weight, bias)), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "objective", "batches", "steps", "ceiling"),
    [
        (lambda: EncoderForPretraining(ENCODER), masked_lm_next_sentence, pairs, 250, 1.6),
        (lambda: EncoderDecoder(ENCODER_DECODER), sequence_to_sequence, spans, 120, 1.0),
        (lambda: Classifier(ENCODER), classification(torch.ones(3), 0.0), texts, 120, 0.2),
    ],
    ids=["masked_lm_next_sentence", "span_corruption", "classification"],
)
def test_each_objective_learns_what_it_never_saw(
    model: Any, objective: Any, batches: Any, steps: int, ceiling: float, new_run: NewRun
) -> None:
    """A loss on other rows, drawn anew each step in training, far below where it began."""
    run = new_run(optimizer="muon", max_steps=steps, learning_rate=0.01, decay_share=0.5, precision="fp32")
    torch.manual_seed(0)
    training = Training(model().train(), objective, run.params.pretrain.decoder, seed=0)
    unseen = batches(64, seed=10**6)
    with torch.no_grad():
        first = objective(training.model, unseen)
    for step in range(steps):
        training.train_step([batches(16, seed=step)])
    training.model.eval()
    with torch.no_grad():
        last = objective(training.model, unseen)
    assert float(last.total / last.targets) < ceiling < 0.5 * float(first.total / first.targets)
