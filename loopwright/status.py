"""`loopwright status`: which stages are up to date, which models are champions, what runs, what waits."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.config.params import load_params
from components.config.paths import Paths, find_root
from components.config.secrets import hidden
from loopwright.output import Json, print_json, print_table

if TYPE_CHECKING:
    from flows.orchestration.dvc_repo import StageState


def status(as_json: Json = False) -> None:
    """Stages (up to date, or why not), champion versions, services, feedback waiting."""
    from components.runtime.process import lock_owner
    from flows.orchestration.dvc_repo import stage_states

    paths = Paths(find_root())
    params = load_params(paths.params)
    run, feedback = lock_owner(paths.home / "stages", "run"), _feedback(paths.home)
    stages = [] if run else stage_states(paths.root, read_only=True)
    report = {
        "scale": params.scale,
        "run": run,
        "stages": [
            {
                "name": stage.name,
                "up_to_date": not stage.reasons,
                "reasons": list(stage.reasons),
                "after": list(stage.after),
            }
            for stage in stages
        ],
        "champions": _champions(paths.home),
        "services": _services(paths.home),
        "feedback_waiting": feedback["waiting"],
        "feedback_fresh": feedback["fresh"],
    }
    if as_json:
        print_json(report)
    else:
        _print(report, stages)


def _champions(home: Path) -> list[dict[str, Any]]:
    from components.tracking.registry import Registry, is_empty

    if is_empty(home):
        return []
    registry = Registry(home)
    champions = [registry.find(f"{name}@champion") for name in registry.names()]
    return [
        {"model": str(version), "score": version.metrics.get("score"), "bento": version.tags.get("bento")}
        for version in champions
        if version is not None
    ]


def _services(home: Path) -> list[dict[str, Any]]:
    """What answers on this machine: those of the running `up`, or that the environment names, or the usual ones."""
    from components.runtime.service_registry import answers, running, service_states

    services = running(home)
    addresses = {
        "endpoint": (services.get("endpoint", "http://127.0.0.1:3000"), "/livez"),
        "prefect": (
            os.environ.get("PREFECT_API_URL") or services.get("prefect", "http://127.0.0.1:4200/api"),
            "/health",
        ),
        "mlflow": (os.environ.get("MLFLOW_TRACKING_URI") or services.get("mlflow", "http://127.0.0.1:5000"), "/health"),
    }
    states = service_states(home)
    rows = [
        {"name": name, "address": hidden(url), "answers": answers(url + path), "state": states.get(name)}
        for name, (url, path) in addresses.items()
        if url.startswith("http")
    ]
    workers = [(name, state) for name, state in states.items() if name not in addresses]
    return rows + [
        {"name": name, "address": "", "answers": state == "healthy", "state": state} for name, state in workers
    ]


def _feedback(home: Path) -> dict[str, int]:
    """Feedback that is not ingested yet, and accepted items that no model is trained on."""
    from components.feedback.store import Store, has_store

    if not has_store(home):
        return {"fresh": 0, "waiting": 0}
    store = Store.of(home)
    try:
        return {"fresh": store.fresh(), "waiting": store.waiting()}
    finally:
        store.close()


def _print(report: dict[str, Any], stages: list[StageState]) -> None:
    print(f"scale {report['scale']}\n")
    if report["run"]:
        print(f"a run goes on as process {report['run']}: its stages are changing\n")
    widest = max((len(stage.name) for stage in stages), default=0)
    width = max(40, shutil.get_terminal_size().columns - widest - 2)
    print_table(("stage", "state"), [(stage.name, stage.describe(width)) for stage in stages])
    print()
    print_table(("champion", "score", "bento"), [tuple(row.values()) for row in report["champions"]])
    print()
    print_table(
        ("service", "state", "address"),
        [
            (row["name"], "answers" if row["answers"] else row["state"] or "not running", row["address"])
            for row in report["services"]
        ],
    )
    waiting, fresh = report["feedback_waiting"], report["feedback_fresh"]
    print(f"\nfeedback: {waiting} items to train on, {fresh} to ingest")
