"""Held-out rows of the classifier's and the summarizer's datasets, and the outputs saved with a model for them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from components.config.params import Params
from components.datasets.formats import Row, first_per_suite, read_rows, split_digest, write_json

Section = Literal["classifier", "summarizer"]
Figures = dict[str, Any]
OUTPUTS: Mapping[Section, str] = {"classifier": "predictions", "summarizer": "written"}
"""Outputs are saved as NAME.parquet, and the digest of the rows they are of as NAME.json."""
TEST = "test"
"""Suite of rows that name none: a user's own held-out rows."""


def read_held_out(section: Section, collected: Path, params: Params) -> list[Row]:
    """The first `assess.max_texts` held-out rows of each suite of a section's datasets."""
    rows = chain.from_iterable(read_rows(collected / name, "test") for name in params.datasets[section])
    return list(first_per_suite(rows, params.assess.max_texts))


def suites(rows: Sequence[Row]) -> dict[str, list[int]]:
    """Indices of each suite's rows."""
    indices: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        indices.setdefault(row.get("suite") or TEST, []).append(index)
    return dict(sorted(indices.items()))


def held_out_digest(section: Section, collected: Path, params: Params) -> str:
    """Identity of the held-out rows: two assessments compare only when theirs are equal."""
    folders = [collected / name for name in params.datasets[section]]
    return split_digest(folders, "test", params.assess.model_dump_json())


def save_outputs(section: Section, folder: Path, columns: Mapping[str, Any], digest: str) -> None:
    """Write a model's outputs for the held-out rows of a digest."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(dict(columns)), folder / f"{OUTPUTS[section]}.parquet")
    write_json(folder / f"{OUTPUTS[section]}.json", {"held_out_digest": digest})


def saved_outputs(section: Section, folder: Path | None, digest: str) -> dict[str, list[Any]] | None:
    """The columns of outputs saved in a folder, if there are any and they are of the rows of this digest."""
    name = OUTPUTS[section]
    if folder is None or not all((folder / f"{name}.{suffix}").is_file() for suffix in ("json", "parquet")):
        return None
    saved = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["held_out_digest"]
    return pq.read_table(folder / f"{name}.parquet").to_pydict() if saved == digest else None


def flat_metrics(figures: Figures, score: str) -> dict[str, float]:
    """The figures under the names of the tracker and the registry; `score` is the metric that counts for a suite."""
    flat = {"score": float(figures["score"])}
    for suite, values in figures["suites"].items():
        flat |= {f"{suite}/{key}": float(value) for key, value in values.items()}
        flat[f"{suite}/score"] = float(values[score])
    return flat
