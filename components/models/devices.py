"""Device, precision and threads of a model, and settings of the CPU."""

from __future__ import annotations

import ctypes
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

SMALL_MODEL = 50_000_000
"""Parameters up to which one torch thread beats several: waking threads costs more than the products."""

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
CLEAR_GAIN = 1.25
"""Times as fast as fp32 from which bf16 is chosen: beyond what a measurement varies by."""
MEASURED_WIDTH = 1024
"""Outputs of a product that are measured at most."""
MEASURED_TURNS = 8
MEASURED_PRODUCT = 128 * 128
"""Weights of a product, in the mean of a model's, below which none is measured, and fp32 is chosen: so small a product
takes as long as what is around it, and its time varies by more than CLEAR_GAIN."""
MEASURED_OPERATIONS = 1.5e9
"""Of one pass over the shapes of a model's products: some hundredth of a second in fp32."""


def best_device() -> torch.device:
    """The GPU, where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype(precision: str, device: torch.device, model: nn.Module | None = None) -> torch.dtype:
    """The dtype of `precision`; for "auto", bf16 on a GPU, and on a CPU where it is clearly faster for this model.

    The rates of a CPU depend on its instruction sets and on shapes, so that the model's own products are measured;
    without a model, and for one of small products, it is fp32.
    """
    if precision != "auto":
        return torch.bfloat16 if precision == "bf16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16
    shapes = product_shapes(model) if model is not None else []
    is_small = sum(wide * narrow for wide, narrow in shapes) < MEASURED_PRODUCT * max(1, len(shapes))
    return torch.float32 if is_small or bf16_gain(shapes) < CLEAR_GAIN else torch.bfloat16


def product_shapes(model: nn.Module) -> list[tuple[int, int]]:
    """(out, in) of each product of a model's blocks."""
    products = (each for name, each in model.named_modules() if "blocks." in name and isinstance(each, nn.Linear))
    return [(each.out_features, each.in_features) for each in products]


def bf16_gain(shapes: Iterable[tuple[int, int]], rows: int | None = None) -> float:
    """How many times as fast this CPU multiplies `rows` rows by weights of these shapes (out, in) in bf16 as in fp32.

    Measured once for each different shape, in the processor time of one thread, which other processes hardly change.
    Without `rows` there are as many as take some 0.2 s in all.
    """
    counts = Counter((min(wide, MEASURED_WIDTH), narrow) for wide, narrow in shapes)
    size = sum(wide * narrow for wide, narrow in counts)
    rows = rows or min(256, max(32, int(MEASURED_OPERATIONS / max(1, 2 * size)) // 32 * 32))
    threads = torch.get_num_threads()
    use_threads(1)
    try:
        seconds = [(count, *_seconds(shape, rows)) for shape, count in counts.items()]
    finally:
        use_threads(threads)
    fp32, bf16 = (sum(each[0] * each[place] for each in seconds) for place in (1, 2))
    return fp32 / bf16 if bf16 else 1.0


@torch.inference_mode()
def _seconds(shape: tuple[int, int], rows: int) -> tuple[float, float]:
    """Of the fastest of a few products in fp32 and bf16, by turns: what slows a core down for a while meets both."""
    fastest = {torch.float32: math.inf, torch.bfloat16: math.inf}
    operands = {dtype: (torch.ones(rows, shape[1], dtype=dtype), torch.ones(shape, dtype=dtype)) for dtype in fastest}
    for _ in range(MEASURED_TURNS):
        for dtype, (x, weight) in operands.items():
            started = time.thread_time()
            F.linear(x, weight)
            fastest[dtype] = min(fastest[dtype], time.thread_time() - started)
    return fastest[torch.float32], fastest[torch.bfloat16]


def device_memory(device: torch.device) -> int:
    """Bytes of a GPU, or of the machine as far as this process's control group may take them."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [Path(name).read_text().strip() for name in CGROUP_LIMITS if Path(name).is_file()]
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *(int(limit) for limit in limits if limit.isdigit())])


def threads_for(parameters: int) -> int:
    """The torch threads for a model of this many parameters."""
    return 1 if parameters <= SMALL_MODEL else os.cpu_count() or 1


def use_threads(count: int) -> None:
    """Set the torch threads of the calling thread.

    Each thread that runs a model sets its own, or models of one process would share the last setting.
    """
    if torch.get_num_threads() != count:  # only after this read does torch keep a count for this thread
        torch.set_num_threads(count)


def configure_cpu() -> None:
    """Settings for faster steps on a CPU; call it before torch starts its threads, which inherit the first of them."""
    torch.set_flush_denormal(True)  # probabilities fade below what a CPU multiplies at full speed
    if sys.platform != "linux":
        return
    # Every step frees and allocates the same blocks: glibc keeps them, for each fresh page costs a fault.
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give nothing back
        libc.mallopt(-4, 0)  # M_MMAP_MAX: take no block straight from the system
