"""The project to copy: small, complete, and true to its own tools."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from components.agent.saved_tools import as_tools, load_tools
from components.agent.tools import call
from components.config.params import load_params
from components.config.project import load_project
from components.datasets.collect import collect
from components.datasets.formats import read_info, read_rows
from tests.datasets.test_collect import stage_run

ROOT = Path(__file__).parents[2]
NAME = "examples.helpdesk"


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("helpdesk")
    collect(stage_run(folder, project=NAME, project_path="examples/helpdesk"))
    return folder / "data"


def test_it_has_less_than_150_lines_with_its_data() -> None:
    files = [path for path in (ROOT / "examples/helpdesk").iterdir() if path.is_file()]
    assert sum(len(path.read_text().splitlines()) for path in files) < 150


def test_its_datasets_are_the_default_of_every_section(collected: Path) -> None:
    project = load_project(NAME)
    assert {path.name for path in (collected / "collected").iterdir()} == set(project.datasets)
    params = load_params(ROOT / "params.yaml", {"project": NAME, "project_path": "examples/helpdesk"})
    assert params.tune.datasets == ["helpdesk-conversations"]
    conversations = read_info(collected / "collected/helpdesk-conversations")
    assert (conversations.rows, conversations.dropped) == ({"test": 17, "train": 40}, {})


def test_its_conversations_call_its_tools_and_say_what_these_answer(collected: Path) -> None:
    tools = as_tools(load_project(NAME).tools(collected))
    called = set()
    for split in ("train", "test"):
        for row in read_rows(collected / "collected/helpdesk-conversations", split):
            wanted = row["messages"][1]["tool_calls"][0]["function"]
            called.add(wanted["name"])
            assert call(tools, wanted["name"], json.loads(wanted["arguments"])) == row["messages"][2]["content"]
            assert (row["suite"] == f"{wanted['name']}/new_wordings") == (split == "test")
    assert called == {tool.name for tool in tools} == {tool.name for tool in load_tools(collected / "agent")}
