"""How long training stops for a checkpoint: `python -m benchmarks.checkpoints --ranks 2`.

Ranks on this machine, gloo on CPUs, train a decoder of 124 M parameters (GPT-2's width and depth, AdamW, fp32) and save
checkpoints. Printed for each: the seconds that training stopped for it, and those until it was written and committed.
Each follows some seconds of steps, and the first steps run beside the thread that allocates the copies, as in a stage.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import tempfile
import time
from pathlib import Path

import torch

from components.config.params import load_params
from components.config.paths import Paths, find_root
from components.models.decoder import Decoder, DecoderConfig
from components.runtime.stage import StageRun
from components.tracking.event_log import NoTracker
from components.training.checkpoints import Checkpoints
from components.training.distributed import agreed, join, rank, shard, summed, wait_for_all, world_size
from components.training.loop import Training
from components.training.objectives import causal_lm
from flows.orchestration.prefect_server import free_port

VOCABULARY, LENGTH = 50_304, 16
DECODER = DecoderConfig(VOCABULARY, 768, 12, 12, 12, 64, 2048, LENGTH, qk_norm=True, tie_embeddings=True)
SECONDS = 5.0
"""Of steps before a checkpoint: the least `checkpoint_seconds` of any scale."""


def new_training(folder: Path) -> Training[Decoder]:
    """A training whose optimizer has its states."""
    settings = {"optimizer": "adamw", "global_batch_size": world_size(), "micro_batch_size": 1, "precision": "fp32"}
    overrides = {f"pretrain.decoder.{key}": value for key, value in settings.items()}
    params = load_params(Paths(find_root()).params, {"scale": "smoke"} | overrides)
    run, config = StageRun("pretrain@decoder", params, Paths(folder), folder, NoTracker()), params.pretrain.decoder
    torch.manual_seed(0)
    model = Decoder(DECODER)
    if world_size() > 1:
        model = shard(run, model, config, torch.device("cpu"), torch.float32)
    return Training(model.train(), causal_lm, config, 0, dtype=torch.float32)


def measure(number: int, ranks: int, port: int, folder: Path, count: int) -> None:
    """Be one rank; rank 0 prints."""
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    join()
    training, checkpoints = new_training(folder), Checkpoints(folder)
    ids = torch.arange(LENGTH)[None]
    batch = {"input_ids": ids, "labels": ids, "segment_ids": torch.ones_like(ids), "position_ids": ids}
    if rank() == 0:
        parameters = sum(weight.numel() for weight in Decoder(DECODER).parameters())
        print(
            f"{parameters / 1e6:.1f} M parameters, {ranks} ranks\ncheckpoint  stop in s  written after s  MB",
            flush=True,
        )
    checkpoints.prepare(training.state().tensors)
    for _ in range(count):
        begin, is_due = time.monotonic(), False
        while not is_due:
            training.train_step([batch])
            is_due = agreed(time.monotonic() > begin + SECONDS)
        wait_for_all()
        started = time.monotonic()
        checkpoints.save(training.state())
        stop = time.monotonic() - started
        prefix = f"step-{training.step:08d}-"
        while not (written := [*folder.glob(f"{prefix}shards/commit.json"), *folder.glob(f"{prefix}*.safetensors")]):
            time.sleep(0.02)
        seconds = time.monotonic() - started
        (total,) = summed(stop)
        if rank() == 0:
            path = written[0].parent if written[0].name == "commit.json" else written[0]
            size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))
            print(f"{training.step:10}  {total / ranks:9.2f}  {seconds:15.1f}  {size / 1e6:.0f}", flush=True)
    checkpoints.wait()
    wait_for_all()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="How long training stops for a checkpoint")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--count", type=int, default=3, help="checkpoints")
    parser.add_argument(
        "--folder", type=Path, help="where to write them; a folder in the system's one for temporary files"
    )
    words = parser.parse_args()
    port = free_port()
    folder = Path(tempfile.mkdtemp(dir=words.folder))
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=measure, args=(number, words.ranks, port, folder, words.count))
        for number in range(words.ranks)
    ]
    try:
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    finally:
        shutil.rmtree(folder)
    if any(process.exitcode for process in ranks):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
