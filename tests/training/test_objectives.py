"""The causal loss against torch's own, and packed rows against documents one by one."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from components.models.decoder import Decoder, DecoderConfig
from components.token_rows.batches import IGNORED, Batch
from components.training.objectives import causal_lm, chunk_rows, linear_cross_entropy, row_losses, target_rows

CONFIG = DecoderConfig(
    vocab_size=53, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=48, max_seq_len=64
)


@pytest.fixture
def model() -> Decoder:
    torch.manual_seed(0)
    return Decoder(CONFIG)


def document(length: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 53, (length,), generator=torch.Generator().manual_seed(seed))


def packed(documents: list[torch.Tensor], padding: int = 0) -> Batch:
    ids = torch.cat([*documents, torch.zeros(padding, dtype=torch.long)])
    segments = torch.cat([torch.full_like(ids, number) for number, ids in enumerate(documents, start=1)])
    segments = torch.cat([segments, torch.zeros(padding, dtype=torch.long)])
    labels = torch.cat([torch.cat([ids[1:], torch.tensor([IGNORED])]) for ids in documents])
    labels = torch.cat([labels, torch.full((padding,), IGNORED)])
    positions = torch.cat([torch.arange(len(ids)) for ids in documents] + [torch.arange(padding)])
    names = ("input_ids", "labels", "segment_ids", "position_ids")
    return {name: value.unsqueeze(0) for name, value in zip(names, (ids, labels, segments, positions), strict=True)}


def grads(model: Decoder) -> list[torch.Tensor]:
    taken = [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
    model.zero_grad()
    return taken


def test_packed_documents_are_learned_as_if_alone(model: Decoder) -> None:
    documents = [document(length, seed) for seed, length in enumerate((9, 14, 5))]
    together = causal_lm(model, packed(documents, padding=4))
    together.total.backward()
    packed_grads = grads(model)
    total, targets = torch.zeros(()), 0
    for ids in documents:
        alone = causal_lm(model, packed([ids]))
        alone.total.backward()
        total, targets = total + alone.total, targets + alone.targets
    assert together.targets == targets == 9 + 14 + 5 - 3
    torch.testing.assert_close(together.total, total)
    for ours, theirs in zip(packed_grads, grads(model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_loss_of_labelled_rows_is_cross_entropy_of_all_logits(model: Decoder) -> None:
    batch = packed([document(30, 1)])
    batch["labels"][0, ::3] = IGNORED
    loss = causal_lm(model, batch)
    loss.total.backward()
    ours = grads(model)
    logits = model(batch["input_ids"], batch["segment_ids"], batch["position_ids"])
    expected = F.cross_entropy(logits[0], batch["labels"][0], ignore_index=IGNORED, reduction="sum")
    expected.backward()
    torch.testing.assert_close(loss.total, expected)
    for got, wanted in zip(ours, grads(model), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_rows_of_logits_follow_from_the_vocabulary() -> None:
    """1 GiB on a GPU and 256 MiB on a CPU in fp32, of a multiple of 128 rows; no more rows than products gain from."""
    sizes = (2048, 32_768, 49_152, 128_256, 262_144)
    assert [chunk_rows(size, "cuda") for size in sizes] == [8192, 8192, 5376, 2048, 1024]
    assert [chunk_rows(size, "cpu") for size in sizes] == [1024, 1024, 1024, 512, 256]
    assert chunk_rows(10**7, "cpu") == 128


@pytest.mark.parametrize("count", [20, 12])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_and_rows_of_padding_change_nothing(chunk: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    stream, weight = torch.randn(20, 16, requires_grad=True), torch.randn(31, 16, requires_grad=True)
    labels = torch.randint(0, 31, (20,))
    expected = F.cross_entropy(stream[:count] @ weight.T, labels[:count], reduction="sum") * 3
    wanted = torch.autograd.grad(expected, (stream, weight))
    monkeypatch.setattr("components.training.objectives.chunk_rows", lambda *_: chunk)
    got = linear_cross_entropy(stream, weight, labels, count=count) * 3
    torch.testing.assert_close(got, expected)
    for ours, theirs in zip(torch.autograd.grad(got, (stream, weight)), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(stream, weight, labels, count=count) * 3, expected)


def test_losses_of_rows_keep_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients as of all at once."""
    torch.manual_seed(0)
    stream, weight, labels = torch.randn(50, 8), torch.randn(300, 8), torch.randint(0, 300, (50,))
    reference = [stream.clone().requires_grad_(), weight.clone().requires_grad_()]
    expected = F.cross_entropy(reference[0] @ reference[1].T, labels, reduction="none")
    (expected * labels).sum().backward()
    monkeypatch.setattr("components.training.objectives.chunk_rows", lambda *_: 16)
    saved: list[int] = []
    parts = [stream.requires_grad_(), weight.requires_grad_()]

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = row_losses(lambda logits, names: F.cross_entropy(logits, names, reduction="none"), *parts, labels)
    assert max(saved, default=0) <= weight.numel()
    torch.testing.assert_close(losses, expected)
    (losses * labels).sum().backward()
    for part, whole in zip(parts, reference, strict=True):
        torch.testing.assert_close(part.grad, whole.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("targets", [0, 1, 64, 65])
def test_rows_of_targets_come_first_and_are_a_multiple(targets: int) -> None:
    labels = torch.full((2, 80), IGNORED)
    labels.view(-1)[10 : 10 + targets] = torch.arange(targets)
    rows, values, count = target_rows(labels)
    assert (count, len(rows)) == (targets, -(-targets // 64) * 64)
    assert rows[:count].tolist() == list(range(10, 10 + targets))
    assert values[:count].tolist() == list(range(targets))


def test_bf16_weights_give_nearly_the_loss_of_fp32(model: Decoder) -> None:
    batch = packed([document(40, 2)])
    exact = causal_lm(model, batch).total.item()
    rounded = causal_lm(model.bfloat16(), batch).total.detach()
    assert rounded.dtype == torch.float32
    assert float(rounded) == pytest.approx(exact, rel=0.01)


def test_a_batch_without_targets_costs_nothing(model: Decoder) -> None:
    batch = packed([document(8, 3)])
    batch["labels"].fill_(IGNORED)
    loss = causal_lm(model, batch)
    assert (loss.total.item(), loss.targets) == (0.0, 0)
    with torch.no_grad():
        assert float(causal_lm(model, batch).total) == 0.0
