"""Training on a GPU attends within packed documents without a mask: the same as with a dense one.

Flash's kernels have no CPU build: plain ones stand in for them behind torch's own operator and its autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode

from components.models.attention import packed_documents, takes_packed
from components.models.decoder import Decoder, DecoderConfig

CONFIG = DecoderConfig(
    vocab_size=61,
    embed_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    hidden_dim=48,
    max_seq_len=512,
    qk_norm=True,
)
WINDOWS = replace(CONFIG, window=5, windowed_layers=(True, False), unrotated_layers=(False, True))
SEGMENTS = torch.tensor([[1] * 9 + [2] * 1 + [3] * 10, [3] * 14 + [0] * 6, [1] * 20])
"""Of three rows: the second begins with the number that the first ends with, and is padded."""


def weighted(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float, window: list[int]
) -> Iterator[list[Tensor]]:
    """Of each document its queries, keys and values, repeated for all query heads, and the weights (H, T, T)."""
    for start, stop in pairwise(bounds.tolist()):
        queries, keys, values = (each[start:stop].transpose(0, 1) for each in (q, k, v))
        keys, values = (each.repeat_interleave(len(queries) // len(each), 0) for each in (keys, values))
        ahead = torch.arange(stop - start) - torch.arange(stop - start).unsqueeze(1)
        hidden = (ahead > window[1]) | (ahead < -window[0] if window[0] >= 0 else False)
        yield [queries, keys, values, (queries @ keys.mT * scale).masked_fill(hidden, -torch.inf).softmax(-1)]


def plain(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, _, _, _, scale, window, *_ = rest
    outs = [(weights @ values).transpose(0, 1) for _, _, values, weights in weighted(q, k, v, bounds, scale, window)]
    return torch.cat(outs), q.new_zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)


def plain_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _, _, bounds, _, _, _, _, _, scale, window = rest
    parts = []
    for queries, keys, values, weights in weighted(q, k, v, bounds, scale, window):
        start = sum(len(part[0]) for part in parts)
        out_grad = grad[start : start + queries.shape[1]].transpose(0, 1)
        weights_grad = out_grad @ values.mT
        scores_grad = weights * (weights_grad - (weights_grad * weights).sum(-1, keepdim=True)) * scale
        grads = scores_grad @ keys, scores_grad.mT @ queries, weights.mT @ out_grad
        parts.append([each.transpose(0, 1) for each in grads])
    q_grad, k_grad, v_grad = (torch.cat(list(each)) for each in zip(*parts, strict=True))
    return q_grad, *(each.view(*k.shape[:2], -1, k.shape[2]).sum(2) for each in (k_grad, v_grad))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Registers the plain kernels; what it gives turns the path on."""
    library = torch.library.Library("torch_attn", "FRAGMENT")
    torch.library.register_kernel("torch_attn::_varlen_attn", "cpu", plain, lib=library)
    torch.library.register_kernel("torch_attn::_varlen_attn_backward", "cpu", plain_backward, lib=library)
    assert varlen.varlen_attn is not None
    return lambda: monkeypatch.setattr("components.models.decoder.takes_packed", lambda *_: True)


def passes(model: Decoder, grads: bool = True) -> list[Tensor]:
    ids = torch.randint(61, SEGMENTS.shape, generator=torch.Generator().manual_seed(1))
    starts = torch.tensor([[0] * 9 + [9] + [10] * 10, [0] * 14 + [14] * 6, [0] * 20])
    hidden = model.hidden(ids, SEGMENTS, torch.arange(20) - starts)
    weights = torch.linspace(-1, 1, hidden.numel()).view_as(hidden)
    return [hidden, *torch.autograd.grad((hidden * weights).sum(), [*model.blocks.parameters()])]


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize(("config", "compiled"), [(CONFIG, False), (WINDOWS, False), (WINDOWS, True)])
def test_documents_give_what_a_dense_mask_gives(
    config: DecoderConfig, compiled: bool, kernels: Callable[[], None]
) -> None:
    torch.manual_seed(0)
    model = Decoder(config).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    expected = passes(model)
    kernels()
    if compiled:
        for block in model.blocks:
            block.compile(backend="aot_eager", fullgraph=True)
    for ours, wanted in zip(passes(model), expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)


def test_documents_end_with_rows_and_where_the_number_changes() -> None:
    documents = packed_documents(SEGMENTS)
    assert documents.bounds.tolist() == [0, 9, 10, 20, 34, 40, 60]
    assert documents.bounds.dtype == torch.int32
    assert documents.longest == 20


class Largest(TorchDispatchMode):
    """Elements of the largest result of an operation."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple) else (result,):
            self.count = max(self.count, each.numel() if isinstance(each, Tensor) else 0)
        return result


@pytest.mark.parametrize(("dtype", "squares"), [(torch.bfloat16, False), (torch.float32, True)])
def test_half_precision_makes_nothing_of_the_square_of_a_row(dtype: torch.dtype, squares: bool) -> None:
    length = 512
    with torch.device("meta"):
        model, ids = Decoder(WINDOWS).to(dtype), torch.zeros(2, length, dtype=torch.long)
    with Largest() as largest:
        torch.autograd.backward(model.hidden(ids, ids, ids).sum())
    assert (largest.count >= length**2) is squares


def test_only_flash_takes_documents() -> None:
    half = torch.zeros(1, dtype=torch.bfloat16)
    assert not takes_packed(half, 64), "a CPU"
    assert takes_packed(half.to("meta"), 64)
    assert not takes_packed(half.float().to("meta"), 64)
    assert not any(takes_packed(half.to("meta"), width) for width in (20, 512))
