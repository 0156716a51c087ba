"""What the page /registry shows: champions and why, runs, feedback, drift, and where to look further."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from components.config.params import InputError
from components.feedback.store import Store
from components.runtime.service_registry import running
from components.tracking.registry import ModelVersion, Registry, is_empty
from components.tracking.version_files import card, latest_run
from serving.observability.flow_runs import flow_runs, prefect_address

_NEWEST = 20
"""Versions of a model that are listed."""
_REPORT = "index.html"
"""The validation report's name among the artifacts of its run."""


def overview(home: Path, store: Store, share: float, served: list[str]) -> dict[str, Any]:
    """The state of a state folder; `share` of requests goes to challengers, `served` are the versions that answer."""
    mlflow = _mlflow_address(home)
    registry = None if is_empty(home) else Registry(home)
    return {
        "models": [_model(registry, name, mlflow, share, served) for name in registry.names()] if registry else [],
        "served": served,
        "runs": flow_runs(home),
        "successes": store.successes(),
        "feedback": _feedback(store),
        "drift": _drift(home),
        "links": _links(registry, home, mlflow),
    }


def version_card(home: Path, model: str) -> dict[str, Any]:
    """A registered version with its model card.

    Raises: InputError where there is none.
    """
    if is_empty(home):
        raise InputError(f"{model}: nothing is registered here")
    version = Registry(home).resolve(model)
    return {**_version(version, _mlflow_address(home)), "card": card(version), "metrics": version.metrics}


def _model(registry: Registry, name: str, mlflow: str, share: float, served: list[str]) -> dict[str, Any]:
    """A registered model: the versions that its aliases name, and the newest versions."""
    versions = registry.versions(name, _NEWEST)
    by_alias = {alias: _version(registry.resolve(f"{name}@{alias}"), mlflow) for alias in registry.aliases(name)}
    return {
        "name": name,
        "champion": by_alias.get("champion"),
        "challenger": by_alias.get("challenger"),
        "challenger_share": share if "challenger" in by_alias else 0.0,
        "previous": by_alias.get("previous"),
        "served": any(entry.partition("/")[0] == name for entry in served),
        "versions": [_version(version, mlflow) for version in versions],
        "url": f"{mlflow}/#/models/{name}" if mlflow else None,
    }


def _version(version: ModelVersion, mlflow: str) -> dict[str, Any]:
    tags = version.tags
    return {
        "model": str(version),
        "aliases": list(version.aliases),
        "created": version.created,
        "score": version.metrics.get("score"),
        "gate": tags.get("gate"),
        "reason": tags.get("smoke_failed") or tags.get("gate_reason"),
        "rolled_back": tags.get("rolled_back") == "true",
        "url": f"{mlflow}/#/models/{version.name}/versions/{version.version}" if mlflow else None,
    }


def _feedback(store: Store) -> dict[str, Any]:
    improvements = store.improvements()
    counts = store.feedback_counts()
    return {
        "to_ingest": store.fresh(),
        "to_train_on": store.waiting(),
        "quarantined": sum(row["quarantined"] for row in counts),
        "votes": sum(row["up"] + row["down"] for row in counts),
        "corrections": sum(row["corrections"] for row in counts),
        "last_improvement": improvements[-1] if improvements else None,
    }


def _drift(home: Path) -> dict[str, str] | None:
    """The newest drift report, in Markdown."""
    newest = max((home / "reports").glob("drift-*.md"), default=None)
    if newest is None:
        return None
    return {"date": newest.stem.removeprefix("drift-"), "report": newest.read_text(encoding="utf-8")}


def _mlflow_address(home: Path) -> str:
    """The address of MLflow's page; empty where none is served."""
    address = os.environ.get("MLFLOW_TRACKING_URI") or running(home).get("mlflow", "")
    return address.rstrip("/") if address.startswith("http") else ""


def _links(registry: Registry | None, home: Path, mlflow: str) -> list[dict[str, str]]:
    links = []
    if mlflow:
        links.append({"name": "MLflow: models and runs", "url": f"{mlflow}/#/models"})
        if registry is not None and (run := latest_run(registry, "validate")) is not None:
            page = f"{mlflow}/#/experiments/{run[0]}/runs/{run[1]}/artifacts/{_REPORT}"
            links.append({"name": "Validation report", "url": page})
    if prefect := prefect_address(home):
        links.append({"name": "Prefect: flows and schedules", "url": f"{prefect.removesuffix('/api')}/dashboard"})
    return links
