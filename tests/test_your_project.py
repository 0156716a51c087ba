"""docs/your-project.md as a reader follows it: its module is a project, its commands end with an answer by a tool."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from components.agent.saved_tools import TOOL_FILES, load_tools, save_agent
from components.agent.tools import call
from components.config.params import load_params
from components.config.paths import Paths
from components.config.project import Collecting, load_project
from components.tracking.registry import Registry
from examples.helpdesk import order_status
from flows.orchestration.dvc_repo import stage_states
from tests.conftest import SOURCE, clone

PAGE = (SOURCE / "docs/your-project.md").read_text(encoding="utf-8")
OTHERS = {
    **{f"pretrain{family}.dataset": "texts" for family in (".decoder", ".encoder", ".encoder_decoder")},
    "classifier.dataset": "labels",
    "summarizer.dataset": "pairs",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_module_of_the_page_is_a_project(tmp_path: Path) -> None:
    (module,) = blocks("python")
    (tmp_path / "shop.py").write_text(module)
    given = (SOURCE / "params.yaml").read_text().replace("project: examples.stdlib_agent", "project: shop")
    (tmp_path / "params.yaml").write_text(given.replace("examples/stdlib_agent", "shop.py"))
    paths = Paths(tmp_path)
    project, params = load_project("shop", tmp_path), load_params(paths.params, OTHERS)
    assert params.tune.datasets == ["shop-chats"]
    collecting = Collecting(params.collect, 0, paths.agent_files / TOOL_FILES)
    save_agent(project, collecting, paths)
    tools = load_tools(paths.agent_files)
    assert call(tools, "price", {"fruit": "plum", "count": 2}) == "5.00"
    assert call(tools, "price", {"fruit": "kiwi"}).endswith("'kiwi' is not one of ['pear', 'plum']")
    assert call(tools, "stock", {}) == "7 boxes"
    rows = project.rows("shop-chats", collecting)
    learned, (asked, _) = list(rows.train), rows.test
    assert len({row["id"] for row in learned}) == 4
    assert asked["messages"][-1]["content"] == "3.00 euros."


@pytest.mark.platform
@pytest.mark.timeout(900)
def test_the_commands_of_the_page_end_with_an_answer_that_called_a_tool(tmp_path: Path) -> None:
    project = clone(tmp_path / "project")
    (commands,) = blocks("sh")
    told = {}
    for command in filter(None, commands.splitlines()):
        _, name, *words = shlex.split(command)
        ended = project.loopwright(name, *words, "--json")
        assert ended.returncode == 0, f"{command}\n{ended.stderr}"
        told[name] = json.loads(ended.stdout)
    agent = told["run"]["releases"][0]
    assert (agent["version"], agent["question"]) == ("agent/1", "Where is order A102?")
    assert agent["answer"] == f"Your order is {order_status('A102')}.", "the served Bento called the tool"

    (choice,) = told["chat"]["choices"]
    assert choice["message"]["steps"] == [
        {"type": "call", "name": "order_status", "arguments": {"order": "A102"}},
        {"type": "result", "name": "order_status", "content": order_status("A102")},
    ]
    traced = project.ask("trace", told["chat"]["id"])["version"]["tags"]
    version = Registry(project.home).resolve("agent/1")
    sha256 = json.loads((version.folder / "agent.json").read_text())["source"]["sha256"]
    assert {key: traced[key] for key in ("tools", "tools_source", "tools_sha256")} == {
        "tools": "order_status, refund, opening_hours",
        "tools_source": "examples.helpdesk:tools",
        "tools_sha256": sha256,
    }

    # MLflow's model brings its own code and its tools: elsewhere there is neither this checkout nor the project.
    code = f"""if True:
        import sys, warnings
        warnings.simplefilter("ignore")
        sys.path[:] = [path for path in sys.path if path not in ("", {str(SOURCE)!r})]
        import mlflow.pyfunc
        model = mlflow.pyfunc.load_model({str(version.registry.files(version))!r})
        print(model.predict(["Where is order A102?"])[0])
        assert not [name for name in sys.modules if name.partition(".")[0] == "examples"]
    """
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ended.stdout == agent["answer"] + "\n", ended.stderr

    assert not [state.name for state in stage_states(project.root) if state.reasons]
    module = project.root / "examples/helpdesk/__init__.py"
    module.write_text(module.read_text() + "\n# A comment.\n")
    assert next(state for state in stage_states(project.root)).reasons == ("examples/helpdesk modified",)
