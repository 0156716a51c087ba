"""The driver of a Ray job: `python -m components.runtime.ray_job STAGE RANKS ENVIRONMENT_FILE` runs a stage's ranks.

Each rank is a process like those of torchrun, which an actor starts on the node where Ray placed it. Where one is
killed, or its node dies, all start again from their last checkpoint, on as many devices as the cluster then has.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from components.runtime.launcher import FORCE, SECONDS_TO_END, Restarts, describe, is_kill
from components.runtime.ray_launcher import REFUSED, STDERR

_SECONDS_FOR_OTHERS = 5.0
"""For other ranks to end after one failed: which one was killed, and which lost its peer, shows then."""
_SECONDS_TO_KILL = 10.0
_SECONDS_TO_NOTICE = 60.0
"""In which Ray notices that a node is dead."""


class Rank:
    """An actor with the process of one rank."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def place(self) -> tuple[str, str, int, list[str]]:
        """This node's id and address, a free port on it, and the GPUs of this rank."""
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        gpus = [str(number) for number in ray.get_gpu_ids()]
        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), port, gpus

    def run(self, name: str, folder: str, environment: dict[str, str]) -> Iterator[tuple[str, str]]:
        """Run the rank; yields stream and line of what it prints, at last `exit` and its exit code."""
        threads = max(1, (os.cpu_count() or 1) // int(environment["LOCAL_WORLD_SIZE"]))
        self.process = process = subprocess.Popen(
            [sys.executable, "-m", "components.runtime.stage", name],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        lines: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()

        def read(stream: str, pipe: Any) -> None:
            for line in pipe:
                lines.put((stream, line.rstrip("\n")))
            lines.put((stream, "\n"))

        pipes = {"stdout": process.stdout, "stderr": process.stderr}
        for stream, pipe in pipes.items():
            threading.Thread(target=read, args=(stream, pipe), daemon=True).start()
        while pipes:
            stream, line = lines.get()
            if line == "\n":
                del pipes[stream]
            else:
                yield stream, line
        yield "exit", str(process.wait())

    def send(self, number: int) -> None:
        """Send the process a signal, unless it has ended."""
        if self.process is not None:
            self.process.send_signal(number)


def main() -> None:
    """The command line."""
    name, processes, file = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    try:
        environment: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        print(f"{REFUSED}{name}: {file} is gone: its launcher has ended; run the stage again", flush=True)
        sys.exit(1)
    file.unlink(missing_ok=True)  # it has secrets
    ray.init(log_to_driver=False, logging_level="error")
    stops: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda caught, _: stops.append(caught))
    if processes > devices():
        unit = "GPUs" if device() == "GPU" else "CPUs"
        message = f"params.yaml: run.processes: {processes}: the Ray cluster has {devices()} {unit}"
        print(f"{REFUSED}{message}; set it to {devices()}", flush=True)
        sys.exit(1)
    restarts, count = Restarts(name, file.parents[1]), processes
    while True:
        codes = run_ranks(name, count, environment, stops)
        if codes and len(codes) == count and not any(codes.values()):
            sys.exit(0)
        if stops:
            sys.exit(128 + stops[0])
        failed, count = count, max(1, min(processes, devices()))
        if codes is None:
            continue
        environment.pop(FORCE, None)  # the checkpoints are this run's now
        # What ends with an exit code of its own refuses, has a bug and would again, or was interrupted.
        killed = {number: code for number, code in codes.items() if is_kill(code)}
        if not killed:
            sys.exit(next(code for code in codes.values() if code))
        first = min(killed, key=lambda rank: (killed[rank], rank))
        code = killed[first]
        how = "its node" if code == LOST else describe(code)
        ending = f"{STDERR}{name}: process {first} of {failed} ended with {how}"
        if not restarts.allowed():
            print(ending, flush=True)
            sys.exit(code if code > 0 else 128 + (signal.SIGKILL if code == LOST else -code))
        print(f"{ending}; {count} start again from the last checkpoint", flush=True)


LOST = -1000
"""In place of an exit code, for a rank whose actor died."""


@cache
def device() -> str:
    """What a rank has of its own: a GPU, where the cluster has any at the start of the job, or a CPU."""
    return "GPU" if ray.cluster_resources().get("GPU") else "CPU"


def devices() -> int:
    return int(ray.cluster_resources().get(device(), 0))


def run_ranks(name: str, processes: int, environment: Mapping[str, str], stops: list[int]) -> dict[int, int] | None:
    """Run every rank to its end, or all until one fails; returns the exit codes of those that ended by themselves.

    None where no rank began, as the cluster has lost devices: that is no failure of its own. A signal in `stops` goes
    to rank 0, which stops all at the same step.
    """
    bundle = {"CPU": 1} | ({"GPU": 1} if device() == "GPU" else {})
    group = placement_group([bundle] * processes, strategy="PACK")
    actors: list[Any] = []
    try:
        if not wait_for(group, processes, f"{name}  waits for {processes} {device()}s of the Ray cluster", stops):
            return None
        for index in range(processes):
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
            options = {"num_cpus": 1, "num_gpus": bundle.get("GPU", 0), "max_concurrency": 2}
            actors.append(ray.remote(Rank).options(scheduling_strategy=strategy, **options).remote())
        placed = [actor.place.remote() for actor in actors]
        while len(ray.wait(placed, num_returns=processes, timeout=1.0)[0]) < processes:
            if stops or devices() < processes:
                return None
        try:
            places = ray.get(placed)
        except RayError:
            return None if has_shrunk(processes, stops) else {0: LOST}
        order = sorted(range(processes), key=lambda number: (places[number][0] != places[0][0], places[number][0]))
        actors, places = [actors[number] for number in order], [places[number] for number in order]
        streams = {
            actor.run.options(num_returns="streaming").remote(name, os.getcwd(), {**environment, **own}): number
            for number, (actor, own) in enumerate(zip(actors, environments(places), strict=True))
        }
        return read_all(streams, actors[0], stops)
    finally:
        if actors:
            kills = [actor.send.remote(signal.SIGKILL) for actor in actors]
            ray.wait(kills, num_returns=len(kills), timeout=_SECONDS_TO_KILL)
        for actor in actors:
            ray.kill(actor)
        remove_placement_group(group)


def wait_for(group: Any, processes: int, message: str, stops: list[int]) -> bool:
    """Wait until Ray has reserved a placement group; false if stopped, or if the cluster has fewer devices meanwhile.

    Ray notices a dead node up to half a minute after its ranks have ended. Where none is left, it waits for one.
    """
    if not group.wait(timeout_seconds=5):
        print(message, flush=True)
        while not group.wait(timeout_seconds=1):
            if stops or 0 < devices() < processes:
                return False
    return not stops


def has_shrunk(processes: int, stops: list[int]) -> bool:
    """Whether Ray notices that the cluster has fewer devices than `processes`, after an actor could not start."""
    deadline = time.monotonic() + _SECONDS_TO_NOTICE
    while devices() >= processes:
        if stops or time.monotonic() > deadline:
            return False
        time.sleep(1.0)
    return True


def environments(places: Sequence[tuple[str, str, int, list[str]]]) -> list[dict[str, str]]:
    """torchrun's environment for ranks at these places; those of a node are neighbours, and see its GPUs together."""
    nodes = [place[0] for place in places]
    _, address, port, _ = places[0]
    all_ranks = {"WORLD_SIZE": str(len(places)), "MASTER_ADDR": address, "MASTER_PORT": str(port)}
    variables = []
    for number, node in enumerate(nodes):
        own = {"RANK": str(number), "LOCAL_RANK": str(number - nodes.index(node))}
        own["LOCAL_WORLD_SIZE"] = str(nodes.count(node))
        if gpus := [gpu for place in places if place[0] == node for gpu in place[3]]:
            own["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        variables.append(all_ranks | own)
    return variables


def read_all(streams: dict[Any, int], first: Any, stops: list[int]) -> dict[int, int]:
    """Print the ranks' lines until all have ended, or a while after one failed or was stopped; returns exit codes."""
    codes: dict[int, int] = {}
    deadline, is_stopping = float("inf"), False
    while streams and time.monotonic() < deadline:
        if stops and not is_stopping:
            first.send.remote(signal.SIGTERM)
            deadline, is_stopping = time.monotonic() + SECONDS_TO_END, True
        ready, _ = ray.wait(list(streams), timeout=1.0)
        for stream in ready:
            number = streams[stream]
            try:
                kind, text = ray.get(next(stream))
            except (RayError, StopIteration) as error:
                del streams[stream]
                if isinstance(error, RayError):
                    codes[number] = LOST
            else:
                if kind == "exit":
                    codes[number] = int(text)
                elif kind == "stderr" or number == 0:
                    print(f"{STDERR if kind == 'stderr' else ''}{text}", flush=True)
        if any(codes.values()) and not is_stopping:
            deadline = min(deadline, time.monotonic() + _SECONDS_FOR_OTHERS)
    return codes


if __name__ == "__main__":
    main()
