"""`loopwright status`: which stages are up to date, which models are champions, what runs, what waits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from components.config.params import load_params
from components.config.paths import Paths, find_root
from loopwright.output import Json, print_json, print_table


def status(as_json: Json = False) -> None:
    """Stages (up to date, or why not), champion versions, services, feedback waiting."""
    paths = Paths(find_root())
    params = load_params(paths.params)
    running, feedback = _running(paths), _feedback(paths.home)
    found = {
        "scale": params.scale,
        "run": running,
        "stages": _stages(paths.root) if running is None else [],
        "champions": _champions(paths.home),
        "services": _services(paths.home),
        "feedback_waiting": feedback["waiting"],
        "feedback_fresh": feedback["fresh"],
    }
    if as_json:
        print_json(found)
    else:
        _print(found)


def _running(paths: Paths) -> int | None:
    """The process of the run that goes on, if one does."""
    from components.runtime.process import lock_owner

    return lock_owner(paths.home / "stages", "run")


def _stages(root: Path) -> list[dict[str, Any]]:
    from flows.orchestration.dvc_repo import stage_states

    return [
        {"name": state.name, "up_to_date": not state.reasons, "reasons": list(state.reasons)}
        for state in stage_states(root, read_only=True)
    ]


def _champions(home: Path) -> list[dict[str, Any]]:
    from components.tracking.registry import Registry, is_empty

    if is_empty(home):
        return []
    registry = Registry(home)
    champions = [registry.find(f"{name}@champion") for name in registry.names()]
    return [
        {"model": str(one), "score": one.metrics.get("score"), "bento": one.tags.get("bento")}
        for one in champions
        if one is not None
    ]


def _services(home: Path) -> list[dict[str, Any]]:
    """What answers on this machine: those of the running `up`, or that the environment names, or the usual ones."""
    from components.runtime.service_registry import answers, running

    found = running(home)
    addresses = {
        "endpoint": (found.get("endpoint", "http://127.0.0.1:3000"), "/livez"),
        "prefect": (os.environ.get("PREFECT_API_URL") or found.get("prefect", "http://127.0.0.1:4200/api"), "/health"),
        "mlflow": (os.environ.get("MLFLOW_TRACKING_URI") or found.get("mlflow", "http://127.0.0.1:5000"), "/health"),
    }
    return [
        {"name": name, "address": url, "answers": answers(url + path)}
        for name, (url, path) in addresses.items()
        if url.startswith("http")
    ]


def _feedback(home: Path) -> dict[str, int]:
    """Votes to be taken in, and accepted items that no model has learned from."""
    from components.feedback.store import Store, has_store

    if not has_store(home):
        return {"fresh": 0, "waiting": 0}
    store = Store.of(home)
    try:
        return {"fresh": store.fresh(), "waiting": store.waiting()}
    finally:
        store.close()


def _print(found: dict[str, Any]) -> None:
    print(f"scale {found['scale']}\n")
    if found["run"]:
        print(f"a run goes on as process {found['run']}: its stages are changing\n")
    rows = [(row["name"], "; ".join(row["reasons"]) or "up to date") for row in found["stages"]]
    print_table(("stage", "state"), rows)
    print()
    print_table(("champion", "score", "bento"), [tuple(row.values()) for row in found["champions"]])
    print()
    print_table(
        ("service", "state", "address"),
        [(row["name"], "answers" if row["answers"] else "not running", row["address"]) for row in found["services"]],
    )
    print(
        f"\nfeedback: {found['feedback_waiting']} waiting to be learned from, {found['feedback_fresh']} to be taken in"
    )
