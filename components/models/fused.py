"""Forward and backward by hand for training on a CPU, where each pass over the activations counts.

The same functions as the plain ones (tests hold them together), with fewer and in-place passes:
autograd's composites cost a third of a step at two million parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from components.models.positions import Rotary, rotate_into

QUERY_BLOCK = 64
"""Queries whose scores are made at a time: small enough to stay in the caches and to skip much that is hidden."""


def should_fuse(x: Tensor) -> bool:
    """Whether this call is one of training on a CPU, and no compiler fuses the plain functions itself."""
    return torch.is_grad_enabled() and x.is_cpu and not torch.compiler.is_compiling()


class RMSNorm(nn.RMSNorm):
    """Scale to root mean square one, then by a learned gain (arXiv 1910.07467); Gemma's gain is 1 + weight."""

    def __init__(self, dim: int, eps: float, offset: bool = False) -> None:
        super().__init__(dim, eps=eps)
        self.offset = offset

    @property
    def gain(self) -> Tensor:
        return self.weight + 1 if self.offset else self.weight

    def forward(self, x: Tensor) -> Tensor:
        if should_fuse(x):
            apply = cast(Callable[..., Tensor], _RMSNorm.apply)
            return apply(x, self.gain, self.eps or 0.0)
        if x.is_cuda or torch.is_grad_enabled():
            return F.rms_norm(x, self.normalized_shape, self.gain, self.eps)
        return x * _inverse_root_mean_square(x, self.eps or 0.0) * self.gain


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        scale = _inverse_root_mean_square(x, eps)
        normed = x * scale
        ctx.save_for_backward(normed, scale, gain)
        return normed * gain

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, scale, gain = ctx.saved_tensors
        along = grads[0] * normed
        gain_grad = along.flatten(0, -2).sum(0)
        x_grad = _norm_backward(grads[0] * gain, normed, torch.mv(along.flatten(0, -2), gain).view(scale.shape))
        return x_grad.mul_(scale), gain_grad, None


def _inverse_root_mean_square(x: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    scale: Tensor = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)
    return scale


def _norm_backward(grad: Tensor, normed: Tensor, along: Tensor) -> Tensor:
    """Take from `grad`, in place, its part along `normed` (`along`: their product): the norm hides that."""
    return grad.addcmul_(normed, along, value=-1 / normed.shape[-1])


def low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """x (..., I) W^T + scale (x A^T) B^T + bias: a frozen product W (O, I) and its low-rank pair A (R, I), B (O, R)."""
    apply = cast(Callable[..., Tensor], _LowRankLinear.apply)
    return apply(x, weight, bias, a, b, scale)


class _LowRankLinear(torch.autograd.Function):
    """The pair's products are added to those of W in place: no pass over (..., O) or (..., I) of their own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        inner = (x @ a.mT).mul_(scale)
        out = F.linear(x, weight, bias)
        out.flatten(0, -2).addmm_(inner.flatten(0, -2), b.mT)
        ctx.save_for_backward(x, weight, a, b, inner)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, inner = ctx.saved_tensors
        out_grad = grads[0].flatten(0, -2)
        inner_grad = (out_grad @ b).mul_(ctx.scale)
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = (out_grad @ weight).addmm_(inner_grad, a).view(x.shape)
        return x_grad, None, None, inner_grad.mT @ x.flatten(0, -2), out_grad.mT @ inner.flatten(0, -2), None


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of (..., 2 * hidden_dim)."""
    if not should_fuse(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    apply = cast(Callable[..., Tensor], _SwiGLU.apply)
    return apply(gate_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        active = F.silu(gate)
        ctx.save_for_backward(gate_up, active)
        return active * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        gate_up, active = ctx.saved_tensors
        grad = torch.empty_like(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        gate_grad, up_grad = grad.chunk(2, dim=-1)
        torch.mul(grads[0], active, out=up_grad)
        torch.mul(grads[0], up, out=gate_grad)
        torch.ops.aten.silu_backward.grad_input(gate_grad, gate, grad_input=gate_grad)
        return grad


def self_attention(
    projected: Tensor, gains: tuple[Tensor, Tensor] | None, eps: float, rotary: Rotary, mask: Tensor, num_heads: int
) -> Tensor:
    """Self-attention from projected queries, keys and values (B, T, H + 2K, D) to (B, T, H * D).

    Norms queries and keys where `gains` are given, rotates them, and mixes the values; `mask` is added to the scores.
    """
    rotate_heads = cast(Callable[..., tuple[Tensor, Tensor, Tensor]], _Rotate.apply)
    mix = cast(Callable[..., Tensor], _Mix.apply)
    q_gain, k_gain = gains or (None, None)
    queries, keys, values = rotate_heads(projected, q_gain, k_gain, eps, *rotary, num_heads)
    return mix(queries, keys, values, mask)


class _Rotate(torch.autograd.Function):
    """Projections (B, T, H + 2K, D) to queries, keys and values (B, heads, T, D), the former two normed and rotated.

    The scale of the scores rides on the queries. n = H + K heads are rotated.
    """

    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        q_gain: Tensor | None,
        k_gain: Tensor | None,
        eps: float,
        cos: Tensor,
        sin: Tensor,
        num_heads: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        total, head_dim = projected.shape[2:]
        turned = (total + num_heads) // 2
        heads = projected[:, :, :turned]  # (B, T, n, D)
        scale = None
        if q_gain is not None:
            scale = _inverse_root_mean_square(heads, eps)
            heads = heads * scale
        q_factor = head_dim**-0.5 if q_gain is None else q_gain * head_dim**-0.5
        queries = _rotated(heads[:, :, :num_heads], q_factor, cos, sin)
        keys = _rotated(heads[:, :, num_heads:], 1.0 if k_gain is None else k_gain, cos, sin)
        ctx.save_for_backward(heads if q_gain is not None else None, scale, q_gain, k_gain, cos, sin)
        return queries, keys, projected[:, :, turned:].transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        normed, scale, q_gain, k_gain, cos, sin = ctx.saved_tensors
        queries_grad, keys_grad, values_grad = (grad.transpose(1, 2) for grad in grads)  # (B, T, heads, D)
        batch, length, num_heads, head_dim = queries_grad.shape
        turned = num_heads + keys_grad.shape[2]
        grad = queries_grad.new_empty(batch, length, turned + values_grad.shape[2], head_dim)
        grad[:, :, turned:] = values_grad
        heads_grad = grad[:, :, :turned] if normed is None else torch.empty_like(normed)
        # The inverse of a rotation is its transpose.
        rotate_into(heads_grad[:, :, :num_heads], queries_grad, cos * head_dim**-0.5, sin * -(head_dim**-0.5))
        rotate_into(heads_grad[:, :, num_heads:], keys_grad, cos, -sin)
        if normed is None:
            return grad, None, None, None, None, None, None
        along = heads_grad * normed
        gain_grad = along.sum((0, 1))  # (n, D)
        gain = torch.cat([q_gain.expand(num_heads, -1), k_gain.expand(turned - num_heads, -1)])
        towards = along.mul_(gain).sum(-1, keepdim=True)
        torch.mul(_norm_backward(heads_grad.mul_(gain), normed, towards), scale, out=grad[:, :, :turned])
        return grad, gain_grad[:num_heads].sum(0), gain_grad[num_heads:].sum(0), None, None, None, None


def _rotated(x: Tensor, gain: Tensor | float, cos: Tensor, sin: Tensor) -> Tensor:
    """x * gain (B, T, heads, D), rotated by position, as a contiguous (B, heads, T, D)."""
    out = x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3])
    swapped = gain if isinstance(gain, float) else gain.roll(gain.shape[0] // 2)
    rotate_into(out.transpose(1, 2), x, cos * gain, sin * swapped)
    return out


class _Mix(torch.autograd.Function):
    """softmax(queries keys^T + mask) values, (B, heads, T, D) to (B, T, H * D), in blocks of queries.

    Where the mask hides all later keys from a block, as a causal one does, they are left out.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        batch, num_heads, length, head_dim = queries.shape
        mixed = queries.new_empty(batch, length, num_heads, head_dim)
        ctx.blocks = _blocks(mask, length)
        weights = []
        for start, stop, span in ctx.blocks:
            scores = torch.bmm(_rows(queries, keys, start, stop), keys.flatten(0, 1)[:, :span].mT)
            scores.view(batch, num_heads, stop - start, span).add_(mask[:, :, start:stop, :span])
            weights.append(scores.softmax(-1))
            part = torch.bmm(weights[-1], values.flatten(0, 1)[:, :span])
            mixed[:, start:stop] = part.view(batch, num_heads, -1, head_dim).transpose(1, 2)
        ctx.save_for_backward(queries, keys, values, *weights)
        return mixed.flatten(2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, *weights = ctx.saved_tensors
        mixed_grad = grads[0].view(*grads[0].shape[:2], *queries.shape[1::2]).transpose(1, 2)  # (B, H, T, D)
        queries_grad, keys_grad, values_grad = (torch.empty_like(each) for each in (queries, keys, values))
        keys_parts, values_parts = keys_grad.flatten(0, 1), values_grad.flatten(0, 1)
        # From the last block, which sees every key and so writes every gradient the others add to.
        for (start, stop, span), weight in zip(reversed(ctx.blocks), reversed(weights), strict=True):
            rows, rows_grad = (_rows(each, keys, start, stop) for each in (queries, mixed_grad))
            weight_grad = torch.bmm(rows_grad, values.flatten(0, 1)[:, :span].mT)
            scores_grad = torch._softmax_backward_data(weight_grad, weight, -1, weight.dtype)
            part = torch.bmm(scores_grad, keys.flatten(0, 1)[:, :span])
            queries_grad[:, :, start:stop] = part.view(*queries.shape[:2], -1, queries.shape[3])
            if span == keys.shape[2]:
                torch.bmm(scores_grad.mT, rows, out=keys_parts)
                torch.bmm(weight.mT, rows_grad, out=values_parts)
            else:
                keys_parts[:, :span] += torch.bmm(scores_grad.mT, rows)
                values_parts[:, :span] += torch.bmm(weight.mT, rows_grad)
        return queries_grad, keys_grad, values_grad, None


def _rows(x: Tensor, keys: Tensor, start: int, stop: int) -> Tensor:
    """A block of x (B, H, T, D) as (B * K, G * T, D): the query heads of one key head below each other."""
    return x[:, :, start:stop].reshape(keys.shape[0] * keys.shape[1], -1, x.shape[3])


def _blocks(mask: Tensor, length: int) -> list[tuple[int, int, int]]:
    """Blocks of queries: start, stop, and how many keys any of them sees."""
    hidden = torch.finfo(mask.dtype).min / 2
    starts = range(0, length, QUERY_BLOCK)
    blocks = [(start, min(start + QUERY_BLOCK, length)) for start in starts]
    causal = all(bool(mask[:, :, start:stop, stop:].amax() <= hidden) for start, stop in blocks if stop < length)
    return [(start, stop, stop) for start, stop in blocks] if causal else [(0, length, length)]
