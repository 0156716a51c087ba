"""params.yaml: the dial, the overrides, and what each mistake is told."""

from pathlib import Path

import pytest
import yaml

from components.config.params import FAMILIES, RENAMED, InputError, load_params
from components.config.paths import find_root

ROOT = Path(__file__).parents[2]
PARAMS = ROOT / "params.yaml"


@pytest.mark.parametrize("scale", ["smoke", "laptop", "gpu", "cluster"])
def test_every_scale_gives_a_value_to_every_key(scale: str) -> None:
    assert load_params(PARAMS, {"scale": scale}).scale == scale


def test_a_value_of_params_wins_over_its_scale() -> None:
    assert load_params(PARAMS, {"scale": "smoke", "pretrain.decoder.max_steps": 7}).pretrain.decoder.max_steps == 7


def test_a_dataset_may_be_a_name_or_a_list() -> None:
    assert load_params(PARAMS, {"tune.dataset": ["a", "b"]}).tune.datasets == ["a", "b"]
    assert load_params(PARAMS, {"tune.dataset": "a"}).tune.datasets == ["a"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"scale": "huge"}, "params.yaml: scale: 'huge' is not one of smoke, laptop, gpu, cluster"),
        ({"pretrain.steps": 3}, "params.yaml: pretrain.steps: unknown key"),
        ({"pretrain.encoder.steps": 3}, "params.yaml: pretrain.encoder.steps: unknown key"),
        ({"pretrian.max_steps": 3}, "params.yaml: pretrian: unknown key"),
        (
            {"pretrain.decoder.learning_rate": -1},
            "params.yaml: pretrain.decoder.learning_rate: -1: Input should be greater than 0",
        ),
        ({"pretrain.decoder.micro_batch_size": 3}, "micro_batch_size: 3 does not divide global_batch_size 8"),
        ({"model.decoder.head_dim": 7}, "head_dim 7 is odd"),
        ({"model.decoder.num_kv_heads": 2, "model.decoder.num_heads": 3}, "num_kv_heads 2 does not divide num_heads 3"),
        ({"prepare.decoder.seq_len": 4096}, "prepare.decoder.seq_len: 4096 exceeds model.decoder.max_seq_len 512"),
        ({"pretrain": 3}, "params.yaml: pretrain: expected a section, found 3"),
        ({"tune.dataset": 3}, "params.yaml: tune.dataset: 3: Input should be a valid string or a valid list"),
        ({"tune.dataset": ["a", 3]}, "params.yaml: tune.dataset.1: 3: Input should be a valid string"),
        ({"tune.optimizer": "sgd"}, "params.yaml: tune.optimizer: 'sgd': Input should be 'adamw' or 'muon'"),
    ],
)
def test_wrong_values_are_named_with_their_place(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_params(PARAMS, {"scale": "laptop", **overrides})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "old",
    ["pretrain.dataset", "pretrain.max_steps", "model.embed_dim", "prepare.seq_len", "train_tokenizer.vocab_size"],
)
def test_the_name_that_a_value_had_before_families_is_refused_with_the_one_it_has(old: str, tmp_path: Path) -> None:
    section, key = old.split(".")
    message = f"{old}: each family has its own values; write {section}.decoder.{key}"
    with pytest.raises(InputError, match=message):
        load_params(PARAMS, {old: 3})
    path = tmp_path / "params.yaml"
    path.write_text(f"scale: smoke\n{section}:\n  {key}: 3\n  encoder: {{}}\n")
    with pytest.raises(InputError, match=message):
        load_params(path)


@pytest.mark.parametrize("old", RENAMED)
def test_the_name_that_a_key_had_before_is_refused_with_the_new_one(old: str, tmp_path: Path) -> None:
    message = f"params.yaml: {old}: renamed; write {RENAMED[old]}"
    with pytest.raises(InputError) as caught:
        load_params(PARAMS, {old: 0.3})
    assert str(caught.value) == message
    path = tmp_path / "params.yaml"
    *sections, key = old.split(".")
    content: dict[str, object] = {key: 0.3}
    for section in reversed(sections):
        content = {section: content}
    path.write_text(yaml.safe_dump({"scale": "smoke", **content}))
    with pytest.raises(InputError) as caught:
        load_params(path)
    assert str(caught.value) == message


def test_broken_yaml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("scale: [")
    with pytest.raises(InputError, match="not valid YAML"):
        load_params(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not found"):
        load_params(tmp_path / "params.yaml")


def test_the_project_is_found_from_a_folder_inside_it() -> None:
    assert find_root(ROOT / "components" / "data") == ROOT


def test_outside_a_project_the_message_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no Loopwright project here or above"):
        find_root(tmp_path)


def test_sections_with_datasets_are_present_so_that_dvc_can_watch_them() -> None:
    given = yaml.safe_load(PARAMS.read_text())
    assert all("dataset" in given["pretrain"][family] for family in FAMILIES)
    assert "dataset" in given["tune"]
