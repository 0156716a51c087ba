"""Functions without their docstrings, and the line that each began with: sources to summarize."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

from components.datasets.formats import Row
from examples.stdlib_agent.stdlib import Symbol
from examples.stdlib_agent.summaries import first_sentence

MAX_TARGET, MIN_WORDS = 120, 3
"""Characters of a summary at most, and words at least."""
MIN_LINES = 2
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def described(symbols: Sequence[Symbol], classes: Mapping[str, Symbol], suite: str | None = None) -> Iterator[Row]:
    """Source and first line of each function and method that has both; `classes` holds the methods' sources."""
    for symbol in symbols:
        if symbol.kind not in ("function", "method"):
            continue
        target = first_sentence(symbol.docstring)
        if len(target.split()) < MIN_WORDS or len(target) > MAX_TARGET:
            continue
        owner = symbol if symbol.kind == "function" else classes.get(symbol.name.rpartition(".")[0])
        source = without_docstring(owner.source, symbol.name.rpartition(".")[2]) if owner else ""
        if source:
            yield {"id": f"{symbol.name}#summary", "source": source, "target": target, "suite": suite}


def without_docstring(source: str, name: str) -> str:
    """The function of that name in a source, without its docstring; empty where it is not or little is left."""
    text = textwrap.dedent(source)
    node = _functions(text).get(name)
    if node is None or ast.get_docstring(node) is None or len(node.body) < MIN_LINES:
        return ""
    lines = text.splitlines()
    docstring = node.body[0]
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    assert docstring.end_lineno is not None
    code = [*lines[first - 1 : docstring.lineno - 1], *lines[docstring.end_lineno : node.end_lineno]]
    return textwrap.dedent("\n".join(code)).strip()


@lru_cache(maxsize=8)  # the methods of a class come one after another
def _functions(text: str) -> Mapping[str, _Function]:
    """The functions of a source by name, of several with one the outermost and first."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return {}
    by_name: dict[str, _Function] = {}
    for node in ast.walk(tree):
        if isinstance(node, _Function):
            by_name.setdefault(node.name, node)
    return by_name
