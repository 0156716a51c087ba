"""Eight adapters on one base: a mixed batch beside one adapter's, memory, and a swap: `python -m benchmarks.adapters`.

The base is SmolLM2-135M-Instruct of the extra `bases`; the adapters have rank 16 and random pairs. Both batches are
measured in turn, decode steps alone; the swap is the load of an adapter whose base is in memory.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.base import gguf_path

ADAPTERS, RANK, ROWS, PROMPT, TOKENS = 8, 16, 32, 32, 16


def make_adapters(folder: Path, home: Path) -> list[Path]:
    """Folders of adapters with random pairs, of the base in a folder."""
    import torch

    from components.models.base_store import store_base
    from components.models.checkpoint import load_decoder, save_decoder
    from components.models.lora import add_lora, low_rank_products

    base, files = store_base(folder, home, "smollm2/1"), {"agent.json": '{"tools": [], "max_steps": 1}'}
    folders = []
    for number in range(ADAPTERS):
        model = load_decoder(folder)
        torch.manual_seed(number)
        add_lora(model, RANK, float(RANK), base=base)
        for product, _ in low_rank_products(model):
            torch.nn.init.normal_(product.lora_b, std=0.02)
        folders.append(folder.parent / f"adapter-{number}")
        save_decoder(model, folders[-1], folder, dict(files))
    return folders


def measure(folders: list[Path], rounds: int) -> dict[str, float]:
    """Tokens per second of both batches, memory in MB, seconds of a swap."""
    from components.config.params import load_params
    from components.config.paths import Paths, find_root
    from serving.engine.local import LocalEngine

    config = load_params(Paths(find_root()).params).serve.model_copy(
        update={"max_running": ROWS, "max_context_tokens": 128}
    )
    engines, seconds, resident = [], [], []
    for number, folder in enumerate(folders):
        began = time.perf_counter()
        engines.append(LocalEngine.load(folder, f"adapter/{number}", config))
        seconds.append(time.perf_counter() - began)
        gc.collect()
        resident.append(_resident())
    numbers = [engine.adapter for engine in engines]
    speeds: dict[str, list[float]] = {"one adapter": [], "eight adapters": []}
    for _ in range(rounds):
        for name, chosen in (("one adapter", numbers[:1]), ("eight adapters", numbers)):
            speeds[name].append(_decode(engines[0], chosen))
    size = sum(file.stat().st_size for folder in folders for file in folder.glob("adapter_model.safetensors"))
    single, mixed = (statistics.median(values) for values in speeds.values())
    ratio = statistics.median(b / a for a, b in zip(*speeds.values(), strict=True))
    for engine in engines:
        engine.close()
    return {
        "one adapter, tokens/s": single,
        "eight adapters, tokens/s": mixed,
        "eight to one": ratio,
        "process with one adapter, MB": resident[0] / 1e6,
        "process with eight, MB": resident[-1] / 1e6,
        "seven adapters' files, MB": size / ADAPTERS * (ADAPTERS - 1) / 1e6,
        "load with the base, s": seconds[0],
        "load of another adapter, s": statistics.median(seconds[1:]),
    }


def _decode(engine: object, numbers: list[int]) -> float:
    """Tokens per second of the decode steps of ROWS rows that choose among adapters in turn."""
    from components.inference.batching import Row
    from serving.engine.local import LocalEngine

    assert isinstance(engine, LocalEngine)
    batch = engine.router.schedulers[0].slots
    rows = [
        Row([(7 * row + index) % 1000 + 1 for index in range(PROMPT)], TOKENS + 1, adapter=numbers[row % len(numbers)])
        for row in range(ROWS)
    ]
    waiting = list(rows)
    while waiting or batch.prefilling:
        if not batch.prefilling:
            count = batch.group(waiting)
            batch.admit(waiting[:count])
            del waiting[:count]
        batch.prefill()
    began, tokens = time.perf_counter(), 0
    while batch.decoding and not rows[0].finished:
        tokens += len(batch.decode())
    seconds = time.perf_counter() - began
    batch.clear()
    return tokens / seconds


def _resident() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    from components.tracking.model_import import unpacked

    file = gguf_path()
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch) / "home"
        os.environ["LOOPWRIGHT_HOME"] = str(home)
        with unpacked(file, home) as folder:
            shutil.copytree(folder, base := Path(scratch) / "base")
        for name, value in measure(make_adapters(base, home), arguments.rounds).items():
            print(f"{name:<32} {value:9.2f}")


if __name__ == "__main__":
    main()
