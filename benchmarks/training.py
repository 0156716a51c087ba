"""Training speed beside its peers: `python -m benchmarks.training` (in `make bench`).

Equal parameter counts, AdamW on every side, one process, rounds interleaved, medians reported.
The GPT-2-style peer is written here after nanoGPT's published design (github.com/karpathy/nanoGPT);
`--nanogpt DIR` takes a clone of the original instead, to check that both run at the same speed.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.runtime.stage import ENVIRONMENT

if TYPE_CHECKING:
    import torch

VOCAB, WIDTH, LAYERS, HEADS, HIDDEN = 2048, 192, 4, 3, 512
ROWS, LENGTH = 8, 256
STEPS = 6
"""Steps timed per round."""

Step = Callable[["torch.Tensor"], None]


@dataclass(frozen=True)
class Peer:
    """Something that can take a training step on ids (ROWS, LENGTH + 1)."""

    name: str
    parameters: int
    step: Step


def ours(optimizer: str) -> Peer:
    """The very loop of `pretrain`: objective, clipping, optimizer and precision as the stage has them."""
    import torch

    from components.config.model_settings import TrainConfig
    from components.models.decoder import Decoder, DecoderConfig
    from components.models.devices import compute_dtype
    from components.training.loop import Training
    from components.training.objectives import causal_lm

    shape = DecoderConfig(
        VOCAB, WIDTH, LAYERS, HEADS, HEADS, WIDTH // HEADS, HIDDEN, LENGTH, qk_norm=True, tie_embeddings=True
    )
    settings = {
        "dataset": "random", "optimizer": optimizer, "max_steps": 10**6, "global_batch_size": ROWS,
        "micro_batch_size": ROWS, "learning_rate": 1e-3, "muon_learning_rate": 0.01, "warmup_steps": 100,
        "decay_share": 0.0, "weight_decay": 0.1, "max_grad_norm": 1.0, "precision": "auto", "compile": "off",
        "activation_checkpointing": "none", "checkpoint_seconds": 3600, "log_steps": 10,
    }  # fmt: skip
    model = Decoder(shape)
    dtype = compute_dtype("auto", torch.device("cpu"), model)
    training = Training(model.to(dtype), causal_lm, TrainConfig.model_validate(settings), seed=0)
    whole = {
        "segment_ids": torch.ones(ROWS, LENGTH, dtype=torch.long),
        "position_ids": torch.arange(LENGTH).expand(ROWS, -1).contiguous(),
    }

    def step(ids: torch.Tensor) -> None:
        training.train_step([{**whole, "input_ids": ids[:, :-1], "labels": ids[:, 1:]}])

    precision = str(dtype).removeprefix("torch.")
    return Peer(f"Loopwright, {optimizer}, {precision}", model.num_parameters, step)


def gpt2(autocast: bool, clone: Path | None) -> Peer:
    """nanoGPT's model and step: learned positions, LayerNorm, a GELU feed-forward, flash attention, all logits."""
    import torch

    torch.manual_seed(0)
    model = _clone_of_nanogpt(clone) if clone else _gpt2_model()
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    others = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    # As it ships: torch's fused AdamW on CUDA alone.
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    precision = "bfloat16 autocast" if autocast else "float32"
    name = f"nanoGPT{'' if clone else ' (our writing)'}, {precision}"
    return _autograd_peer(name, model, optimizer, autocast, lambda ids: model(ids[:, :-1], ids[:, 1:].contiguous())[1])


def hugging_face_llama() -> Peer:
    """transformers' Llama of our shape under bf16 autocast, with torch's fused AdamW."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=LENGTH,
        tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)

    def loss(ids: torch.Tensor) -> Any:
        return model(input_ids=ids[:, :-1], labels=ids[:, :-1], shift_labels=ids[:, 1:].contiguous()).loss

    return _autograd_peer("Hugging Face Llama, bfloat16 autocast", model, optimizer, True, loss)


def _autograd_peer(name: str, model: Any, optimizer: Any, autocast: bool, loss: Callable[[Any], Any]) -> Peer:
    import torch

    def step(ids: torch.Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            value = loss(ids)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Peer(name, sum(weight.numel() for weight in model.parameters()), step)


def _gpt2_model() -> Any:
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before_attention = nn.LayerNorm(WIDTH, bias=False)
            self.attention_in = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
            self.attention_out = nn.Linear(WIDTH, WIDTH, bias=False)
            self.before_mlp = nn.LayerNorm(WIDTH, bias=False)
            self.mlp_in = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
            self.mlp_out = nn.Linear(4 * WIDTH, WIDTH, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows, length, _ = x.shape
            thirds = self.attention_in(self.before_attention(x)).split(WIDTH, dim=2)
            q, k, v = (third.view(rows, length, HEADS, -1).transpose(1, 2) for third in thirds)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.attention_out(mixed.transpose(1, 2).contiguous().view(rows, length, WIDTH))
            added: torch.Tensor = self.mlp_out(F.gelu(self.mlp_in(self.before_mlp(x))))
            return x + added

    class GPT2(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.places = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LENGTH, WIDTH)
            self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
            self.last = nn.LayerNorm(WIDTH, bias=False)
            for weight in self.parameters():
                if weight.dim() > 1:
                    nn.init.normal_(weight, std=0.02)

        def forward(self, ids: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
            for layer in self.layers:
                x = layer(x)
            logits = F.linear(self.last(x), self.tokens.weight)
            return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return GPT2()


def _clone_of_nanogpt(clone: Path) -> Any:
    spec = importlib.util.spec_from_file_location("nanogpt_model", clone / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    config = module.GPTConfig(
        block_size=LENGTH, vocab_size=VOCAB, n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH, dropout=0.0, bias=False
    )
    with redirect_stdout(io.StringIO()):
        return module.GPT(config)


def measure(peers: list[Peer], rounds: int) -> dict[str, list[float]]:
    """Tokens per second of each peer, one figure per round; the peers take turns within a round."""
    import torch

    speeds: dict[str, list[float]] = {peer.name: [] for peer in peers}
    random = torch.Generator().manual_seed(0)
    for number in range(rounds + 1):
        for peer in peers:
            batches = [torch.randint(0, VOCAB, (ROWS, LENGTH + 1), generator=random) for _ in range(STEPS)]
            started = time.perf_counter()
            for ids in batches:
                peer.step(ids)
            if number:  # the first round warms up
                speeds[peer.name].append(STEPS * ROWS * LENGTH / (time.perf_counter() - started))
    return speeds


def product_rates(rounds: int) -> dict[str, float]:
    """GFLOP/s of a square product, the median of rounds."""
    import torch

    size, rates = 1536, {}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        a @ b
        seconds = []
        for _ in range(2 * rounds + 1):
            started = time.perf_counter()
            a @ b
            seconds.append(time.perf_counter() - started)
        rates[name] = 2 * size**3 / statistics.median(seconds) / 1e9
    return rates


def flops_per_token(parameters: int) -> float:
    """6 per parameter, and 12 per layer, width and position for attention's two products (arXiv 2204.02311)."""
    return 6.0 * parameters + 12.0 * LAYERS * WIDTH * LENGTH


def run(rounds: int, clone: Path | None) -> dict[str, Any]:
    """Measure everything; the figures as one document."""
    import torch

    peers = [ours("adamw"), gpt2(False, clone), gpt2(True, clone), hugging_face_llama(), ours("muon")]
    rates = product_rates(rounds)
    speeds = measure(peers, rounds)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    reference = medians[peers[0].name]
    work = flops_per_token(peers[0].parameters) * reference / 1e9
    return {
        "machine": f"{_cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "product_gflops": {name: round(rate, 1) for name, rate in rates.items()},
        "share_of_bf16_product_rate": round(work / rates["bfloat16"], 3),
        "share_of_fp32_product_rate": round(work / rates["float32"], 3),
        "peers": [
            {
                "name": peer.name,
                "parameters": peer.parameters,
                "tokens_per_second": round(medians[peer.name]),
                "lowest": round(min(speeds[peer.name])),
                "highest": round(max(speeds[peer.name])),
                "ours_is": round(reference / medians[peer.name], 2),
            }
            for peer in peers
        ],
    }


def table(figures: dict[str, Any], rounds: int) -> str:
    """The figures for a person."""
    lines = [
        f"Training speed, {ROWS} x {LENGTH} tokens a step, medians of {rounds} interleaved rounds",
        figures["machine"],
        "",
        "| peer | parameters | tokens/s | lowest to highest | Loopwright with AdamW is |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {peer['name']} | {peer['parameters']:,} | {peer['tokens_per_second']:,} |"
        f" {peer['lowest']:,} to {peer['highest']:,} | {peer['ours_is']:.2f} x |"
        for peer in figures["peers"]
    ]
    rates = figures["product_gflops"]
    lines += [
        "",
        f"A {rates['bfloat16']:.0f} GFLOP/s bf16 and {rates['float32']:.0f} GFLOP/s fp32 product rate was measured;"
        f" Loopwright with AdamW reaches {figures['share_of_bf16_product_rate']:.0%} of the former,"
        f" {figures['share_of_fp32_product_rate']:.0%} of the latter.",
    ]
    return "\n".join(lines)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    name = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    flags = next((line for line in lines if line.startswith("flags")), "")
    has = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags.split()]
    return f"{name} ({', '.join(has) or 'no bf16 products'})"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Training speed beside nanoGPT and Hugging Face, on this CPU.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="a clone of nanoGPT to run in place of our writing")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    options = parser.parse_args()
    for variable, value in ENVIRONMENT.items():  # as the stages run; before torch reads it
        os.environ.setdefault(variable, value)
    from components.models.devices import configure_cpu

    configure_cpu()
    figures = run(options.rounds, options.nanogpt)
    print(json.dumps(figures, indent=2) if options.json else table(figures, options.rounds))


if __name__ == "__main__":
    main()
