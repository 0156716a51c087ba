"""What a version was made from: hashes of its data, stages, parameters, datasets, commit and the project."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from components.config.params import InputError, load_params
from components.config.paths import TRAINED_ON_FILE, Paths
from components.config.project import load_project
from components.config.secrets import redacted
from components.runtime.process import git
from components.runtime.stage import PIPELINES

DATASETS = "data/collected/"


def version_lineage(paths: Paths, out: str) -> dict[str, Any]:
    """The lineage of the model folder that DVC calls `out`, as `lineage.json` of its version holds it.

    `stages` has the seconds of each stage upstream as it last ran in this state folder; a stage whose results came
    from DVC's cache is not among them.
    """
    hashes, stages = made_from(paths, out)
    params = load_params(paths.params)
    # No stage reads how models are served.
    values = params.model_dump(mode="json", by_alias=True, exclude={"serve"})
    project = load_project(params.project, paths.root)
    names = sorted(path.removeprefix(DATASETS) for path in hashes if path.startswith(DATASETS))
    validation, trained_on = paths.metrics / "validate.json", paths.root / out / TRAINED_ON_FILE
    return {
        "dvc": hashes,
        "params": redacted(values),
        "python": sys.version.split()[0],
        "project": {
            "name": project.name,
            "description": project.description,
            "smoke_questions": dict(project.smoke_questions),
        },
        "datasets": {name: _dataset(paths, name) for name in names},
        "stages": {name: report for name in stages if (report := _stage_report(paths, name))},
        "validation": _json(validation),
        "trained_on_feedback": len(_json(trained_on).get("feedback", [])),
    }


def _dataset(paths: Paths, name: str) -> dict[str, Any]:
    info = _json(paths.collected / name / "dataset.json")
    return {key: info.get(key) for key in ("kind", "rows", "sources", "licence")}


def _stage_report(paths: Paths, name: str) -> dict[str, float]:
    """Seconds, processor seconds and GPUs of a stage's last run here; empty where none was recorded."""
    report = _json(paths.home / "stages" / f"{name}.json")
    keys = ("seconds", "cpu_seconds", "gpus")
    return {key: report[key] for key in keys} if all(key in report for key in keys) else {}


def _json(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return values


def made_from(paths: Paths, out: str) -> tuple[dict[str, str], list[str]]:
    """DVC's hash of an out and of all its upstream dependencies, and the stages that made them, nearest first.

    Datasets are those that its stages name, each with its own digest.
    """
    stages, upstream = _locked(paths), list[str]()
    hashes, queue = {out: outs(paths)[out]}, [out]
    while queue:
        path = Path(queue.pop())
        # A stage may read a part of an out, or a folder that holds several.
        producers = [
            name
            for name, stage in stages.items()
            if any(path.is_relative_to(out) or Path(out).is_relative_to(path) for out in _hashes(stage, "outs"))
        ]
        upstream += producers
        for deps in [_hashes(stages.pop(name), "deps") for name in producers]:
            hashes |= deps
            queue += deps
    for file in [paths.root / path for path in hashes]:
        if file.parent == paths.validated("").parent and file.is_file():
            datasets = json.loads(file.read_text(encoding="utf-8"))
            hashes |= {f"data/collected/{name}": digest for name, digest in datasets.items()}
    # Of these folders a model reads the datasets that it names.
    folders = ("data/collected", "data/added")
    return {path: digest for path, digest in hashes.items() if path not in folders}, upstream


def outs(paths: Paths) -> dict[str, str]:
    """DVC's hash of every output of every stage that ran."""
    return {path: digest for stage in _locked(paths).values() for path, digest in _hashes(stage, "outs").items()}


def _locked(paths: Paths) -> dict[str, Any]:
    locks = [lock for pipeline in PIPELINES if (lock := (paths.root / pipeline).with_suffix(".lock")).exists()]
    contents = [yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"] for lock in locks]
    return {name: stage for stages in contents for name, stage in stages.items()}


def _hashes(stage: Mapping[str, Any], kind: str) -> dict[str, str]:
    return {entry["path"]: entry["md5"] for entry in stage.get(kind, []) if "md5" in entry}


def commit_tags(root: Path) -> dict[str, str]:
    """The commit of the working tree, and whether files differ from it."""
    try:
        commit = git(root, "rev-parse", "HEAD")
        # Runs themselves write dvc.lock and metrics, and ingestion the version of the feedback.
        written = (":!*dvc.lock", ":!data/metrics", ":!data/feedback.dvc")
        changed = git(root, "status", "--porcelain", "--", ".", *written)
        return {"git_commit": commit, "git_dirty": str(bool(changed)).lower()}
    except InputError:  # the run warned of it when it began
        return {"git_commit": "none"}
