"""The structure of the sources in figures: `python -m benchmarks.shape`.

Files and lines of the four packages (without the page, examples and benchmarks), circles of imports, modules outside
a package, files that name the example, lengths of functions, tests per source line, and the files on three paths
through the code as docs/architecture.md lists them.
"""

from __future__ import annotations

import ast
import json
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("components", "flows", "serving", "loopwright")
EXAMPLE = re.compile(r"stdlib|standard[ -]librar|json\.dumps[^(]", re.IGNORECASE)
Graph = dict[str, set[str]]


def sources() -> list[Path]:
    """Modules of the four packages; an empty `__init__.py` counts as no file."""
    paths = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return sorted(path for path in paths if path.stat().st_size)


def import_graph() -> Graph:
    """Which module imports which, lazy and type-checking imports included, by dotted name."""
    paths = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path for path in sources()}
    graph: Graph = {}
    for name, path in paths.items():
        imported: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                imported |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
        graph[name] = (imported & set(paths)) - {name}
    return graph


def circles(graph: Graph) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others."""
    reach = {name: set(_reachable(graph, name)) for name in graph}
    groups = {frozenset({name} | {other for other in reach[name] if name in reach[other]}) for name in graph}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def _reachable(graph: Graph, start: str) -> Iterator[str]:
    seen, todo = set(), list(graph[start])
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += graph[name]
            yield name


def function_lengths() -> list[int]:
    """Lines of each function and method."""
    return sorted(
        (node.end_lineno or 0) - node.lineno + 1
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )


def lines(paths: list[Path]) -> int:
    return sum(path.read_text(encoding="utf-8").count("\n") for path in paths)


def walks() -> dict[str, list[str]]:
    """The files on each path that docs/architecture.md follows: `path/file.py` below a heading `## Path: NAME`."""
    page = ROOT / "docs/architecture.md"
    if not page.is_file():
        return {}
    sections = re.split(r"^## Path: ", page.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    pattern = re.compile(rf"`((?:{'|'.join(PACKAGES)})/[\w/]+\.py)`")
    return {text.partition("\n")[0].strip(): sorted(set(pattern.findall(text.split("\n## ")[0]))) for text in sections}


def figures() -> dict[str, int | float]:
    paths, lengths = sources(), function_lengths()
    source_lines, test_lines = lines(paths), lines(sorted((ROOT / "tests").rglob("*.py")))
    return {
        "circles of files": len(circles(import_graph())),
        "modules outside a package in components": sum(path.parent == ROOT / "components" for path in paths),
        "files that name the example": sum(bool(EXAMPLE.search(path.read_text(encoding="utf-8"))) for path in paths),
        "source lines": source_lines,
        "files": len(paths),
        **{f"files on the path: {name}": len(files) for name, files in walks().items()},
        "function length, median": statistics.median(lengths),
        "function length, 95th percentile": lengths[int(0.95 * len(lengths))],
        "function length, longest": lengths[-1],
        "test lines per source line": round(test_lines / source_lines, 3),
    }


def main() -> None:
    result = figures()
    if "--json" in sys.argv:
        print(json.dumps(result))
        return
    for circle in circles(import_graph()):
        print("circle:", " ".join(circle))
    width = max(map(len, result))
    for name, value in result.items():
        print(f"{name:<{width}}  {value:,}")


if __name__ == "__main__":
    main()
