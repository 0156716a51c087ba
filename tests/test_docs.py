"""README and docs agree with the code: routes, parameters, files and links exist, the listed paths are true."""

from __future__ import annotations

import ast
import json
import re
import sys
import threading
import tomllib
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import yaml

from benchmarks import shape
from components.config.params import Params
from components.runtime.stage import STAGE_MODULES
from serving.http.app import new_api
from serving.observability.metrics import Metrics
from tests.pages import ROOT, SPAN, fences, is_parameter, prose
from tests.serving.conftest import build_agent, open_local

DECISIONS = sorted((ROOT / "docs/decisions").glob("[0-9]*.md"))
README_LINES = 150
DECISION_LINES = 40

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_ROUTE = re.compile(r"\b(GET|POST) (/[\w/{}.-]*)|`(/v1/[\w/{}.-]+|/livez|/readyz|/metrics)`")
_FOLDERS = "components|flows|serving|loopwright|examples|tests|docs|benchmarks"
_FILE = re.compile(rf"`((?:{_FOLDERS})/[\w./-]+\.(?:py|md|yaml|jinja))`")
_MODULE = re.compile(r"`((?:components|flows|serving)\.[\w.]+)`")


def test_parameters_exist() -> None:
    sections = {field.alias or name for name, field in Params.model_fields.items()}
    pages = ((span, found[1]) for span, found in prose(SPAN) if span.page.name != "CHANGELOG.md")
    spans = ((span, name) for span, name in pages if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", name))
    named = [(span, name) for span, name in spans if name.partition(".")[0] in sections]
    assert len(named) > 20
    # `prepare.py` and its like are files.
    assert not [f"{span.place}: {name}" for span, name in named if not name.endswith(".py") and not is_parameter(name)]


def test_values_in_yaml_blocks_are_parameters() -> None:
    blocks = [(block, yaml.safe_load(block.text)) for block in fences("yaml")]
    keys = [(block, f"{section}.{key}") for block, values in blocks for section in values for key in values[section]]
    assert keys
    assert not [f"{block.place}: {key}" for block, key in keys if not is_parameter(key)]


def test_python_and_json_blocks_are_valid() -> None:
    blocks = {language: list(fences(language)) for language in ("python", "json")}
    assert all(blocks.values()), "the fences are found"
    for block in blocks["python"]:
        ast.parse(block.text, filename=block.place)
    for block in blocks["json"]:
        for line in block.text.splitlines() if block.page.name == "formats.md" and "\n[" not in block.text else ():
            if line[0] == "{":
                json.loads(line)


def test_routes_exist() -> None:
    paths = {path: set(operations) for path, operations in new_api().openapi()["paths"].items()}
    faults = []
    for span, found in prose(_ROUTE):
        method, path = (found[1] or "").lower(), (found[2] or found[3]).rstrip(".")
        path = re.sub(r"\{\w+\}", "{}", path)
        known = {re.sub(r"\{[\w:]+\}", "{}", one): methods for one, methods in paths.items()}
        if path not in known or (method and method not in known[path]):
            faults.append(f"{span.place}: {found[0]}")
    assert not faults


def test_metrics_and_environment_variables_exist() -> None:
    metrics = Metrics().text().decode()
    folders = (*shape.PACKAGES, "tests")
    code = "".join(path.read_text(encoding="utf-8") for folder in folders for path in (ROOT / folder).rglob("*.py"))
    named = [(span, found[0]) for span, found in prose(re.compile(r"\bloopwright_[a-z_]+|LOOPWRIGHT_[A-Z_]+"))]
    assert len(named) > 10
    known = {"loopwright": metrics + code, "LOOPWRIGHT": code}
    assert not [f"{span.place}: {name}" for span, name in named if name not in known[name.partition("_")[0]]]


def test_files_and_modules_exist() -> None:
    missing = [f"{span.place}: {found[1]}" for span, found in prose(_FILE) if not (ROOT / found[1]).exists()]
    for span, found in prose(_MODULE):
        path = ROOT / found[1].replace(".", "/")
        if not (path.is_dir() or path.with_suffix(".py").is_file()):
            missing.append(f"{span.place}: {found[1]}")
    assert not missing


def anchor(heading: str) -> str:
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_links_resolve() -> None:
    faults = []
    for span, found in prose(_LINK):
        target, _, section = found[1].partition("#")
        if "://" in target:
            continue
        page = (span.page.parent / target).resolve() if target else span.page
        headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE) if page.is_file() else []
        if not page.exists() or (section and section not in {anchor(one) for one in headings}):
            faults.append(f"{span.place}: {found[1]}")
    assert not faults


def test_the_readme_is_short_and_names_every_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= README_LINES
    pages = [page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").glob("*.md")]
    assert not [page for page in pages if page not in text and page not in ("docs/dependencies.md",)]


def test_a_decision_is_one_short_record() -> None:
    index = (ROOT / "docs/decisions/README.md").read_text(encoding="utf-8")
    assert [int(page.name[:4]) for page in DECISIONS] == list(range(1, len(DECISIONS) + 1))
    for page in DECISIONS:
        text = page.read_text(encoding="utf-8")
        assert text.startswith(f"# {int(page.name[:4])}. "), page.name
        assert text.count("\n") <= DECISION_LINES, page.name
        for part in ("Context", "Decision", "Evidence", "What would change it"):
            assert f"**{part}.**" in text, f"{page.name}: {part}"
        assert f"]({page.name}) | {text.partition('. ')[2].partition(chr(10))[0]} |" in index, page.name


def test_every_dependency_has_a_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = [one for names in project["project"]["optional-dependencies"].values() for one in names]
    listed = [*project["project"]["dependencies"], *project["dependency-groups"]["dev"], *extras]
    rows = re.findall(r"^\| (.+?) \|", (ROOT / "docs/dependencies.md").read_text(encoding="utf-8"), re.MULTILINE)
    explained = {name.partition("[")[0] for row in rows for name in re.sub(r"\*.*?\*", "", row).strip().split(", ")}
    named = {re.split(r"[\[<>=]", one)[0] for one in listed}
    assert explained - {"package", "---"} == named


def paths() -> dict[str, str]:
    """The sections `## Path: NAME` of docs/architecture.md."""
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    sections = [text.split("\n## ")[0] for text in page.split("\n## Path: ")[1:]]
    return {text.partition("\n")[0]: text for text in sections}


def test_a_path_lists_files_that_lead_to_each_other() -> None:
    """Every listed file imports another listed one or is imported by one; stages are imported by name."""
    graph = shape.import_graph()
    graph["components.runtime.stage"] |= set(STAGE_MODULES.values())
    assert list(shape.walks()) == ["one chat request", "one vote to champion", "one document to answer"]
    for name, files in shape.walks().items():
        modules = {file.removesuffix(".py").replace("/", ".") for file in files}
        linked = {one for one in modules for other in modules if other in graph[one] or one in graph[other]}
        assert modules == linked, name


@pytest.fixture
def executed(tmp_path: Path) -> set[str]:
    """The modules of the four packages whose functions a chat request calls, on whatever thread."""
    files: set[str] = set()
    listening = threading.Event()

    def call(frame: FrameType, event: str, _: Any) -> None:
        # The sign of life, which comes every second, is no part of a request.
        if event == "call" and listening.is_set() and threading.current_thread().name != "replica":
            files.add(frame.f_code.co_filename)

    threading.setprofile(call)
    sys.setprofile(call)
    try:
        with open_local(build_agent(tmp_path / "agent"), tmp_path / "home") as local:
            local.ask("Hello")
            listening.set()
            answered = local.ask("What is 6*7?").json()
            listening.clear()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    assert answered["choices"][0]["message"]["steps"][0]["name"] == "calculate"
    sources = {str(path): path for path in shape.sources()}
    return {sources[file].relative_to(ROOT).as_posix() for file in files if file in sources}


def test_the_path_of_a_chat_request_is_what_it_executes(executed: set[str]) -> None:
    section = paths()["one chat request"]
    listed = set(shape.walks()["one chat request"])
    leaves = {name.replace(".", "/") + ".py" for name in _MODULE.findall(section)}
    # What no path lists, as the page says.
    beside = tuple(f"components/{name}/" for name in ("config", "media", "models", "runtime", "tracking"))
    names = ("decode_step", "packed_weights", "paged_memory", "prefix_cache", "sampling", "slot_cache")
    arithmetic = {f"components/inference/{name}.py" for name in names}
    told = {file for file in executed if not file.startswith((*beside, "serving/observability/"))} - arithmetic
    assert told == listed | leaves


def test_the_packages_of_the_page_are_those_of_the_code() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    given = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert given == {path.parent.name for path in (ROOT / "components").glob("*/__init__.py")}


def test_the_changelog_has_the_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[:2] == ["Unreleased", project["version"]]
