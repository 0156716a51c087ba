"""`loopwright doctor`: check a machine, one line each, with the remedy beside every problem."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable
from importlib import metadata

import typer

from components.config.params import InputError, load_params
from components.config.paths import Paths, find_root
from components.config.versions import locked_versions
from components.runtime.process import git
from loopwright.output import Json, print_json, print_table

_GIB = 1 << 30
_LOCKED = ("torch", "prefect", "mlflow", "dvc", "bentoml", "great-expectations", "tokenizers")
Check = Callable[[Paths], tuple[str, str]]
"""Returns the state and, where it is a problem, the remedy (else "")."""


def doctor(as_json: Json = False) -> None:
    """Check this machine and this checkout; each problem comes with its remedy."""
    paths = Paths(find_root())
    rows = []
    for name, check in CHECKS.items():
        state, remedy = check(paths)
        rows.append({"check": name, "ok": not remedy, "found": state, "remedy": remedy})
    problems = sum(not row["ok"] for row in rows)
    if as_json:
        print_json({"ok": not problems, "checks": rows})
    else:
        shown = [(row["check"], "ok" if row["ok"] else "PROBLEM", row["found"], row["remedy"]) for row in rows]
        print_table(("check", "", "found", "remedy"), shown)
    if problems:
        raise typer.Exit(1)


def _python(paths: Paths) -> tuple[str, str]:
    state = f"{sys.version.split()[0]} at {sys.executable}"
    metrics = paths.metrics / "collect.json"
    is_collected = metrics.is_file() and paths.collected.is_dir()  # the metrics alone come with a clone
    collected = json.loads(metrics.read_text(encoding="utf-8")).get("python") if is_collected else None
    if collected not in (None, sys.version):
        state += f', data collected under {collected.split()[0]}: "loopwright run --until collect --force" renews it'
    return state, "" if sys.version_info >= (3, 11) else "install Python 3.11 or newer, then make setup"


def _git(paths: Paths) -> tuple[str, str]:
    try:
        return f"commit {git(paths.root, 'rev-parse', 'HEAD')[:12]}", ""
    except InputError as error:
        reason, _, remedy = str(error).removeprefix("git: ").rpartition("; ")
        return reason, remedy


def _uv(_: Paths) -> tuple[str, str]:
    path = shutil.which("uv") or (importlib.util.find_spec("uv") and "in this environment")
    return path or "not found", "" if path else "run make setup; building a Bento needs uv"


def _disk(paths: Paths) -> tuple[str, str]:
    free = shutil.disk_usage(paths.root).free / _GIB
    return f"{free:.0f} GiB free", "" if free >= 5 else "free some space: environment, data and models take about 5 GiB"


def _cores(_: Paths) -> tuple[str, str]:
    return f"{os.cpu_count()}", ""


def _memory(_: Paths) -> tuple[str, str]:
    import psutil

    available = psutil.virtual_memory().available / _GIB
    return f"{available:.1f} GiB available", "" if available >= 3 else "close other programs: a run takes up to 3 GiB"


def _cuda(_: Paths) -> tuple[str, str]:
    import torch

    return (torch.cuda.get_device_name() if torch.cuda.is_available() else "none: training uses the CPU"), ""


def _port(_: Paths) -> tuple[str, str]:
    from components.runtime.service_registry import answers

    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 3000)):
            return "3000 is free", ""
    if answers("http://127.0.0.1:3000/livez"):
        return "3000: an endpoint answers", ""
    return "3000 is in use by another program", 'serve on another port: "loopwright serve --port 3001"'


def _versions(paths: Paths) -> tuple[str, str]:
    missing = [name for name in _LOCKED if not importlib.util.find_spec(name.replace("-", "_"))]
    if missing:
        return f"missing: {', '.join(missing)}", "run make setup"
    installed = {name: metadata.version(name) for name in _LOCKED}
    # Stages are out of date by the lock: with other versions they would compute something else and not say so.
    lock = paths.root / "requirements.lock"
    locked = locked_versions(lock, _LOCKED) if lock.is_file() else installed
    different = [
        f"{name} {version}, locked {locked[name]}"
        for name, version in installed.items()
        if not re.search(rf"(^|, ){re.escape(version.partition('+')[0])}( |$)", locked[name])
    ]
    if different:
        return "; ".join(different), "run make setup, or make lock where the upgrade is meant"
    return ", ".join(f"{name} {version}" for name, version in installed.items()), ""


def _dvc(paths: Paths) -> tuple[str, str]:
    from flows.orchestration.dvc_repo import stage_states

    try:
        stale = [state.name for state in stage_states(paths.root, read_only=True) if state.reasons]
    except InputError as error:
        reason, _, remedy = str(error).rpartition("; ")
        return reason, remedy
    return f"pipeline readable, {len(stale)} stages to run", ""


def _params(paths: Paths) -> tuple[str, str]:
    try:
        params = load_params(paths.params)
        return f"scale {params.scale}, project {params.project}", ""
    except InputError as error:
        reason, _, remedy = str(error).rpartition("; ")
        return reason or str(error), remedy if reason else "correct params.yaml"


def _writable(paths: Paths) -> tuple[str, str]:
    existing = next(folder for folder in (paths.home, *paths.home.parents) if folder.exists())
    for folder in (paths.root, paths.root / "data", existing):
        if not os.access(folder, os.W_OK):
            return f"{folder} is read-only", f"make {folder} writable, or set LOOPWRIGHT_HOME"
    return f"state in {paths.home}", ""


CHECKS: dict[str, Check] = {
    "python": _python,
    "git": _git,
    "uv": _uv,
    "versions": _versions,
    "cores": _cores,
    "memory": _memory,
    "disk": _disk,
    "cuda": _cuda,
    "write access": _writable,
    "params.yaml": _params,
    "dvc": _dvc,
    "port": _port,
}
