"""A registered classifier is a tool while it has a champion, and is loaded when it is called."""

from __future__ import annotations

from pathlib import Path

from components.agent.tools import call
from components.registry import Registry
from serving.model_tools import ModelTools


def test_the_champion_is_called_and_followed(classifier_folder: Path, tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    models = ModelTools(registry, ["classifier"], seconds=0.0)
    assert models.tools() == []
    registry.promote(registry.register(classifier_folder, "classifier", {"score": 0.9}, {}, None))
    (tool,) = models.tools()
    assert (tool.name, tool.parameters["required"]) == ("classify", ["text"])
    assert not models._readers
    said = [call([tool], "classify", {"text": text}) for text in ("apple", "zinc", "cow")]
    assert said == ["fruit", "metal", "animal"]
    assert list(models._readers) == ["classifier/1"]
    registry.promote(registry.register(classifier_folder, "classifier", {"score": 0.9}, {}, None))
    assert call(models.tools(), "classify", {"text": "pear"}) == "fruit"
    assert list(models._readers) == ["classifier/2"]


def test_without_a_name_the_registry_is_not_asked(tmp_path: Path) -> None:
    assert ModelTools(Registry(tmp_path / "nothing"), [], seconds=0.0).tools() == []
    assert not (tmp_path / "nothing").exists()
