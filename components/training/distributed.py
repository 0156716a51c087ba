"""Training on several processes, ranks of torchrun's environment; on one process every function here is trivial.

Weights, gradients and optimizer states are sharded by FSDP2 (Zhao et al. 2023, arXiv 2304.11277; torch's
`fully_shard`): rank r of W has rows r * ceil(N / W) and on of a weight of N rows. A step is that of one process on the
same batch, up to rounding and the draws of dropout: gradients, counts and norms are sums over all ranks. Unpaired
labels of `align` have their reference point from a micro-batch, and so differ where micro-batches do.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from components.config.model_settings import LoopConfig
from components.config.params import InputError
from components.runtime.stage import StageRun
from components.token_rows.batches import Indices
from components.training.activations import checkpoint_blocks

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")
FORWARD_METHODS = ("hidden", "encode", "decode")
"""What objectives call on a model in place of `forward`."""
MAX_WAIT = timedelta(hours=2)
"""For other ranks, which may wait while rank 0 alone works; torchrun ends them at once when one dies."""


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def join() -> None:
    """Join the ranks of torchrun's environment, if there is one; gloo on CPUs, NCCL between GPUs.

    Raises: InputError for more ranks than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or world_size() > 1:
        return
    if torch.cuda.is_available():
        size, devices = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if size > devices:
            raise InputError(
                f"params.yaml: run.processes: {size}: this machine has {devices} GPUs; set it to {devices}"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=MAX_WAIT)
    wait_for_all()


def wait_for_all() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        summed(0.0)


def leave() -> None:
    """End every rank but 0, which goes on as one process."""
    if world_size() == 1:
        return
    is_first = rank() == 0
    wait_for_all()
    dist.destroy_process_group()
    if not is_first:
        sys.exit(0)


def summed(*values: float) -> list[float]:
    """The sum of each value over all ranks, the same on each."""
    if world_size() == 1:
        return list(values)
    return cast(list[float], sum_in_place(torch.tensor(values, dtype=torch.float64)).tolist())


def sum_in_place(tensor: Tensor) -> Tensor:
    """The sum of a tensor of the same shape on each rank, in its memory."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def total_norm(norm: Tensor) -> Tensor:
    """The norm of a vector of which each rank has a part with this norm."""
    if world_size() == 1:
        return norm
    square = norm.double().square()
    dist.all_reduce(square)
    return square.sqrt().to(norm.dtype)


def agreed(value: T) -> T:
    """Rank 0's value, on every rank: for what a measurement decides."""
    values: list[Any] = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, src=0)
    return cast(T, values[0])


def dealt(rows: Indices, micro_batch_size: int) -> list[Indices]:
    """This rank's micro-batches of the rows of a step, which are in order of length: at most `passes` of them.

    Neighbours go to different ranks, so that these take as long. Micro-batches are those of one process where their
    number is a multiple of the ranks', smaller ones elsewhere.
    """
    count = world_size() * passes(len(rows), micro_batch_size)
    return [part for part in np.array_split(rows, count)[rank() :: world_size()] if len(part)]


def passes(rows: int, micro_batch_size: int) -> int:
    """Forward and backward passes of a step on every rank: the ranks exchange weights and gradients in each.

    A rank with fewer micro-batches repeats its last with a weight of zero.
    """
    return -(-rows // (world_size() * micro_batch_size))


def seed_step(seed: int, step: int) -> None:
    """Draw this rank's dropout of a step from (seed, step, rank), so that no random state need be saved."""
    if world_size() > 1:
        torch.manual_seed(int(np.random.SeedSequence((seed, step, rank())).generate_state(1, np.uint64)[0] >> 1))


def configure_blocks(model: nn.Module, config: LoopConfig, device: torch.device) -> None:
    """Let a model's blocks recompute activations, and compile them in place, as told to."""
    checkpoint_blocks(model, config.activation_checkpointing)
    if config.compile == "on" or (config.compile == "auto" and device.type == "cuda"):
        for block in cast(Iterable[nn.Module], model.blocks):
            block.compile()


def shard(run: StageRun, model: M, config: LoopConfig, device: torch.device, dtype: torch.dtype) -> M:
    """A copy of `model` whose weights are sharded over the ranks: trained ones in fp32, all computed with in `dtype`.

    Raises: InputError for what is not supported on several processes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    size = world_size()
    if getattr(model, "sees_pictures", False):
        raise InputError(f"{run.name}: a model that sees pictures trains as one process, not {size}; set run.launcher")
    if config.global_batch_size < size:
        where = f"params.yaml: {run.section}.global_batch_size: {config.global_batch_size} rows"
        raise InputError(f"{where} leave some of {size} processes without any; set it to a multiple of {size}")
    copies = {id(weight): _copied(weight, dtype) for weight in model.parameters()}
    sharded = copy.deepcopy(model, cast(dict[int, Any], copies))
    for buffer in sharded.buffers():
        buffer.data = buffer.to(device, dtype if buffer.is_floating_point() else None)
    configure_blocks(sharded, config, device)
    mesh = init_device_mesh(device.type, (size,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    modules: list[nn.Module] = [*cast(Iterable[nn.Module], sharded.blocks), sharded]
    for module in modules:
        fully_shard(module, mesh=mesh, mp_policy=policy)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)  # losses are sums: so are gradients
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no average
        module.set_reduce_scatter_unused_params(True)  # a rank's rows may reach no head
    for name in FORWARD_METHODS:
        if hasattr(sharded, name):
            register_fsdp_forward_method(sharded, name)
    return sharded


def _copied(weight: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    """A parameter of its own, which shares memory where no dtype changes."""
    shard_dtype = torch.float32 if weight.requires_grad else dtype
    return nn.Parameter(weight.detach().to(shard_dtype), weight.requires_grad)


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor, in the same memory."""
    return cast(Tensor, cast(Any, tensor.detach()).to_local())


def reshard(model: nn.Module) -> None:
    """Free what a pass without a backward pass leaves gathered: what belongs to no block."""
    if world_size() > 1:
        cast(Any, model).reshard()


@torch.no_grad()
def gather_weights(sharded: nn.Module, model: nn.Module, everywhere: bool) -> None:
    """Copy the trained weights, whole and in fp32, into rank 0's `model`, or into that of every rank."""
    for part, weight in zip(sharded.parameters(), model.parameters(), strict=True):
        if part.requires_grad:
            whole = cast(Tensor, cast(Any, part).full_tensor())  # of all ranks: each has to call it
            if everywhere or rank() == 0:
                weight.data = whole.to(weight.device)


def as_sharded(tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names of a checkpoint, which end with a weight's name, sharded as that weight is.

    Zero-dimensional ones are the same on every rank.
    """
    if world_size() == 1:
        return dict(tensors)
    from torch.distributed.tensor import DTensor

    sharded: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        like = cast(DTensor, weights[name.split(".", 1 if name.startswith(("weights.", "best.")) else 2)[-1]])
        if tensor.dim():
            mesh, placements, shape, stride = like.device_mesh, like.placements, like.shape, like.stride()
            tensor = DTensor.from_local(tensor, mesh, placements, run_check=False, shape=shape, stride=stride)
        sharded[name] = tensor
    return sharded


def own_rows(whole: Tensor) -> Tensor:
    """This rank's rows of a whole tensor; all of a zero-dimensional one."""
    return whole.narrow(0, *_rows(len(whole), rank())) if whole.dim() and world_size() > 1 else whole


def _rows(height: int, number: int) -> tuple[int, int]:
    """First and count of rank `number`'s rows of `height`."""
    each = -(-height // world_size())
    first = min(number * each, height)
    return first, min(each, height - first)


def apply_to_whole(
    shards: Sequence[Tensor], shapes: Sequence[tuple[int, int]], function: Callable[[int, Tensor], Tensor]
) -> Iterator[Tensor]:
    """This rank's rows of `function(number, matrix)` of each matrix; `shards` are its rows of the matrices.

    As many matrices at a time as there are ranks: each goes whole to one of them, which owns it, and its result back.
    """
    size = world_size()
    for start in range(0, len(shards), size):
        group = range(start, min(start + size, len(shards)))
        own = shapes[start + rank()] if start + rank() in group else (0, 0)
        whole_sizes = [_rows(own[0], number)[1] * own[1] for number in range(size)]
        shard_sizes = [shards[number].numel() for number in group] + [0] * (size - len(group))
        sent = torch.cat([shards[number].flatten() for number in group])
        whole, received = sent.new_empty(sum(whole_sizes)), torch.empty_like(sent)
        dist.all_to_all_single(whole, sent, whole_sizes, shard_sizes)
        if len(whole):
            whole = function(start + rank(), whole.view(own)).flatten()
        dist.all_to_all_single(received, whole, shard_sizes, whole_sizes)
        parts = torch.split(received, shard_sizes[: len(group)])
        yield from (part.view_as(shards[number]) for part, number in zip(parts, group, strict=True))
