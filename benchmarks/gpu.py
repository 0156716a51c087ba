"""What one GPU makes of training and decoding, in some eight minutes: `python -m benchmarks.gpu [--out FILE]`.

Steps of training in bf16, plain and compiled, at 124 M, 350 M and 1.15 B parameters, with their share of the device's
peak (MFU); packed documents without a mask and with a dense one; activation checkpointing; LoRA on a base in bf16, int8
and NF4; decode steps as CUDA graphs and without; the engine beside transformers; a cache allocated whole beside
a paged one; the kernels that attention runs. Weights and tokens are random. Without a CUDA device it says so;
`--miniature` runs what a CPU can, on models of a few thousand parameters, to show that the script itself works.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

import numpy as np
import torch

from components.config.errors import InputError
from components.config.model_settings import Checkpointing, TrainConfig
from components.inference import cache_plan
from components.inference.batching import ContinuousBatch, Row
from components.inference.decode_step import Step
from components.inference.device_memory import paging_driver
from components.inference.slot_cache import SlotCache
from components.models import decoder
from components.models.decoder import Decoder, DecoderConfig
from components.models.devices import best_device
from components.models.lora import add_lora, quantize_base
from components.training.loop import Training, compute_in
from components.training.objectives import causal_lm

PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Dense products in bf16, operations a second, from the vendor's data sheets."""
TIMED_STEPS, RANK = 8, 16
DOCUMENTS = 8
"""Of a packed row."""
CHECKPOINTING: tuple[Checkpointing, ...] = ("selective", "full")
DECODED_ROWS, PROMPT, DECODED = (1, 8, 32), 64, 64
MASKS = {"no mask": False, "dense mask": True}
ATTENTION_WORDS = ("flash", "fmha", "attention", "sdpa", "softmax")
"""Of a kernel's name."""


class Size(NamedTuple):
    """A decoder, and the rows of its training step."""

    name: str
    shape: DecoderConfig
    rows: int
    length: int


def _size(name: str, rows: int, length: int, width: int, layers: int, heads: tuple[int, int], hidden: int) -> Size:
    shape = DecoderConfig(
        32_768 if rows > 2 else 256, width, layers, *heads, width // heads[0], hidden, length,
        qk_norm=True, tie_embeddings=True,
    )  # fmt: skip
    return Size(name, shape, rows, length)


SIZES = (
    _size("124 M", 64, 1024, 768, 16, (12, 4), 2048),
    _size("350 M", 32, 1024, 1024, 28, (16, 4), 2816),
    _size("1.15 B", 16, 2048, 2048, 24, (32, 8), 5632),
)
MINIATURE = (_size("miniature", 2, 32, 64, 2, (4, 2), 128),)
Check = tuple[str, Callable[[], str]]
"""What is measured, and the function that measures it and returns its figures in words."""


def train_config(optimizer: str, rows: int, **settings: object) -> TrainConfig:
    """Of a training on random tokens."""
    values = {
        "dataset": "random", "optimizer": optimizer, "max_steps": 10**6, "global_batch_size": rows,
        "micro_batch_size": rows, "learning_rate": 1e-4, "muon_learning_rate": 0.001, "warmup_steps": 100,
        "decay_share": 0.0, "weight_decay": 0.1, "max_grad_norm": 1.0, "precision": "bf16", "compile": "off",
        "checkpoint_seconds": 3600, "log_steps": 10, "activation_checkpointing": "none",
    }  # fmt: skip
    return TrainConfig.model_validate({**values, **settings})


def training_flops(shape: DecoderConfig, parameters: int, length: int) -> float:
    """Operations of a training step for each token: 6 a weight that is multiplied by, and attention's products.

    (PaLM, arXiv 2204.02311, appendix B.) The tied embedding counts once, as the head; a token sees half of the others.
    """
    return 6.0 * parameters + 6.0 * shape.num_layers * shape.num_heads * shape.head_dim * length


def product_rate(device: torch.device) -> float:
    """Operations a second of large bf16 products, the best of a few rounds."""
    side = 8192 if device.type == "cuda" else 256
    x = torch.ones(side, side, dtype=torch.bfloat16, device=device)
    return max(2 * side**3 / _seconds(lambda: x @ x, device) for _ in range(8))


def _seconds(act: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    act()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class Bench:
    """The checks of a device, each on models of its own."""

    def __init__(self, device: torch.device, sizes: tuple[Size, ...]) -> None:
        self.device, self.sizes = device, sizes
        name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        self.name = name
        self.peak = next((rate for word, rate in PEAKS.items() if word in name), None)
        self.rate = product_rate(device)

    def checks(self) -> Iterator[Check]:
        """In order of what matters most, for time may end."""
        cuda = self.device.type == "cuda"
        for size in self.sizes:
            for compiled in (False, True) if cuda else (False,):
                how = "compiled" if compiled else "plain"
                yield f"train {size.name}, AdamW, {how}", lambda size=size, on=compiled: self.train(size, "adamw", on)
        first, last = self.sizes[0], self.sizes[-1]
        for how, dense in MASKS.items():
            yield f"train {first.name}, {DOCUMENTS} documents a row, {how}", lambda on=dense: self.packed(first, on)
        for kind in CHECKPOINTING:
            yield f"train {last.name}, checkpointing {kind}", lambda kind=kind: self.train(last, "adamw", cuda, kind)
        for size in {first.name: first, last.name: last}.values():
            yield f"decode {size.name}", lambda size=size: self.decode(size)
            yield f"cache of keys and values {size.name}", lambda size=size: self.cache(size)
        for kind in ("none", "int8", "nf4") if cuda else ("none",):
            yield f"LoRA {last.name}, base {kind}", lambda kind=kind: self.lora(last, kind)
        yield f"train {first.name}, Muon", lambda: self.train(first, "muon", cuda)
        for how, dense in MASKS.items():
            yield f"kernels of attention, {first.name}, {how}", lambda on=dense: self.kernels(first, on)

    def trained(
        self,
        size: Size,
        optimizer: str,
        compiled: bool,
        quantized: str | None = None,
        checkpointing: Checkpointing = "none",
        documents: int = 1,
    ) -> Callable[[], object]:
        """A step of training on random tokens, so many documents a row; with `quantized`, LoRA over such a base."""
        config = train_config(
            optimizer, size.rows, compile="on" if compiled else "off", activation_checkpointing=checkpointing
        )
        torch.manual_seed(0)
        model = Decoder(size.shape)
        if quantized:
            add_lora(model, RANK, float(RANK))
        compute_in(model, config, self.device, torch.bfloat16)
        if quantized in ("int8", "nf4"):
            kind: Literal["int8", "nf4"] = "int8" if quantized == "int8" else "nf4"
            quantize_base(model, kind)
        training = Training(model.train(), causal_lm, config, seed=0)
        ids = torch.randint(0, size.shape.vocab_size, (size.rows, size.length + 1), device=self.device)
        positions = torch.arange(size.length, device=self.device).expand(size.rows, -1)
        longest = size.length // documents
        batch = {
            "input_ids": ids[:, :-1],
            "labels": ids[:, 1:],
            "segment_ids": positions // longest + 1,
            "position_ids": positions % longest,
        }
        return lambda: training.train_step([batch])

    def train(self, size: Size, optimizer: str, compiled: bool, checkpointing: Checkpointing = "none") -> str:
        """Tokens a second, MFU by the data sheet and by the measured rate, and peak memory."""
        speed, memory = self.speed(self.trained(size, optimizer, compiled, None, checkpointing), size)
        with torch.device("meta"):  # counted without their memory
            parameters = Decoder(size.shape).num_parameters
        operations = speed * training_flops(size.shape, parameters, size.length)
        sheet = f"{operations / self.peak:.3f}" if self.peak else "unknown peak"
        return f"{speed:,.0f} tokens/s, MFU {sheet} ({operations / self.rate:.3f} of measured products), {memory}"

    def packed(self, size: Size, dense: bool) -> str:
        """Tokens a second and peak memory with several documents a row, whose mask may be dense."""
        with masked(dense):
            step = self.trained(size, "adamw", self.device.type == "cuda", documents=DOCUMENTS)
            speed, memory = self.speed(step, size)
        return f"{speed:,.0f} tokens/s, {memory}"

    def lora(self, size: Size, quantized: str) -> str:
        speed, memory = self.speed(self.trained(size, "adamw", False, quantized), size)
        return f"{speed:,.0f} tokens/s, {memory}"

    def speed(self, step: Callable[[], object], size: Size) -> tuple[float, str]:
        """Tokens a second, the median of steps behind two that warm up; peak memory."""
        for _ in range(2):
            step()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = statistics.median(_seconds(step, self.device) for _ in range(TIMED_STEPS))
        peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if self.device.type == "cuda" else "CPU memory"
        return size.rows * size.length / seconds, peak

    @torch.inference_mode()
    def decode(self, size: Size) -> str:
        """Tokens a second of decode steps, as CUDA graphs and without, of the engine, and of transformers."""
        torch.manual_seed(0)
        model = Decoder(size.shape).to(self.device, torch.bfloat16).eval()
        context = min(size.length, PROMPT + DECODED + 16)
        steps = max(2, min(DECODED, context - 20))
        figures = []
        for rows in DECODED_ROWS:
            cache = SlotCache(model, max(rows, 4), context, paged=False)
            graphs, plain = (
                self.stepping(Step(model, cache.whole, captured), rows, steps) for captured in (True, False)
            )
            parts = [f"graphs {graphs:,.0f}" if self.device.type == "cuda" else "no CUDA graphs", f"plain {plain:,.0f}"]
            parts.append(f"engine {self.engine(model, rows, context, steps):,.0f}")
            parts.append(f"transformers {self.transformers(size, rows, steps):,.0f}")
            figures.append(f"{rows} rows: {', '.join(parts)}")
        return "tokens/s, " + "; ".join(figures)

    def stepping(self, step: Step, rows: int, steps: int) -> float:
        padded = max(rows, 4)
        tokens = np.ones(padded, np.int64)

        def act() -> None:
            for position in range(steps):
                places = np.full(padded, position)
                step(tokens, places, places, position + 1, padded)

        act()
        return rows * steps / min(_seconds(act, self.device) for _ in range(3))

    def engine(self, model: Decoder, rows: int, context: int, steps: int) -> float:
        batch = ContinuousBatch(model, max(rows, 4), context)
        prompt = min(PROMPT, context - steps - 2)
        speeds = []
        for _ in range(3):
            batch.clear()
            waiting = [Row(list(range(3, 3 + prompt)), steps + 1) for _ in range(rows)]
            while waiting or batch.prefilling:
                if waiting and not batch.prefilling:
                    count = batch.group(waiting)
                    batch.admit(waiting[:count])
                    del waiting[:count]
                batch.prefill()
            speeds.append(
                rows * (steps - 1) / _seconds(lambda: [batch.decode() for _ in range(steps - 1)], self.device)
            )
        return max(speeds)

    @torch.inference_mode()
    def cache(self, size: Size) -> str:
        """A cache allocated whole and one whose memory is paged: memory in use, tokens a second, and their tokens."""
        torch.manual_seed(0)
        model = Decoder(size.shape).to(self.device, torch.bfloat16).eval()
        driver = paging_driver(self.device)
        figures, answers, steps = [], [], min(DECODED, size.length // 4)
        for name, used in (("allocated whole", None), ("paged" if driver else "whole again", driver)):
            before, least = self.free(), [self.free()]
            with mock.patch.object(cache_plan, "paging_driver", return_value=used):
                batch = ContinuousBatch(model, DECODED_ROWS[-1], size.length)
            answers.append(self.answers(batch, steps, lambda least=least: least.append(self.free())))  # captures graphs
            batch.clear()
            seconds = _seconds(lambda batch=batch: self.answers(batch, steps), self.device)
            memory = (before - min(least)) / 2**30
            figures.append(f"{name}: {batch.count * steps / seconds:,.0f} tokens/s, {memory:.2f} GiB more in use")
            del batch
        return "; ".join([*figures, "the same tokens" if answers[0] == answers[1] else "OTHER TOKENS"])

    def answers(self, batch: ContinuousBatch, steps: int, look: Callable[[], object] = int) -> list[list[int]]:
        """What a full batch of rows writes; `look` is called after each step."""
        rows = [Row([3 + (7 * row + place) % 200 for place in range(steps)], steps) for row in range(batch.count)]
        waiting = list(rows)
        while waiting or batch.free < batch.count:
            if waiting and not batch.prefilling:
                count = batch.group(waiting)
                batch.admit(waiting[:count])
                del waiting[:count]
            batch.advance()
            look()
        return [row.generated for row in rows]

    def free(self) -> int:
        """Bytes of the device that nobody has; 0 on a CPU."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self.device)[0])

    def transformers(self, size: Size, rows: int, steps: int) -> float:
        from transformers import Qwen3Config, Qwen3ForCausalLM

        c = size.shape
        config = Qwen3Config(
            vocab_size=c.vocab_size, hidden_size=c.embed_dim, intermediate_size=c.hidden_dim,
            num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads,
            head_dim=c.head_dim, max_position_embeddings=c.max_seq_len, tie_word_embeddings=True,
        )  # fmt: skip
        model: Any = Qwen3ForCausalLM(config).to(self.device, torch.bfloat16).eval()
        ids = torch.ones(rows, min(PROMPT, c.max_seq_len - steps - 2), dtype=torch.long, device=self.device)
        state = model(ids, logits_to_keep=1)

        def act() -> None:
            nonlocal state
            for _ in range(steps):
                tokens = state.logits[:, -1:].argmax(-1)
                state = model(tokens, cache=state.cache)

        return rows * steps / _seconds(act, self.device)

    def kernels(self, size: Size, dense: bool) -> str:
        """Names of the kernels of a training step that are attention's, by their time."""
        with masked(dense):
            return self._kernels(self.trained(size, "adamw", False, documents=DOCUMENTS))

    def _kernels(self, step: Callable[[], object]) -> str:
        step()
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=kinds) as profile:
            step()
            _wait(self.device)
        time_of = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        events = [
            event for event in profile.key_averages() if any(word in event.key.lower() for word in ATTENTION_WORDS)
        ]
        events.sort(key=lambda event: -getattr(event, time_of))
        return "; ".join(f"{event.key[:90]} {getattr(event, time_of) / 1000:.1f} ms" for event in events[:4]) or "none"


@contextmanager
def masked(dense: bool) -> Iterator[None]:
    """With `dense`, decoders make a dense mask also where they need none."""
    takes_packed = decoder.takes_packed
    if dense:
        decoder.takes_packed = lambda *_: False
    try:
        yield
    finally:
        decoder.takes_packed = takes_packed


def measure(bench: Bench, budget: float) -> list[str]:
    """The rows of the table; what fails says why, and what time does not allow is named."""
    started, lines = time.monotonic(), []
    for name, check in bench.checks():
        if time.monotonic() - started > budget:
            figures = f"not measured: {budget:.0f} s were over"
        else:
            try:
                figures = check()
            except (InputError, torch.OutOfMemoryError) as error:
                figures = f"not measured: {str(error).splitlines()[0]}"
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.compiler.reset()  # or compiled code of the models before counts against the limit of each function
        lines.append(f"| {name} | {figures} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=420.0, help="seconds after which no further check begins")
    parser.add_argument("--out", type=Path, help="write the table here, as Markdown")
    parser.add_argument("--miniature", action="store_true", help="tiny models on the CPU: shows that the script works")
    options = parser.parse_args()
    device = torch.device("cpu") if options.miniature else best_device()
    if device.type != "cuda" and not options.miniature:
        raise SystemExit("benchmarks.gpu: no CUDA device here; --miniature runs it on the CPU")
    bench = Bench(device, MINIATURE if options.miniature else SIZES)
    sheet = f"{bench.peak / 1e12:.0f}" if bench.peak else "unknown"
    header = [
        f"{bench.name}, torch {torch.__version__}: bf16 products {bench.rate / 1e12:.2f} TFLOP/s, data sheet {sheet}",
        "",
        "| check | figures |",
        "|---|---|",
    ]
    print("\n".join(header), flush=True)
    lines = measure(bench, options.budget)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("\n".join([*header, *lines]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
