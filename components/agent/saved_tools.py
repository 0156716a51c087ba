"""The tools saved in a model folder: `agent.json` names them, `tools/source` has the modules that define them.

    agent.json        tools (names), source: {function: "MODULE:FUNCTION" that returns them, sha256 of the modules}
    tools/source/     the module of that function, and those modules of its project that it imports
    tools/files/      what the tools read, written by the project's `tool_files`

The modules are imported from the folder under unique names, so that models with different versions of the same tools
can share a process, and run on a machine without the project. That runs code:
see docs/decisions/0001-tools-in-models.md.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import importlib.util
import json
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from components.agent.tools import Tool
from components.config.params import InputError, load_params
from components.config.paths import AGENT, TOOLS, Paths
from components.config.project import DEFAULT_PROJECT, Collecting, Project, load_project, module_path

TOOL_FILES, TOOL_SOURCE = f"{TOOLS}/files", f"{TOOLS}/source"
PLATFORM = "components"
"""The package that a project's modules may import without saving it."""
_importing = threading.Lock()


def save_agent(project: Project, collecting: Collecting, paths: Paths) -> None:
    """Write the files that tuning saves beside the weights of the project's agent: its tools, and agent.json last.

    They go into data/agent, or wherever else the files of the tools, `collecting.files`, are in TOOL_FILES.

    Raises: InputError when a function cannot be a tool, or its source cannot be saved.
    """
    folder = collecting.files.parents[1]
    shutil.rmtree(folder, ignore_errors=True)
    collecting.files.mkdir(parents=True)
    if project.tool_files:
        project.tool_files(collecting)
    tools = as_tools(project.tools(collecting.files))
    agent: dict[str, Any] = {
        "tools": [tool.name for tool in tools],
        "forms": project.response_formats,
        "datasets": sorted(name for name, kind in project.datasets.items() if kind == "conversations"),
    }
    if tools:
        agent["source"] = save_source(project, folder / TOOL_SOURCE, paths.root)
    (folder / AGENT).write_text(json.dumps(agent, indent=2) + "\n", encoding="utf-8")
    try:
        load_tools(folder)
    except Exception as error:
        raise InputError(
            f"{project.name}: its saved tools cannot be imported: {type(error).__name__}: {error}"
        ) from error


def project_tools(paths: Paths) -> list[Tool]:
    """The tools of the project in params.yaml, as `collect` saved them, or saved now in the state folder.

    Raises: InputError when there is no such project, a function cannot be a tool, or its source cannot be saved.
    """
    params, own = load_params(paths.params), paths.home / "agent"
    project = load_project(params.project, paths.root)
    with tempfile.TemporaryDirectory() as scratch:
        source = save_source(project, Path(scratch), paths.root)
    folder = next((each for each in (paths.agent_files, own) if read_agent(each).get("source") == source), None)
    if folder is None:
        save_agent(project, Collecting(params.collect, params.seed, own / TOOL_FILES), paths)
    return load_tools(folder or own)


def as_tools(functions: Iterable[Tool | Callable[..., Any]]) -> list[Tool]:
    """Raises: InputError for a function that cannot be a tool, and for duplicate names."""
    tools = [each if isinstance(each, Tool) else Tool.of(each) for each in functions]
    names = [tool.name for tool in tools]
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"tool {duplicates[0]}: two tools have this name; give each its own")
    return tools


def load_tools(folder: Path) -> list[Tool]:
    """The tools that a model folder's agent.json names, in its order. Runs the folder's code.

    Raises: InputError when the code was changed after it was saved, or a tool is missing.
    """
    agent = read_agent(folder)
    if not agent["tools"]:
        return []
    if "source" in agent:
        tools = as_tools(_saved_function(folder, agent["source"])(folder / TOOL_FILES))
    else:
        tools = as_tools(load_project(DEFAULT_PROJECT).tools(folder))
    by_name = {tool.name: tool for tool in tools}
    if unknown := [name for name in agent["tools"] if name not in by_name]:
        raise InputError(f"{folder / AGENT}: tools: {unknown} are unknown; known are {sorted(by_name)}")
    return [by_name[name] for name in agent["tools"]]


def read_agent(folder: Path) -> dict[str, Any]:
    """The agent.json of a model folder; without tools where there is none.

    Raises: InputError when it cannot be read.
    """
    try:
        agent: dict[str, Any] = json.loads((folder / AGENT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"tools": []}
    except ValueError as error:
        raise InputError(f"{folder / AGENT}: not valid JSON: {error}") from None
    if not isinstance(agent, dict) or not isinstance(agent.get("tools"), list):
        raise InputError(f"{folder / AGENT}: expected an object with a list `tools`")
    return agent


def tool_tags(folder: Path) -> dict[str, str]:
    """Registry tags of a model folder's tools."""
    agent = read_agent(folder)
    source = agent.get("source", {})
    tags = {
        "tools": ", ".join(agent["tools"]),
        "tools_source": source.get("function"),
        "tools_sha256": source.get("sha256"),
    }
    return {name: value for name, value in tags.items() if value}


def check_source(folder: Path, sha256: str) -> None:
    """Raises: InputError when the code of a model folder's tools does not have this digest."""
    function = read_agent(folder).get("source", {}).get("function", "")
    _check(folder, _digest(function, _sources(folder / TOOL_SOURCE)), sha256)


def _check(folder: Path, actual: str, expected: str) -> None:
    if actual != expected:
        raise InputError(
            f"{folder / TOOL_SOURCE}: SHA-256 {actual[:12]} is not {expected[:12]}, as it was saved: this code is not"
            " run; restore the folder, or register the model again"
        )


def save_source(project: Project, folder: Path, root: Path) -> dict[str, str]:
    """Write the modules that define a project's tools; returns `source` of agent.json."""
    function, modules = _modules(project, root)
    for name, file in modules.items():
        path = Path(*name.split("."))
        target = folder / (path / file.name if file.name == "__init__.py" else path.with_suffix(".py"))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    return {"function": function, "sha256": _digest(function, _sources(folder))}


def adopt_tools(folder: Path, foreign: Path, paths: Paths | None) -> list[str]:
    """Save this project's tools in a copy of a foreign model folder where their code is the same, else none.

    Code from the foreign folder is neither run nor copied. Returns the names of the tools left out.
    """
    agent = read_agent(folder)
    if "source" not in agent:
        return []
    names: list[str] = agent["tools"]
    project = load_project(load_params(paths.params).project, paths.root) if paths else None
    own = save_source(project, folder / TOOL_SOURCE, paths.root) if paths and project else None
    if own == agent["source"]:
        if (foreign / TOOL_FILES).is_dir():
            shutil.copytree(foreign / TOOL_FILES, folder / TOOL_FILES)
        return []
    shutil.rmtree(folder / TOOLS, ignore_errors=True)
    without = {name: value for name, value in agent.items() if name != "source"} | {"tools": []}
    (folder / AGENT).write_text(json.dumps(without, indent=2) + "\n", encoding="utf-8")
    return names


def _modules(project: Project, root: Path) -> tuple[str, dict[str, Path]]:
    """The function that returns the tools, as MODULE:FUNCTION, and the files of the modules it imports, by name.

    A project with the tools of another, which is in this folder or beside it in one package, saves those of the other,
    so that both have the same source. What is installed elsewhere is not saved.
    """
    own, package = project.tools.__module__, project.name
    is_beside = own.partition(".")[0] == package.partition(".")[0]
    if not _is_within(own, package) and (is_beside or module_path(own, root)) and not _is_within(own, PLATFORM):
        package = own.rpartition(".")[0] or own
    module = own if _is_within(own, package) else package
    function = f"{module}:{project.tools.__qualname__ if module == own else 'tools'}"
    files: dict[str, Path] = {}
    todo = [module]
    while todo:
        name = todo.pop()
        spec = _spec(name)
        if name in files or spec is None or not (spec.origin or "").endswith(".py"):
            continue
        files[name] = file = Path(str(spec.origin))
        for imported in _imports(file, name if spec.submodule_search_locations else name.rpartition(".")[0]):
            if _is_within(imported, package):
                todo.append(imported if _spec(imported) else imported.rpartition(".")[0])
            elif not _is_within(imported, PLATFORM) and module_path(imported.partition(".")[0], root):
                raise InputError(
                    f"{file}: imports {imported}, which is outside the project {package} and is not saved"
                    f" with its tools; move it into the package {package}, or install it"
                )
    return function, dict(sorted(files.items()))


def _is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _spec(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError:  # the last part of `name` is not a module but, for example, a class
        return None


def _imports(file: Path, package: str) -> Iterator[str]:
    """All imports of a package's module; `a.b` for `from a import b`, which may be no module."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _sources(folder: Path) -> dict[Path, str]:
    """The text of each saved module by its path in the folder."""
    return {path.relative_to(folder): path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py"))}


def _digest(function: str, sources: Mapping[Path, str]) -> str:
    texts = sorted((path.as_posix(), text) for path, text in sources.items())
    return hashlib.sha256(json.dumps([function, texts]).encode()).hexdigest()


def _saved_function(folder: Path, source: Mapping[str, str]) -> Callable[[Path], Sequence[Any]]:
    """The function that returns the tools, imported from the folder after its digest is verified."""
    sources = _sources(folder / TOOL_SOURCE)
    _check(folder, _digest(source["function"], sources), source["sha256"])
    module, _, name = source["function"].partition(":")
    prefix = f"tools_{source['sha256'][:16]}"
    with _importing:
        if not any(isinstance(finder, _Saved) and finder.prefix == prefix for finder in sys.meta_path):
            sys.meta_path.append(_Saved(prefix, sources))
        function: Callable[[Path], Sequence[Any]] = getattr(importlib.import_module(f"{prefix}.{module}"), name)
    return function


class _Saved(MetaPathFinder, InspectLoader):
    """Imports saved modules as `PREFIX.NAME`, and redirects their imports of each other to these."""

    def __init__(self, prefix: str, sources: Mapping[Path, str]) -> None:
        self.prefix = prefix
        self._texts: dict[str, str] = {"": ""}
        """By name; empty for packages without an `__init__.py`."""
        self._packages = {""}
        for path, text in sources.items():
            parents = [".".join(parent.parts) for parent in path.parents]
            self._packages.update(parents)
            self._texts = dict.fromkeys(parents, "") | self._texts
            self._texts[parents[0] if path.name == "__init__.py" else ".".join(path.with_suffix("").parts)] = text

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        saved = fullname == self.prefix or fullname.startswith(f"{self.prefix}.")
        if not saved or self._name(fullname) not in self._texts:
            return None
        return importlib.util.spec_from_loader(fullname, self, is_package=self.is_package(fullname))

    def is_package(self, fullname: str) -> bool:
        return self._name(fullname) in self._packages

    def get_source(self, fullname: str) -> str:
        return self._texts[self._name(fullname)]

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_source(fullname), f"<{fullname}>")

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": self._import}
        super().exec_module(module)

    def _name(self, fullname: str) -> str:
        return fullname[len(self.prefix) + 1 :]

    def _import(
        self, name: str, scope: Any = None, inner: Any = None, fromlist: Any = (), level: int = 0
    ) -> ModuleType:
        if level or name not in self._texts:
            return __import__(name, scope, inner, fromlist, level)
        module: ModuleType = __import__(f"{self.prefix}.{name}", scope, inner, fromlist, 0)
        return module if fromlist else getattr(module, name.partition(".")[0])
