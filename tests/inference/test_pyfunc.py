"""A registered classifier as MLflow's generic model."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import yaml

from components.config.params import InputError
from components.inference.pyfunc import _load_pyfunc
from components.runtime.model_tasks import task_of
from components.tracking.mlflow_client import save_pyfunc


def test_rows_come_as_texts_or_as_a_column(classifier_folder: Path) -> None:
    model = _load_pyfunc(str(classifier_folder))
    assert model.predict(["iron", "cow"]) == ["metal", "animal"]
    assert model.predict(pd.DataFrame({"id": [1], "text": ["plum"]})) == ["fruit"]
    assert model.predict(pd.DataFrame({"words": ["plum"]})) == ["fruit"]


def test_a_folder_is_saved_with_the_loader_of_its_task(classifier_folder: Path, tmp_path: Path) -> None:
    save_pyfunc(classifier_folder, tmp_path / "model")
    flavor = yaml.safe_load((tmp_path / "model/MLmodel").read_text())["flavors"]["python_function"]
    assert flavor["loader_module"] == "components.inference.pyfunc"


def test_the_task_of_a_folder_is_told_by_its_architecture(classifier_folder: Path, tmp_path: Path) -> None:
    assert task_of(classifier_folder) == "classify"
    with pytest.raises(InputError, match=r"config\.json: not a readable model configuration"):
        task_of(tmp_path)
    for architecture, task in (("Qwen3ForCausalLM", "chat"), ("T5ForConditionalGeneration", "summarize")):
        (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
        assert task_of(tmp_path) == task
