"""The module that says what is a project's own: found by name, refused in one line, its defaults below params.yaml."""

from __future__ import annotations

import shutil
from pathlib import Path
from textwrap import dedent

import pytest

from components.config.params import InputError, load_params, moved_project
from components.config.project import load_project

PARAMS = Path(__file__).parents[2] / "params.yaml"
MODULE = dedent("""\
    datasets = {"chats": "conversations"}
    smoke_questions = {}
    scales = {"all": {"tune": {"dataset": "chats", "max_steps": 7}}, "smoke": {"collect": {"modules": ["a"]}}}

    def rows(name, collecting): ...

    def tools(folder):
        return []
""")
DATASETS = {
    **{f"pretrain{family}.dataset": "texts" for family in (".decoder", ".encoder", ".encoder_decoder")},
    "classifier.dataset": "labels",
    "summarizer.dataset": "pairs",
}
"""Of the sections for which the module above names none."""


def write(root: Path, name: str, text: str = MODULE) -> Path:
    """A project folder whose params.yaml names the module."""
    path = root.joinpath(*name.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    given = PARAMS.read_text().replace("project: examples.stdlib_agent", f"project: {name}")
    (root / "params.yaml").write_text(given.replace("examples/stdlib_agent", path.relative_to(root).as_posix()))
    return root / "params.yaml"


def test_a_module_in_the_project_folder_is_the_project(tmp_path: Path) -> None:
    params = load_params(write(tmp_path, "own_project"), DATASETS)
    assert (params.project, params.project_path) == ("own_project", "own_project.py")
    project = load_project(params.project, tmp_path)
    assert (project.datasets, list(project.tools(tmp_path))) == ({"chats": "conversations"}, [])
    assert project.tool_files is None


def test_the_projects_defaults_lie_between_the_scale_and_params_yaml(tmp_path: Path) -> None:
    path = write(tmp_path, "defaults_project")
    smoke = load_params(path, DATASETS | {"scale": "smoke"})
    assert (smoke.tune.datasets, smoke.tune.max_steps, smoke.collect.modules) == (["chats"], 7, ["a"])
    assert load_params(path, DATASETS | {"tune.max_steps": 9}).tune.max_steps == 9
    with pytest.raises(InputError, match=r"^params.yaml: pretrain.decoder.dataset: Field required$"):
        load_params(path)


def test_the_default_project_needs_no_line_in_params_yaml(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("scale: smoke\n")
    params = load_params(tmp_path / "params.yaml")
    assert params.project == load_params(PARAMS).project
    assert params.tune.datasets == load_params(PARAMS).tune.datasets


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("nowhere.at_all", None, r"params.yaml: project: 'nowhere.at_all': no module 'nowhere' here"),
        ("no-name", None, r"params.yaml: project: 'no-name' is not the name of a module"),
        (3, None, r"params.yaml: project: 3 is not the name of a module"),
        ("lame_project", "import nothing_of_the_sort", r".*'lame_project' imports 'nothing_of_the_sort', which is not"),
        (
            "bare_project",
            "datasets = {}",
            r".*'bare_project' has no rows, tools, smoke_questions; a project's module h",
        ),
        ("odd_project", MODULE + "datasets = []", r"params.yaml: project: odd_project.datasets: list is not a dict"),
    ],
)
def test_a_module_that_is_no_project_is_refused_in_one_line(
    name: str, text: str | None, message: str, tmp_path: Path
) -> None:
    if text is None:
        shutil.copy(PARAMS, tmp_path / "params.yaml")
    else:
        write(tmp_path, name, text)
    with pytest.raises(InputError, match=f"^{message}") as refused:
        load_params(tmp_path / "params.yaml", {"project": name, "project_path": None})
    assert "\n" not in str(refused.value)


def test_a_fault_within_the_module_keeps_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        load_params(write(tmp_path, "broken_project", "1 / 0"))


def test_project_path_follows_project(tmp_path: Path) -> None:
    path = write(tmp_path, "teams.first")
    write(tmp_path, "teams.second")
    assert moved_project(path, {}) == {}
    assert moved_project(path, {"project": "teams.first"}) == {"project_path": "teams/first.py"}
    shutil.move(path, tmp_path / "kept.yaml")
    path.write_text((tmp_path / "kept.yaml").read_text().replace("project: teams.second", "project: teams.first"))
    with pytest.raises(
        InputError, match=r"^params.yaml: project_path: 'teams/second.py' is not the path of teams.first"
    ):
        load_params(path)
    assert moved_project(path, {}) == {"project_path": "teams/first.py"}
