"""Memory that a step of the optimizer needs: `python -m benchmarks.step_memory`.

The decoder of 124 million parameters with gradients of random numbers, in a process for each optimizer and dtype of the
weights. In bytes a parameter: what stays between two steps (weights, fp32 masters, gradients, states), and the peak of
resident memory over the step, which Linux reports and resets.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
from pathlib import Path

import torch

from benchmarks.gpu import SIZES, train_config
from components.models.decoder import Decoder, DecoderConfig
from components.training.optimizers import Masters, build_optimizers, scale_and_clip

RUNS = [("muon", "float32"), ("muon", "bfloat16"), ("adamw", "float32"), ("adamw", "bfloat16")]


def _resident(line: str) -> int:
    """`VmRSS` or `VmHWM` of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{line}:", 1)[1].split(None, 1)[0])


def step_memory(shape: DecoderConfig, optimizer: str, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a parameter: held between steps, and at the peak of the second."""
    before = _resident("VmRSS")
    model = Decoder(shape).to(dtype)
    masters = Masters(model)
    trained = list(masters.trained().values())
    optimizers = build_optimizers(model, masters, train_config(optimizer, 1), dtype)
    held = 0
    for _ in range(2):
        for weight in model.parameters():
            weight.grad = torch.randn_like(weight)
        masters.collect()
        gc.collect()
        held = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        scale_and_clip(trained, 1.0, 1.0)
        for part in optimizers:
            part.step(1.0)
        masters.publish()
        for weight in trained:
            weight.grad = None
    return (held - before) / model.num_parameters, (_resident("VmHWM") - before) / model.num_parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="124 M", choices=[size.name for size in SIZES])
    shape = next(size.shape for size in SIZES if size.name == parser.parse_args().size)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back to the system, and is not counted
    print("optimizer  weights    held  peak, bytes a parameter")
    for optimizer, dtype in RUNS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            held, peak = pool.apply(step_memory, (shape, optimizer, getattr(torch, dtype)))
        print(f"{optimizer:<9}  {dtype:<9}  {held:4.1f}  {peak:4.1f}", flush=True)


if __name__ == "__main__":
    main()
