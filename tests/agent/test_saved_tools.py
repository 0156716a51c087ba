"""Tools travel with a model: their code is saved, found unchanged, and run without the project that it came from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from components.agent.saved_tools import (
    TOOL_FILES,
    TOOL_SOURCE,
    _digest,
    _sources,
    adopt_tools,
    check_source,
    load_tools,
    save_agent,
    tool_tags,
)
from components.agent.tools import call
from components.config.params import InputError, load_params
from components.config.paths import Paths
from components.config.project import Collecting, load_project
from components.tracking.registry import Registry
from examples.stdlib_agent import facts

SOURCE = Path(__file__).parents[2]
PROJECT = """\
    from {name}.parts import tools

    datasets = {{"chats": "conversations"}}
    smoke_questions = {{}}
    every = {{"dataset": "chats"}}
    scales = {{"all": {{name: every for name in ("tune", "classifier", "summarizer")}}}}
    scales["all"]["pretrain"] = {{"decoder": every, "encoder": every, "encoder_decoder": every}}

    def rows(name, collecting): ...

    def tool_files(collecting):
        (collecting.files / "prices.txt").write_text("pear 3")
"""
PARTS = """\
    import json
    from dataclasses import dataclass

    import {name}.numbers
    from components.agent.tools import Tool
    from {name} import words
    from .numbers import double as twice


    @dataclass
    class Order:
        fruit: str
        count: int = 1


    def price(order: Order) -> str:
        \"\"\"What an order costs.\"\"\"
        from {name}.late import shown

        return shown({name}.numbers.double(order.count), twice(1), words.WORD)


    def tools(folder):
        prices = (folder / "prices.txt").read_text()

        def listed() -> str:
            \"\"\"All prices.\"\"\"
            return prices

        return [price, Tool.of(listed, permissions=["files"])]
"""
MODULES = {
    "__init__": PROJECT,
    "parts": PARTS,
    "numbers": "def double(number: int) -> int:\n    return number * {factor}\n",
    "words": 'WORD = "euros"\n',
    "late": "def shown(*parts: object) -> str:\n    return ' '.join(map(str, parts))\n",
    "unused": "raise RuntimeError('not for the tools')\n",
}


def write_project(root: Path, name: str, factor: int = 2, **modules: str) -> Paths:
    (root / name).mkdir(parents=True)
    for module, text in (MODULES | modules).items():
        filled = dedent(text).replace("{factor}", str(factor))
        (root / name / f"{module}.py").write_text(filled.replace("{name}", name).replace("{{", "{").replace("}}", "}"))
    given = (SOURCE / "params.yaml").read_text().replace("project: examples.stdlib_agent", f"project: {name}")
    (root / "params.yaml").write_text(given.replace("project_path: examples/stdlib_agent", f"project_path: {name}"))
    return Paths(root)


def save(root: Path, name: str, factor: int = 2, **modules: str) -> Path:
    """What makes a model folder the agent of a project."""
    paths = write_project(root, name, factor, **modules)
    params = load_params(paths.params)
    save_agent(load_project(name, root), Collecting(params.collect, 0, paths.agent_files / TOOL_FILES), paths)
    return paths.agent_files


def test_the_modules_of_the_tools_are_saved_and_no_others(tmp_path: Path) -> None:
    folder = save(tmp_path, "fruit_saved")
    agent = json.loads((folder / "agent.json").read_text())
    assert (agent["tools"], agent["datasets"], agent["forms"]) == (["price", "listed"], ["chats"], False)
    assert agent["source"]["function"] == "fruit_saved.parts:tools"
    saved = {path.relative_to(folder / TOOL_SOURCE).as_posix() for path in (folder / TOOL_SOURCE).rglob("*.py")}
    assert saved == {f"fruit_saved/{module}.py" for module in ("parts", "numbers", "words", "late")}
    assert tool_tags(folder) == {
        "tools": "price, listed",
        "tools_source": "fruit_saved.parts:tools",
        "tools_sha256": agent["source"]["sha256"],
    }


ORDER = {"order": {"fruit": "pear", "count": 5}}


def test_two_versions_of_the_same_tools_live_in_one_process(tmp_path: Path) -> None:
    first = load_tools(save(tmp_path / "first", "fruit_twice"))
    for module in [module for module in sys.modules if module.startswith("fruit_twice")]:
        del sys.modules[module]
    sys.path.remove(str(tmp_path / "first"))
    second = load_tools(save(tmp_path / "second", "fruit_twice", factor=10))
    assert [call(tools, "price", ORDER) for tools in (first, second, first)] == [
        "10 2 euros",
        "50 10 euros",
        "10 2 euros",
    ]
    assert call(first, "listed", {}) == "pear 3"
    assert [sorted(tool.permissions) for tool in first] == [[], ["files"]]


def test_a_model_folder_calls_its_tools_on_a_machine_without_the_project(tmp_path: Path) -> None:
    folder = save(tmp_path / "here", "fruit_away").rename(tmp_path / "agent")
    code = f"""if True:
        import sys
        from pathlib import Path
        from components.agent.saved_tools import load_tools
        from components.agent.tools import call
        print(call(load_tools(Path({str(folder)!r})), "price", {ORDER!r}))
        assert not [name for name in sys.modules if name.partition(".")[0] in ("fruit_away", "examples")]
    """
    ended = subprocess.run([sys.executable, "-c", code], cwd=SOURCE, capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("10 2 euros\n", "")
    assert not list(folder.rglob("*.pyc")), "a model folder is never written to"


def test_changed_code_is_not_run(tmp_path: Path) -> None:
    folder = save(tmp_path, "fruit_changed")
    sha256 = json.loads((folder / "agent.json").read_text())["source"]["sha256"]
    check_source(folder, sha256)
    file = folder / TOOL_SOURCE / "fruit_changed/numbers.py"
    file.write_text(file.read_text() + "\nraise SystemExit('run all the same')\n")
    message = r"tools/source: SHA-256 [0-9a-f]{12} is not [0-9a-f]{12}, as it was saved: this code is not run"
    for act in (lambda: load_tools(folder), lambda: check_source(folder, sha256)):
        with pytest.raises(InputError, match=message):
            act()
    (folder / TOOL_SOURCE / "fruit_changed/more.py").write_text("")
    with pytest.raises(InputError, match=message):
        load_tools(folder)


def test_a_tool_that_imports_from_beside_its_project_is_refused(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("VALUE = 1\n")
    with pytest.raises(InputError, match=r"numbers\.py: imports beside\.VALUE, which is outside the project fruit_bes"):
        save(tmp_path, "fruit_beside", numbers="from beside import VALUE as double\n")


def test_a_project_with_the_tools_of_another_saves_those_of_the_other(tmp_path: Path) -> None:
    first = save(tmp_path, "fruit_first")
    (tmp_path / "fruit_first_agent").mkdir()
    first.rename(tmp_path / "fruit_first_agent/agent")
    extending = PROJECT.replace("from {name}.parts import tools", "from fruit_first import tools")
    second = save(tmp_path, "fruit_extended", __init__=extending)
    sources = [
        json.loads((folder / "agent.json").read_text())["source"]
        for folder in (tmp_path / "fruit_first_agent/agent", second)
    ]
    assert sources[0] == sources[1]
    assert {path.name for path in (second / TOOL_SOURCE).iterdir()} == {"fruit_first"}
    assert call(load_tools(second), "price", ORDER) == "10 2 euros"


def test_a_model_saved_before_tools_were_saved_calls_those_of_the_default_project(tmp_path: Path) -> None:
    facts.build(tmp_path / "knowledge.sqlite", [])
    (tmp_path / "agent.json").write_text('{"tools": ["calculate"], "max_steps": 4}')
    (tool,) = load_tools(tmp_path)
    assert call([tool], "calculate", {"expression": "6*7"}) == "42"
    assert tool_tags(tmp_path) == {"tools": "calculate"}
    check = load_tools(tmp_path / "nothing")
    assert check == []


def test_an_import_takes_tools_whose_code_is_the_projects_own(tmp_path: Path) -> None:
    folder = save(tmp_path / "here", "fruit_own")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy/agent.json").write_text((folder / "agent.json").read_text())
    assert adopt_tools(tmp_path / "copy", folder, Paths(tmp_path / "here")) == []
    assert call(load_tools(tmp_path / "copy"), "listed", {}) == "pear 3"


@pytest.mark.parametrize("known", [True, False])
def test_an_import_leaves_foreign_tools_out(tmp_path: Path, known: bool) -> None:
    folder = save(tmp_path / "here", f"fruit_foreign_{known}")
    file = folder / TOOL_SOURCE / f"fruit_foreign_{known}/numbers.py"
    file.write_text("raise SystemExit('imported code must not run')")
    agent = json.loads((folder / "agent.json").read_text())
    agent["source"]["sha256"] = "0" * 64
    (folder / "agent.json").write_text(json.dumps(agent))
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy/agent.json").write_text(json.dumps(agent))
    assert adopt_tools(tmp_path / "copy", folder, Paths(tmp_path / "here") if known else None) == ["price", "listed"]
    assert not (tmp_path / "copy/tools").exists()
    assert load_tools(tmp_path / "copy") == []


def test_the_registry_says_whose_tools_a_version_has_and_refuses_changed_code(
    registry: Registry, tmp_path: Path
) -> None:
    folder = save(tmp_path, "fruit_registered")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()
    version = registry.register(folder, "agent", {"score": 0.5}, {}, None)
    assert (version.tags["tools"], version.tags["tools_source"]) == ("price, listed", "fruit_registered.parts:tools")
    assert call(load_tools(version.folder), "price", ORDER) == "10 2 euros"
    file = version.folder / TOOL_SOURCE / "fruit_registered/numbers.py"
    file.write_text("raise SystemExit('run all the same')")
    agent = json.loads((version.folder / "agent.json").read_text())
    # Whoever changes the code may change the digest beside it, but not the registry's.
    agent["source"]["sha256"] = _digest(agent["source"]["function"], _sources(version.folder / TOOL_SOURCE))
    (version.folder / "agent.json").write_text(json.dumps(agent))
    with pytest.raises(InputError, match=r"SHA-256 [0-9a-f]{12} is not [0-9a-f]{12}, as it was saved"):
        _ = registry.resolve("agent/1").folder


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON: Expecting"), ("[]", "expected an object with"), ("{}", "expected an obj")],
)
def test_an_agent_json_that_cannot_be_read_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "agent.json").write_text(text)
    with pytest.raises(InputError, match=rf"agent\.json: {message}"):
        load_tools(tmp_path)


def test_tools_that_work_only_beside_their_project_are_refused_when_they_are_saved(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"fruit_file: its saved tools cannot be imported: NameErr"):
        save(tmp_path, "fruit_file", words="from pathlib import Path\nWORD = Path(__file__).name\n")
