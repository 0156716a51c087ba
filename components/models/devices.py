"""Device, precision and threads of a model, and settings of the CPU."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Iterable

import torch
from torch.nn import functional

SMALL_MODEL = 50_000_000
"""Parameters up to which one torch thread beats several: waking threads costs more than the products."""


MIN_GAIN, TRIALS = 1.1, 5
"""How much faster than fp32 bf16 has to be to be picked, and repetitions of the measurement."""


def best_device() -> torch.device:
    """The GPU, where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of `precision`; for "auto", bf16 where this machine multiplies it faster than fp32.

    On a CPU that takes AMX's tiles: AVX512's own bf16 product was measured at half the rate of fp32.
    """
    if precision != "auto":
        return torch.bfloat16 if precision == "bf16" else torch.float32
    fast = device.type == "cuda" or bool(torch.cpu.get_capabilities().get("amx_bf16"))
    return torch.bfloat16 if fast else torch.float32


def fastest_dtype(shapes: Iterable[tuple[int, int]], rows: int, device: torch.device) -> torch.dtype:
    """bf16 where it multiplies `rows` rows by weights of these shapes (out, in) faster than fp32; else fp32.

    On a CPU it is measured, in turn with fp32, on the calling thread's torch threads; each different shape once. A
    CUDA device's answer is bf16.
    """
    fast = device.type == "cuda" or bf16_gain(shapes, rows) > MIN_GAIN
    return torch.bfloat16 if fast else torch.float32


@torch.inference_mode()
def bf16_gain(shapes: Iterable[tuple[int, int]], rows: int) -> float:
    """Seconds of products in fp32 over those in bf16 on this CPU, the fewest of several rounds for each."""
    seconds = {torch.float32: 0.0, torch.bfloat16: 0.0}
    for wide, narrow in sorted(set(shapes)):
        operands = {
            dtype: (torch.ones(rows, narrow, dtype=dtype), torch.ones(wide, narrow, dtype=dtype)) for dtype in seconds
        }
        rounds: dict[torch.dtype, list[float]] = {dtype: [] for dtype in seconds}
        for _ in range(TRIALS):
            for dtype, (x, weight) in operands.items():
                started = time.perf_counter()
                functional.linear(x, weight)
                rounds[dtype].append(time.perf_counter() - started)
        for dtype in seconds:
            seconds[dtype] += min(rounds[dtype])
    return seconds[torch.float32] / seconds[torch.bfloat16]


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
