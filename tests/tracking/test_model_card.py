"""Model cards: what Hugging Face reads of one, what fits MLflow, and what a version of an earlier release shows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard as HubCard
from hypothesis import given
from hypothesis import strategies as st

from components.evaluation.saved_outputs import Output, intervals, mistakes
from components.tracking.model_card import (
    CARD,
    ModelCard,
    Section,
    SuiteFigure,
    changes_section,
    compute,
    figures_section,
    gate_section,
    hugging_face_metadata,
    table,
    training_section,
    weaknesses_section,
)
from components.tracking.registry import ModelVersion, Registry
from components.tracking.version_files import MAX_DESCRIPTION, card, lineage, store_card, store_imported_card
from flows.model_cards import write_card

FIGURES = [SuiteFigure("price/new", 40, 0.25, (0.14, 0.40), 0.5, 0.3), SuiteFigure("small_talk", 20, 0.9)]
Register = Callable[..., ModelVersion]


def test_hugging_face_reads_the_metadata_and_the_scores(tmp_path: Path) -> None:
    metadata = hugging_face_metadata("shop/3", "chat", FIGURES, "exact_match", ["decoder"], "theirs/1")
    (tmp_path / CARD).write_text(
        ModelCard("shop/3", "Passed.", "A shop's agent.", [Section("Data", "None.")], metadata).readme()
    )
    read = HubCard.load(tmp_path / CARD)
    assert (read.data.library_name, read.data.pipeline_tag, read.data.base_model) == (
        "transformers",
        "text-generation",
        "theirs/1",
    )
    assert {row.dataset_name: row.metric_value for row in read.data.eval_results or []} == {
        "price/new": 0.25,
        "small_talk": 0.9,
    }
    assert "A shop's agent." in read.text


def test_a_description_fits_and_keeps_the_verdict_and_the_weaknesses() -> None:
    figures = [SuiteFigure(f"suite_{number}/held_out", 100, number / 300) for number in range(300)]
    findings = [
        {"skill": row.suite, "questions": 9, "champion": 0, "candidate": 1, "wins": 9, "losses": 0}
        | {"p_gain": 0.01, "p_fall": 1.0, "outcome": "better"}
        for row in figures
    ]
    sections = [
        figures_section(figures, "exact match", "", ""),
        gate_section("refused: it regresses", findings),
        weaknesses_section(figures, {}),
    ]
    whole = ModelCard("agent/9", "Refused.", "An agent.", sections)
    assert len(whole.readme()) > 4 * MAX_DESCRIPTION
    text = whole.description(MAX_DESCRIPTION)
    assert len(text) <= MAX_DESCRIPTION
    assert "Refused: it regresses." in text
    assert "**suite_0/held_out**: 0 of 1 on 100 questions." in text
    assert whole.description(10) == "Refused.\n\n"


@given(st.lists(st.text(), min_size=1, max_size=4))
def test_whatever_a_model_answers_stays_in_its_cell(texts: list[str]) -> None:
    lines = table([f"column {number}" for number in range(len(texts))], [texts]).split("\n")
    assert len(lines) == 3
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {len(texts) + 1}


def test_energy_is_that_of_busy_cores_and_gpus() -> None:
    stages = {"tune": {"seconds": 3600.0, "cpu_seconds": 7200.0, "gpus": 4}, "evaluate": _stage(1800.0)}
    assert compute(stages) == {"cpu_hours": 2.5, "gpu_hours": 4.0, "energy_kwh": pytest.approx(1.625)}
    assert compute({}) == {}


def _stage(cpu_seconds: float) -> dict[str, float]:
    return {"seconds": 60.0, "cpu_seconds": cpu_seconds, "gpus": 0}


def test_training_names_the_settings_of_each_stage_that_trained() -> None:
    settings = {"max_steps": 30, "global_batch_size": 8, "learning_rate": 0.003, "optimizer": "muon"}
    params = {"scale": "smoke", "seed": 0, "pretrain": {"decoder": settings}, "classifier": settings, "evaluate": {}}
    stages = {name: _stage(36.0) for name in ("pretrain@decoder", "finetune@classifier", "evaluate")}
    text = training_section({"params": json.dumps(params), "stages": json.dumps(stages)}).text
    assert "| pretrain@decoder | 30 | 8 | 0.003 | muon |  | 60 |" in text
    assert "| finetune@classifier | 30 | 8 | 0.003 | muon |  | 60 |" in text
    assert "3 stages took 0.03 CPU hours and 0 GPU hours, some 0.0003 kWh" in text


def test_changes_name_data_settings_and_code() -> None:
    before = {"dvc.data/collected/a": "1", "dvc.data/collected/b": "1", "params": '{"tune": {"max_steps": 30}}'}
    after = {"dvc.data/collected/a": "2", "dvc.data/collected/c": "1", "params": '{"tune": {"max_steps": 60}}'}
    assert changes_section(after, {**before, "git_commit": "c0ffee"}, "agent/1").text.split("\n") == [
        "- dataset c: new",
        "- dataset b: no longer used",
        "- dataset a: other rows",
        "- `tune.max_steps`: 30 → 60",
        "- code: commit c0ffee → ",
    ]
    assert changes_section(before, before, "agent/1").text.startswith("Nothing that is recorded")


def test_intervals_are_wilson_s_or_resampled() -> None:
    right = [Output("exact", "q", "a", "a", 1.0)] * 8 + [Output("exact", "q", "a", "b", 0.0)] * 2
    scores = np.random.default_rng(1).random(400)
    graded = [Output("graded", "q", "a", "b", float(score)) for score in scores]
    found = intervals([*right, *graded], is_classifier=False)
    assert found["exact"] == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Wilson (1927), 8 of 10
    half = 1.96 * scores.std() / 20
    assert found["graded"] == pytest.approx((scores.mean() - half, scores.mean() + half), abs=0.01)
    low, high = intervals([Output("labels", "", "x", "x", 1.0)] * 5, is_classifier=True)["labels"]
    assert (low, high) == (1.0, 1.0)
    assert mistakes(right, 1) == {"exact": [("q", "a", "b")]}


def test_a_card_is_in_the_folder_in_mlflow_and_in_lineage(registry: Registry, registered: Register) -> None:
    folder = registry.home / "agent"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    (folder / "model.safetensors").touch()
    made_from = {"dvc": {"data/collected/chats": "c0ffee"}, "params": {"seed": 7}, "python": "3.11"}
    version = registry.register(folder, "agent", {"score": 0.5}, {"gate": "passed"}, None, made_from)
    assert set(version.tags) == {"gate", "weights_sha256"}
    assert lineage(version) == {
        **version.tags,
        "dvc.data/collected/chats": "c0ffee",
        "params": '{"seed": 7}',
        "python": "3.11",
    }
    assert registry.client.get_run(version.run_id).data.params == {"seed": "7"}
    store_card(version, "---\nlicense: mit\n---\n\n# agent/1\n\nSold.\n", "# agent/1\n\nSold.\n")
    again = registry.resolve("agent/1")
    assert card(again) == "# agent/1\n\nSold.\n" == again.description
    assert yaml.safe_load((again.folder / CARD).read_text().split("---")[1]) == {"license": "mit"}


def test_a_card_that_cannot_be_written_ends_no_release(
    registry: Registry, registered: Register, capsys: pytest.CaptureFixture[str]
) -> None:
    version = registered(0.5)  # whose empty weights nobody can read
    write_card(registry, version, "refused")
    assert "model card of agent/1: not written: " in capsys.readouterr().err
    assert card(version) == ""


def test_an_imported_model_keeps_its_licence(registry: Registry, tmp_path: Path, agent_source: Path) -> None:
    version = registry.register(agent_source, "theirs", {}, {"imported_from": "/models/theirs"}, None)
    (tmp_path / CARD).write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# Theirs\n")
    store_imported_card(version, tmp_path)
    text = (registry.resolve("theirs/1").folder / CARD).read_text()
    assert yaml.safe_load(text.split("---")[1])["license"] == "apache-2.0"
    assert "Imported from `/models/theirs` and not evaluated here" in text
    assert registry.client.get_registered_model("theirs").description.startswith("Imported;")


@pytest.fixture
def agent_source(tmp_path: Path) -> Path:
    from safetensors.numpy import save_file

    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "config.json").write_text('{"architectures": ["Qwen3ForCausalLM"], "vocab_size": 9}')
    save_file({"weight": np.zeros((3, 4), np.float32)}, folder / "model.safetensors")
    return folder
