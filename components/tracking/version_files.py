"""Files of a registered version: its lineage, its model card, its answers to held-out questions.

A version's tags are a dozen that people read and code searches by. Everything else that it was made from is in
`lineage.json` of its run; versions of earlier releases have that in tags too.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.runtime.files import write_text
from components.runtime.model_tasks import task_of
from components.tracking.event_log import warn_on_failure
from components.tracking.mlflow_client import EXPERIMENT
from components.tracking.model_card import (
    CARD,
    ModelCard,
    architecture,
    body,
    front_matter,
    hugging_face_metadata,
    lineage_section,
    usage_section,
)
from components.tracking.registry import BASE_VERSION, LINEAGE, ModelVersion, Registry

MAX_DESCRIPTION = 5000
"""Characters of a version's description in MLflow's database."""


def store_file(version: ModelVersion, path: Path) -> None:
    """Store a file with a version's run."""
    version.registry.client.log_artifact(version.run_id, str(path))


def store_text(version: ModelVersion, name: str, text: str) -> None:
    """Store a text with a version's run, as a file of this name."""
    version.registry.client.log_text(version.run_id, text, name)


def store_table(version: ModelVersion, name: str, columns: Mapping[str, list[Any]]) -> None:
    """Store a table with a version's run, for MLflow's pages; one of that name stays, as MLflow would add to it."""
    import pandas as pd

    client = version.registry.client
    if not any(file.path == name for file in client.list_artifacts(version.run_id)):
        client.log_table(version.run_id, pd.DataFrame(dict(columns), dtype=object), name)


def store_figure(version: ModelVersion, name: str, figure: Any) -> None:
    """Store a matplotlib figure with a version's run."""
    version.registry.client.log_figure(version.run_id, figure, name)


def fetch_file(version: ModelVersion, name: str, folder: Path) -> None:
    """Download a file that was stored with a version's run into a folder, if there is one of that name."""
    client = version.registry.client
    if any(file.path == name for file in client.list_artifacts(version.run_id)):
        client.download_artifacts(version.run_id, name, str(folder))


def lineage(version: ModelVersion) -> dict[str, str]:
    """What a version was made from, with its tags: parameters, validation, and `dvc.PATH` with DVC's hash."""
    with tempfile.TemporaryDirectory() as scratch:
        fetch_file(version, LINEAGE, Path(scratch))
        path = Path(scratch) / LINEAGE
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    hashes = {f"dvc.{path}": str(md5) for path, md5 in stored.pop("dvc", {}).items()}
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in stored.items()}
    return {**texts, **hashes, **version.tags}


def store_card(version: ModelVersion, readme: str, description: str) -> None:
    """Put a model card into a version's folder as README.md, and into MLflow as the version's description."""
    client, stored = version.registry.client, version.stored
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / CARD
        path.write_text(readme, encoding="utf-8")
        client.log_artifact(version.run_id, str(path), f"{_artifact_path(version)}/data/{stored.name}")
    write_text(stored / CARD, readme)  # of a server's version, a copy
    client.update_model_version(version.name, str(version.version), description[:MAX_DESCRIPTION])
    client.update_run(version.run_id, name=f"register {version}")  # so that two are told apart where they are compared


def store_imported_card(version: ModelVersion, source: Path | None = None) -> None:
    """Store the card of a version that was not trained here: an imported model, or the base of an adapter.

    The licence is that of the metadata in the README.md of the folder `source`, where there is one.
    """
    if (name := version.tags.get(BASE_VERSION)) and not (base := version.registry.resolve(name)).description:
        store_imported_card(base)
    with warn_on_failure(f"model card of {version}"):
        task, origin = task_of(version.stored), version.tags.get("imported_from", "")
        readme = source / CARD if source is not None else None
        stated = front_matter(readme.read_text(encoding="utf-8")) if readme is not None and readme.is_file() else {}
        about: dict[str, Any] = {
            key: stated[key] for key in ("license", "license_name", "license_link", "language") if key in stated
        }
        headline = f"Imported{f' from `{origin}`' if origin else ''} and not evaluated here."
        lines = [f"{architecture(version.stored)}.", f"Licence: {about.get('license', 'not stated')}."]
        sections = [usage_section(version.name, task, ""), lineage_section(version.run_id, version.tags)]
        metadata: dict[str, Any] = {
            **about,
            **hugging_face_metadata(str(version), task, (), "", (), version.tags.get("base_version", "")),
        }
        written = ModelCard(str(version), headline, " ".join(lines), sections, metadata)
        store_card(version, written.readme(), written.description(MAX_DESCRIPTION))
        describe_model(
            version, "Imported; `loopwright run --set SECTION.base=NAME@ALIAS` trains from it.", {"task": task}
        )


def card(version: ModelVersion) -> str:
    """A version's model card without its metadata; empty for a version of earlier releases.

    Of a server's version the card alone is downloaded.
    """
    client, run_id = version.registry.client, version.run_id
    (folder, *_) = [file.path for file in client.list_artifacts(run_id, f"{_artifact_path(version)}/data")] or [""]
    path = f"{folder}/{CARD}"
    if not folder or not any(file.path == path for file in client.list_artifacts(run_id, folder)):
        return version.description
    with tempfile.TemporaryDirectory() as scratch:
        return body(Path(client.download_artifacts(run_id, path, scratch)).read_text(encoding="utf-8"))


def _artifact_path(version: ModelVersion) -> str:
    """The path of a version's MLflow model among the artifacts of its run."""
    return version.source.removeprefix(f"runs:/{version.run_id}/")


def latest_run(registry: Registry, stage: str) -> tuple[str, str] | None:
    """Ids of the experiment and of the newest run of a stage; None before its first."""
    client = registry.client
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    runs = client.search_runs([experiment], f"tags.stage = '{stage}'", max_results=1, order_by=["start_time DESC"])
    return (experiment, runs[0].info.run_id) if runs else None


def describe_model(version: ModelVersion, description: str, tags: Mapping[str, str]) -> None:
    """Describe a registered model, unless a person did: what its versions are for, and tags to filter by."""
    client = version.registry.client
    model = client.get_registered_model(version.name)
    if not model.description:
        client.update_registered_model(version.name, description)
    for key, value in tags.items():
        if model.tags.get(key) != value:
            client.set_registered_model_tag(version.name, key, value)
