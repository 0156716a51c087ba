"""`loopwright plan` beside trainings of three sizes: `python -m benchmarks.plan`.

For a project whose `data/tokens/decoder` is there (`loopwright run --until prepare@decoder`); its files stay as they
are. Machine and trainings are measured in processor time of one thread, which varies less on a shared machine than the
clock: steps and checkpoints, without a stage's start, the held-out loss behind the training and MLflow. The machine is
measured before and after each training, for its speed may change by a third within minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

SIZES: tuple[tuple[int, dict[str, int]], ...] = (
    (120, {}),
    (60, {"embed_dim": 384, "num_layers": 6, "num_heads": 6, "num_kv_heads": 6, "hidden_dim": 1024}),
    (16, {"embed_dim": 768, "num_layers": 12, "num_heads": 12, "num_kv_heads": 4, "hidden_dim": 2048}),
)
"""Steps, of which the first is slower than the rest, and what of the decoder's shape differs from the project's."""
NEEDED = ("components", "examples", "dvc.yaml", "data/tokens", "data/tokenizer", "data/imported", "data/added")


def overrides(steps: int, shape: dict[str, int]) -> dict[str, Any]:
    """Of params.yaml."""
    return {"pretrain.decoder.max_steps": steps} | {f"model.decoder.{key}": value for key, value in shape.items()}


def measure() -> None:
    """Print this machine, and what it plans for each size, in processor seconds."""
    from components.config.params import load_params
    from components.training import plan

    with patch.object(time, "perf_counter", time.process_time):
        machine = plan.measure_machine(load_params(Path("params.yaml")).pretrain.decoder, print)
    seconds = []
    for size in SIZES:
        params = load_params(Path("params.yaml"), overrides(*size))
        (stage,) = (stage for stage in plan.plan(params, machine) if stage.stage == "pretrain@decoder")
        # The start was measured by the clock of a process that waits.
        seconds.append(((stage.seconds or 0.0) - machine.start_seconds, stage.parameters))
    print(json.dumps(seconds))


def train() -> None:
    """Run the stage in this process and print the processor seconds of its steps and checkpoints."""
    from components.runtime import stage
    from components.training import pretrain
    from components.training.loop import train as run_loop

    cpu_seconds = 0.0

    def timed(*arguments: Any) -> Any:
        nonlocal cpu_seconds
        began = time.process_time()
        measured = run_loop(*arguments)
        cpu_seconds = time.process_time() - began
        return measured

    sys.argv[1:] = ["pretrain@decoder"]
    with patch.object(pretrain, "train", timed):
        try:
            stage.main()
        except SystemExit as ended:
            if ended.code:
                raise
    print(json.dumps(cpu_seconds))


def child(root: Path, *words: str) -> Any:
    """The JSON of the last line that this module prints in a process of its own."""
    settings = {"OMP_NUM_THREADS": "1", "LOOPWRIGHT_FORCE": "1", "LOOPWRIGHT_HOME": str(root / "var")}
    environment = {**os.environ, **settings, "PYTHONPATH": str(Path(__file__).parents[1])}
    line = [sys.executable, "-m", "benchmarks.plan", *words]
    ended = subprocess.run(line, cwd=root, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ended.stdout.splitlines()[-1])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=__doc__)
    parser.add_argument("--child", choices=("measure", "train"), help=argparse.SUPPRESS)
    child_of = parser.parse_args().child
    if child_of:
        (measure if child_of == "measure" else train)()
        return
    from components.config.paths import find_root
    from components.runtime.params_file import write_params

    project = find_root()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in NEEDED:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).symlink_to(project / name)
        (root / "params.yaml").write_bytes((project / "params.yaml").read_bytes())
        measured = [child(root, "--child", "measure")]
        for number, size in enumerate(SIZES):
            (root / "params.yaml").write_bytes((project / "params.yaml").read_bytes())
            write_params(root / "params.yaml", overrides(*size), lambda _line: None)
            taken = child(root, "--child", "train")
            (root / "params.yaml").write_bytes((project / "params.yaml").read_bytes())
            measured.append(child(root, "--child", "measure"))
            parameters, seconds = measured[0][number][1], sum(each[number][0] for each in measured[-2:]) / 2
            print(
                f"{parameters / 1e6:5.1f} M: planned {seconds:.1f} s, took {taken:.1f} s: {seconds / taken:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
