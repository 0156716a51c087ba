"""A section's `base`: the model lies where the stages read it before DVC looks, and goes when it is named no more."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from components.config.params import InputError
from components.config.paths import Paths
from components.tracking.model_import import import_model, inspect_model
from components.tracking.registry import Registry
from flows.orchestration.base_models import fetch_base_models
from tests.tracking.test_model_import import SOURCE, decoder, encoder


@pytest.fixture
def paths(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Paths:
    monkeypatch.setenv("LOOPWRIGHT_HOME", str(home))
    shutil.copy(SOURCE / "params.yaml", tmp_path / "params.yaml")
    return Paths(tmp_path)


def name(paths: Paths, base: str) -> None:
    params = yaml.safe_load(paths.params.read_text())
    params["tune"]["base"] = base
    paths.params.write_text(yaml.safe_dump(params))


def test_a_named_model_is_fetched_once_and_goes_when_it_is_named_no_more(paths: Paths) -> None:
    folder, said = decoder(paths.root / "theirs"), list[str]()
    import_model(folder, inspect_model(folder), "stranger", Registry(paths.home))
    place = paths.imported("decoder")
    assert paths.start_of("decoder") == paths.base("decoder")
    for base, origin in (("stranger@champion", {"version": "stranger/1"}), ("theirs", {"folder": "theirs"})):
        name(paths, base)
        for _ in range(2):
            fetch_base_models(paths, said.append)
        assert origin.items() <= json.loads((place / "origin.json").read_text()).items()
        assert (place / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
        assert paths.start_of("decoder") == place
    name(paths, "")
    fetch_base_models(paths, said.append)
    assert not (place / "config.json").exists()
    assert paths.start_of("decoder") == paths.base("decoder")
    assert [line.partition(" (")[0] for line in said] == [
        "tune.base: stranger@champion",
        "tune.base: theirs",
        "tune.base: none; tune starts from the pretrained model again",
    ]


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("nowhere/at/all", r"tune\.base: nowhere/at/all: no model folder \(no config\.json there\), and no NAME@ALIAS"),
        ("nobody@champion", "nobody@champion: not in the registry|nobody: no such model in the registry"),
        ("bert", r"params\.yaml: tune\.base: bert: BertForMaskedLM is no decoder; name a model that is"),
    ],
)
def test_a_base_that_cannot_be_one_is_one_line(base: str, message: str, paths: Paths) -> None:
    encoder(paths.root / "bert")
    name(paths, base)
    with pytest.raises(InputError, match=message):
        fetch_base_models(paths, print)
    assert not (paths.imported("decoder") / "config.json").exists()
