"""A registered classifier is a tool while it has a champion, and is loaded when it is called."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from components.agent.tools import MAX_RESULT, call, one_line
from components.config.errors import Unavailable
from components.inference.summarizer import Summarizer
from components.tracking.registry import Registry
from serving.engine import model_tools
from serving.engine.model_tools import ModelTools


def test_the_champion_is_called_and_followed(classifier_folder: Path, tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    models = ModelTools(registry, ["classifier", "summarizer"], seconds=0.0)
    assert models.tools() == []
    registry.promote(registry.register(classifier_folder, "classifier", {"score": 0.9}, {}, None))
    (tool,) = models.tools()
    assert (tool.name, tool.parameters["required"]) == ("classify", ["text"])
    assert not models._loaded
    said = [call([tool], "classify", {"text": text}) for text in ("apple", "zinc", "cow")]
    assert said == ["fruit", "metal", "animal"]
    assert models._loaded["classifier"][0] == "classifier/1"
    registry.promote(registry.register(classifier_folder, "classifier", {"score": 0.9}, {}, None))
    assert call(models.tools(), "classify", {"text": "pear"}) == "fruit"
    assert models._loaded["classifier"][0] == "classifier/2"


def test_a_summarizer_writes_what_its_folder_writes(summarizer_folder: Path) -> None:
    known = {"summarizer@champion": SimpleNamespace(folder=summarizer_folder)}
    registry: Any = SimpleNamespace(find=known.get, stamp=lambda: None)
    models = ModelTools(registry, ["classifier", "summarizer"], seconds=9.0)
    code = "def add a b return a + b"
    written = Summarizer.load(summarizer_folder).write([code])[0]
    assert call(models.tools(), "summarize", {"code": code}) == one_line(written, MAX_RESULT)


def test_the_known_tools_stay_while_the_registry_is_away_and_it_is_asked_ever_more_rarely(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, asked, away = [0.0], list[str](), list[Exception]()

    def find(name: str) -> Any:
        asked.append(name)
        if away:
            raise away[0]
        return SimpleNamespace()

    monkeypatch.setattr(model_tools, "time", SimpleNamespace(monotonic=lambda: now[0]))
    registry: Any = SimpleNamespace(find=find, stamp=object)
    models = ModelTools(registry, ["summarizer"], seconds=2.0)
    assert [tool.name for tool in models.tools()] == ["summarize"]
    away.append(Unavailable("MLFLOW_TRACKING_URI: no answer"))
    asked.clear()
    for second in range(1, 600):
        now[0] = second
        assert [tool.name for tool in models.tools()] == ["summarize"]
    assert 10 < len(asked) < 20


def test_no_request_waits_for_a_registry_on_another_machine() -> None:
    answers, waits = threading.Event(), threading.Event()
    answers.set()

    def find(_name: str) -> Any:
        if not answers.is_set():
            waits.set()
        return SimpleNamespace() if answers.wait(60) else None

    registry: Any = SimpleNamespace(find=find, stamp=lambda: None)
    models = ModelTools(registry, ["summarizer"], seconds=0.0)
    answers.clear()
    assert [tool.name for tool in models.tools()] == ["summarize"]
    assert waits.wait(60)
    assert [tool.name for tool in models.tools()] == ["summarize"]
    assert not answers.is_set()
    answers.set()


def test_without_a_name_the_registry_is_not_asked(tmp_path: Path) -> None:
    assert ModelTools(Registry(tmp_path / "nothing"), [], seconds=0.0).tools() == []
    assert not (tmp_path / "nothing").exists()
