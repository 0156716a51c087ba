"""What torchrun's launcher and the driver of a Ray job do alike; stand-ins start the ranks."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from components.runtime.launcher import FORCE, launch

Codes = dict[int, int]
"""Exit codes of the ranks that fail, in the order in which they do."""
NEW = -1
"""Among them: a checkpoint that was written before."""


@pytest.fixture
def ray_job(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module, with a stand-in for Ray."""
    members: dict[str, dict[str, Any]] = {
        "ray": {"init": lambda **_: None},
        "ray.exceptions": {"RayError": OSError},
        "ray.util.placement_group": {"placement_group": None, "remove_placement_group": None},
        "ray.util.scheduling_strategies": {"PlacementGroupSchedulingStrategy": None},
    }
    for name, values in members.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "components.runtime.ray_job", raising=False)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    job = importlib.import_module("components.runtime.ray_job")
    monkeypatch.setattr(job, "devices", lambda: 2)
    yield job
    del sys.modules["components.runtime.ray_job"]


@pytest.fixture(params=["torchrun", "ray"])
def start(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Start two ranks that end with one of the codes at each start; returns exit code and FORCE of each start."""
    checkpoints = tmp_path / "checkpoints/tune/0123"
    checkpoints.mkdir(parents=True)
    (tmp_path / "stages").mkdir()

    def without_checkpoint(codes: Codes, number: int) -> Codes:
        """The exit codes, once the checkpoint among them is written."""
        if NEW in codes:
            (checkpoints / f"step-{number:08d}-0.safetensors").touch()
        return {rank: code for rank, code in codes.items() if rank != NEW}

    def by_torchrun(starts: list[Codes]) -> tuple[int, list[str | None]]:
        forces: list[str | None] = []

        def run(_: object) -> None:
            codes = without_checkpoint(starts[len(forces)], len(forces))
            forces.append(os.environ.get(FORCE))
            if codes:
                failures = {number: ProcessFailure(number, 1, code, "") for number, code in codes.items()}
                raise ChildFailedError("stage", failures)

        monkeypatch.setattr(torchrun, "run", run)
        return launch("tune", 2, tmp_path), forces

    def by_ray(starts: list[Codes]) -> tuple[int, list[str | None]]:
        forces: list[str | None] = []
        job = request.getfixturevalue("ray_job")

        def run_ranks(name: str, processes: int, environment: dict[str, str], stops: list[int]) -> Codes:
            codes = without_checkpoint(starts[len(forces)], len(forces))
            forces.append(environment.get(FORCE))
            return codes or dict.fromkeys(range(processes), 0)

        monkeypatch.setattr(job, "run_ranks", run_ranks)
        file = tmp_path / "stages/environment.json"
        file.write_text(json.dumps(dict(os.environ)))
        monkeypatch.setattr(sys, "argv", ["ray_job", "tune", "2", str(file)])
        with pytest.raises(SystemExit) as ended:
            job.main()
        assert not file.exists(), "it has secrets"
        return int(ended.value.code or 0), forces

    monkeypatch.setenv(FORCE, "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return by_torchrun if request.param == "torchrun" else by_ray


@pytest.mark.parametrize(
    ("starts", "code"),
    [
        ([{}], 0),
        ([{1: -9, 0: 1}, {}], 0),
        ([{0: -9}, {1: -6}, {0: -9}, {1: -9}], 137),
        ([{0: -9}, {1: -6}, {0: -9}, {NEW: 0, 1: -9}, {0: -9}, {0: -9}, {0: -9}], 137),
        ([{1: 3}], 3),
        ([{0: 130, 1: 130}], 130),
        ([{0: 143, 1: 143}, {1: 143, 0: 1}, {}], 0),
        ([{NEW: 0, 0: 143, 1: 143}] * 5 + [{0: 143, 1: 143}] * 3, 143),
    ],
)
def test_killed_ranks_start_again_and_others_end_the_stage(
    starts: list[Codes], code: int, start: Callable[..., Any]
) -> None:
    """SIGTERM to a rank is a kill, SIGINT a person's; a new checkpoint makes a kill the first again.

    Only the first start is without the checkpoints of an earlier run: later ones would lose their own.
    """
    assert start(starts) == (code, ["1", *[None] * (len(starts) - 1)])


def test_a_job_whose_launcher_has_ended_is_refused(
    ray_job: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tune-0123-0.environment.json"
    monkeypatch.setattr(sys, "argv", ["ray_job", "tune", "2", str(file)])
    with pytest.raises(SystemExit, match="1"):
        ray_job.main()
    assert capsys.readouterr().out == f"refused: tune: {file} is gone: its launcher has ended; run the stage again\n"


def test_ranks_do_not_wait_for_a_node_that_is_dead(ray_job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray notices it only when the group for the restart is already waiting; for the last one they do wait."""
    sizes = iter([2, 0, 1])
    monkeypatch.setattr(ray_job, "devices", lambda: next(sizes))
    monkeypatch.setattr(ray_job, "device", lambda: "CPU")
    group = SimpleNamespace(wait=lambda timeout_seconds: False)
    monkeypatch.setattr(ray_job, "placement_group", lambda bundles, strategy: group)
    monkeypatch.setattr(ray_job, "remove_placement_group", lambda _: None)
    assert ray_job.run_ranks("tune", 2, {}, []) is None
    assert not list(sizes)
    assert ray_job.run_ranks("tune", 2, {}, [15]) is None, "stopped"


def test_a_dead_node_is_one_failure(ray_job: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Though Ray notices it late; and where a node comes back, it has ranks again at the next start."""
    lost, counts = {0: 1, 1: ray_job.LOST}, list[int]()
    ends, sizes = iter([lost, None, lost, None, lost, None, lost]), iter([2, 2, 2, 1, 2, 1, 2, 1])

    def run_ranks(name: str, processes: int, *_: object) -> Codes | None:
        counts.append(processes)
        return next(ends)

    monkeypatch.setattr(ray_job, "run_ranks", run_ranks)
    monkeypatch.setattr(ray_job, "devices", lambda: next(sizes))
    (tmp_path / "stages").mkdir()
    file = tmp_path / "stages/environment.json"
    file.write_text("{}")
    monkeypatch.setattr(sys, "argv", ["ray_job", "tune", "2", str(file)])
    with pytest.raises(SystemExit, match="137"):
        ray_job.main()
    assert counts == [2, 2, 2, 1, 2, 1, 2]
