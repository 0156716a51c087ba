"""Run one stage of dvc.yaml by name: `python -m components.runtime.stage NAME`, `STAGE@ITEM` where it has a matrix.

A stage is a pure function of its inputs. The runner adds a digest of those inputs, a checkpoint folder named by it, a
lock, a tracker, an end with its parent's, and an exit code (1 wrong input, 3 refused by data validation or the gate).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from components.config.loop_settings import RunConfig
from components.config.model_settings import Family
from components.config.params import FAMILIES, FAMILY_OF_SECTION, InputError, Params, Refused, flat, load_params
from components.config.paths import Paths, disk_trouble, find_root
from components.config.secrets import redacted
from components.config.versions import VERSIONS_FILE
from components.runtime import ray_launcher
from components.runtime.checkpoint_folders import History, checkpoint_folder, copy_lock_files, remove_committed
from components.runtime.files import keep_private, remove, replace_file
from components.runtime.launcher import FORCE, launch, launcher_settings, rank, refuse_ranks, report_behind_rank_0
from components.runtime.process import end_on_signals, end_with_parent, file_lock
from components.tracking.event_log import EventLog, NoTracker
from components.tracking.event_log import warn_on_failure as warn_on_failure  # for the stages
from components.tracking.mlflow_client import open_tracker

STAGE_MODULES: Mapping[str, str] = {
    "collect": "components.datasets.collect",
    "validate": "components.validation.validate",
    "train_tokenizer": "components.tokenization.train_tokenizer",
    "prepare": "components.token_rows.prepare",
    "pretrain": "components.training.pretrain",
    "pretrain_vision": "components.training.vision",
    "connect": "components.training.vision",
    "tune": "components.training.tune",
    "finetune": "components.training.finetune",
    "assess": "components.evaluation.assess",
    "evaluate": "components.evaluation.evaluate",
    "curate": "components.feedback.curate",
    "align": "components.training.align",
    "judge": "components.evaluation.compare_agents",
}
"""The module of each stage; its function has the stage's name."""

PIPELINE, IMPROVEMENT = PIPELINES = ("dvc.yaml", "data/improve/dvc.yaml")
"""The pipelines of `run` and of `improve`."""

ENVIRONMENT: Mapping[str, str] = {
    # OpenMP threads spin shortly between kernels: waking sleeping threads for the many small kernels of a step costs a
    # quarter of the speed and more, a long spin takes the core from other processes.
    "GOMP_SPINCOUNT": "10000",
    # No telemetry.
    "DO_NOT_TRACK": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Set before a stage imports its libraries, unless its caller set them."""

PROJECT_PATH = "${project_path}"
"""In dvc.yaml: the value of params.yaml, which DVC substitutes too."""
PROGRESS = re.compile(r"(?P<stage>[\w@]+)  (?P<done>\d+)/(?P<total>\d+)(?:  (?P<figures>.*))?")
"""A line of `StageRun.progress`, as the orchestrator parses it."""

_SECONDS_FOR_ENDING_STAGE = 15.0

Tracker = EventLog
"""The experiment tracker as a stage sees it; no call slows or fails the stage."""


@dataclass(frozen=True)
class StageRun:
    """The argument of a stage function."""

    name: str
    """As `--until` takes it: the stage, and behind an @ the item of its matrix."""
    params: Params
    paths: Paths
    state: Path
    """Folder for resumable checkpoints, keyed by the stage's inputs; outlives a killed or failed run."""
    tracker: Tracker

    @property
    def item(self) -> str:
        """The item of its matrix that the stage runs for, such as `encoder`; empty for a stage without a matrix."""
        return self.name.partition("@")[2]

    @property
    def family(self) -> Family:
        """The model family of the stage."""
        families: Mapping[str, Family] = {**{family: family for family in FAMILIES}, **FAMILY_OF_SECTION}
        return families.get(self.item, "decoder")

    @property
    def section(self) -> str:
        """Its section of params.yaml, such as `pretrain.encoder`."""
        return self.item if self.item in FAMILY_OF_SECTION else self.name.replace("@", ".")

    def progress(self, done: int, total: int, **figures: float | str) -> None:
        """Print the stage's progress in a line that the orchestrator parses."""
        text = "  ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in figures.items()
        )
        try:
            print(f"{self.name}  {done}/{total}  {text}".rstrip(), flush=True)
        except BrokenPipeError:
            # The orchestrator was killed: end as on Ctrl-C, with a checkpoint; a launcher would restart after SIGTERM.
            signal.raise_signal(signal.SIGINT)


@dataclass(frozen=True)
class Inputs:
    """The dependencies and parameters that dvc.yaml declares for a stage."""

    deps: dict[str, str]
    """Content digest of each dependency, by its path."""
    values: dict[str, Any]
    """Resolved value of each parameter, by its dotted name."""

    @property
    def key(self) -> str:
        """Digest of dependencies and values: equal keys, equal results."""
        return hashlib.sha256(json.dumps([self.deps, self.values], sort_keys=True).encode()).hexdigest()[:20]


def stage_inputs(name: str, paths: Paths, params: Params) -> Inputs:
    """Digests of the stage's dependencies and values of its parameters.

    Raises: InputError naming a dependency that does not exist and the stage that makes it.
    """
    stages = read_stages(paths.root)
    deps = {dep: digest(paths.root / dep) for dep in stages[name].get("deps", []) if _exists(dep, paths.root, stages)}
    for dep in list(deps):
        if (paths.root / dep).parent == paths.validated("").parent:
            deps |= _datasets(paths.root / dep, paths)
    resolved = params.model_dump(mode="json", by_alias=True)
    values = {dotted: _look_up(resolved, dotted) for dotted in _declared_params(stages[name])}
    if libraries := declared_libraries(stages[name]):
        versions = yaml.load(VERSIONS_FILE.read_text(encoding="utf-8"), yaml.CSafeLoader)
        values |= {f"versions.{library}": versions[library] for library in libraries}
    return Inputs(deps, values)


def _datasets(validated: Path, paths: Paths) -> dict[str, str]:
    """Digest of each dataset that passed validation, by its path.

    Raises: InputError when a dataset changed since, as where a stage is run without those before it.
    """
    digests: dict[str, str] = json.loads(validated.read_text(encoding="utf-8"))
    for name, passed in digests.items():
        folder = paths.collected / name
        if not folder.exists() or digest(folder) != passed:
            raise InputError(
                f'data/collected/{name}: changed since its validation; run "loopwright run --until validate"'
            )
    return {f"data/collected/{name}": passed for name, passed in digests.items()}


def read_stages(root: Path, *files: str) -> dict[str, dict[str, Any]]:
    """The `stages` of these dvc.yaml files, or of both pipelines, by DVC's names; a matrix or `foreach` is expanded."""
    texts = [(root / file).read_text(encoding="utf-8") for file in files or PIPELINES if (root / file).is_file()]
    if any(PROJECT_PATH in text for text in texts):
        params = yaml.load((root / "params.yaml").read_text(encoding="utf-8"), yaml.CSafeLoader) or {}
        texts = [text.replace(PROJECT_PATH, str(params.get("project_path"))) for text in texts]
    parsed = (yaml.load(text, yaml.CSafeLoader)["stages"] for text in texts)
    declared = {base: template for stages in parsed for base, template in stages.items()}
    return {name: stage for base, template in declared.items() for name, stage in _instances(base, template)}


def _instances(base: str, template: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for key, fields in template.get("foreach", {}).items():
        item = {"${key}": key} | {f"${{item.{name}}}": str(value) for name, value in fields.items()}
        yield f"{base}@{key}", _interpolated(template["do"], item)
    if "foreach" in template:
        return
    stage = {key: value for key, value in template.items() if key != "matrix"}
    axes = template.get("matrix", {})
    for values in product(*axes.values()):
        item = {f"${{item.{axis}}}": str(value) for axis, value in zip(axes, values, strict=True)}
        yield "@".join([base, *(["-".join(item.values())] if item else [])]), _interpolated(stage, item)


def _interpolated(value: Any, item: Mapping[str, str]) -> Any:
    """The value with `${item.AXIS}` replaced in every string of it."""
    if isinstance(value, str):
        for axis, replacement in item.items():
            value = value.replace(axis, replacement)
        return value
    if isinstance(value, Mapping):
        return {_interpolated(key, item): _interpolated(entry, item) for key, entry in value.items()}
    return [_interpolated(entry, item) for entry in value] if isinstance(value, list) else value


def outs(stage: Mapping[str, Any]) -> list[str]:
    """Paths of everything a stage of dvc.yaml writes: outs, metrics and plots."""
    entries = [entry for kind in ("outs", "metrics", "plots") for entry in stage.get(kind, [])]
    return [next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries]


def digest(path: Path) -> str:
    """SHA-256 of a file's content, or of a folder's file names and contents."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    lines = (f"{file.relative_to(path).as_posix()} {digest(file)}\n" for file in _files(path))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            yield path


def _exists(dep: str, root: Path, stages: Mapping[str, Mapping[str, Any]]) -> bool:
    if (root / dep).exists():
        return True
    producers = [name for name, stage in stages.items() if any(Path(dep).is_relative_to(out) for out in outs(stage))]
    remedy = f'run "loopwright run --until {producers[0]}"' if producers else "restore it from git"
    raise InputError(f"{dep}: not found; {remedy}")


def _declared_params(stage: Mapping[str, Any]) -> list[str]:
    """Dotted names under `params`; `all.model` and `${scale}.model` of scales.yaml both feed `model`."""
    names: set[str] = set()
    for entry in stage.get("params", []):
        if isinstance(entry, dict):
            scaled = (keys for file, keys in entry.items() if Path(file).name != VERSIONS_FILE.name)
            names.update(dotted.partition(".")[2] for keys in scaled for dotted in keys)
        else:
            names.add(entry)
    return sorted(names)


def declared_libraries(stage: Mapping[str, Any]) -> set[str]:
    """Libraries of which a stage of dvc.yaml declares the version, as it changes what the stage computes."""
    files = [entry for entry in stage.get("params", []) if isinstance(entry, dict)]
    return {
        name
        for entry in files
        for file, names in entry.items()
        if Path(file).name == VERSIONS_FILE.name
        for name in names
    }


def _look_up(values: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        values = values[part]
    return values


def stage_function(name: str) -> Any:
    stage = name.partition("@")[0]
    return getattr(importlib.import_module(STAGE_MODULES[stage]), stage)


def run_stage(name: str, root: Path) -> int:
    """Run one stage in this process and return its exit code."""
    paths = Paths(root)
    started, message = time.time(), ""
    remove_committed(paths)
    try:
        with file_lock(paths.home / "stages", name, patience=_SECONDS_FOR_ENDING_STAGE):
            _run_locked(name, paths)
        code = 0
    except BaseException as error:
        if message := str(error) if isinstance(error, InputError | Refused) else disk_trouble(error, root):
            print(message, file=sys.stderr, flush=True)
            code = 3 if isinstance(error, Refused) else 1
            _write_report(paths, name, started, code, message)
            return code
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
        _write_report(paths, name, started, code, f"{type(error).__name__}: {error}")
        raise
    _write_report(paths, name, started, code, message)
    return code


def start_ranks(name: str, root: Path, settings: RunConfig) -> int:
    """Start the ranks of a stage by the launcher of the settings, and return the exit code."""
    paths, started = Paths(root), time.time()
    if settings.launcher == "torchrun":
        return launch(name, settings.processes, paths.home)
    try:
        key = stage_inputs(name, paths, load_params(paths.params)).key
        return ray_launcher.launch(name, key, settings, root, paths.home)
    except InputError as error:
        print(error, file=sys.stderr, flush=True)
        _write_report(paths, name, started, 1, str(error))
        return 1


def run_beside_rank_0(name: str, root: Path) -> int:
    """Run a rank other than 0 of a stage: it trains, and writes nothing but its rows of checkpoints."""
    paths = Paths(root)
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
            refuse_ranks(name)
            params = load_params(paths.params)
            folder = checkpoint_folder(name, stage_inputs(name, paths, params).key, paths)
            stage_function(name)(StageRun(name, params, paths, folder, NoTracker()))
    except (InputError, Refused) as error:
        report_behind_rank_0(str(error))
        return 3 if isinstance(error, Refused) else 1
    return 0


def _run_locked(name: str, paths: Paths) -> None:
    refuse_ranks(name)
    params = load_params(paths.params)
    inputs = stage_inputs(name, paths, params)
    # Partial outs of a killed run; and nothing may be written through a link into DVC's cache.
    for out in outs(read_stages(paths.root)[name]):
        remove(paths.root / out)
    copy_lock_files(paths)
    with open_tracker(name, inputs.key, paths.home) as tracker:
        tracker.params(flat(redacted(inputs.values)))
        for dep, content in inputs.deps.items():
            if dep.startswith("data/"):
                tracker.dataset(dep, content, dep, "input")
        history, started, is_finished = History.read(name, paths), time.monotonic(), False
        folder = history.open(inputs.key, afresh=bool(os.environ.get(FORCE)))
        try:
            stage_function(name)(StageRun(name, params, paths, folder, tracker))
            is_finished = True
        finally:
            history.ended(time.monotonic() - started, is_finished)
        tracker.artifact(paths.metrics / f"{name}.json")


def _write_report(paths: Paths, name: str, started: float, code: int, message: str) -> None:
    """Write how the stage ended, for the orchestrator."""
    report = {"exit_code": code, "message": message, "started": started, "seconds": max(0.0, time.time() - started)}
    report |= {"cpu_seconds": _cpu_seconds(), "gpus": _gpus()}
    with suppress(OSError):  # a full disk; the message went to stderr
        replace_file(paths.home / "stages" / f"{name}.json", lambda file: file.write(json.dumps(report).encode()))


def _cpu_seconds() -> float:
    """Processor time of this process and of its children that have ended; that of other ranks is not in it."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _gpus() -> int:
    """Number of GPUs that the stage computed on, its other ranks' among them."""
    torch = sys.modules.get("torch")
    return int(os.environ.get("WORLD_SIZE", "1")) if torch is not None and torch.cuda.is_initialized() else 0


def main() -> None:
    """The command line: one argument, the stage's name."""
    end_with_parent()
    end_on_signals()
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    name, root = sys.argv[1] if len(sys.argv) == 2 else "", find_root()
    if name not in (stages := read_stages(root)):
        print(f"components.runtime.stage: {name!r} is no stage; one of {', '.join(stages)}", file=sys.stderr)
        sys.exit(2)
    keep_private(Paths(root))
    if settings := launcher_settings(name, root):
        sys.exit(start_ranks(name, root, settings))
    sys.exit(run_beside_rank_0(name, root) if rank() else run_stage(name, root))


if __name__ == "__main__":
    main()
