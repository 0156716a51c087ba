"""The running interpreter's standard library: its public symbols with their docstrings, bases and sources."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from types import BuiltinFunctionType
from typing import Literal

from components.config.params import InputError
from examples.stdlib_agent.namespaces import Imported, InMemory, InSource, Namespaces
from examples.stdlib_agent.summaries import summary

Kind = Literal["module", "class", "function", "method"]

# Tables, tests, programs, jokes, what os and os.path are made of and what setuptools replaces; `readline` changes the
# terminal when imported.
NOT_A_LIBRARY = frozenset((
    "antigravity", "distutils", "encodings", "genericpath", "idlelib", "lib2to3", "ntpath", "posix", "posixpath",
    "pydoc_data", "readline", "test", "this", "turtledemo",
))  # fmt: skip
NOT_PUBLIC = frozenset({"test", "tests", "__main__"})


@dataclass(frozen=True)
class Symbol:
    """One public name."""

    name: str
    """As a person writes it: `json.dumps`; builtins without their module."""
    kind: Kind
    module: str
    """The public module it is found in."""
    family: str
    """The top-level definition it belongs to, named where that really is; aliases and methods share it."""
    docstring: str = ""
    bases: tuple[str, ...] = ()
    """Of classes: direct bases, qualified unless built in or of the same module."""
    source: str = ""
    """Text of a top-level Python definition."""

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]

    @cached_property
    def summary(self) -> str:
        """The answer to "what is it"; empty when the docstring has no short first sentence."""
        return summary(self.docstring)


def library_symbols(packages: list[str] | None = None) -> list[Symbol]:
    """Every public symbol of the packages (all of them when none are named), in alphabetical order.

    Raises: InputError for a package this interpreter does not have.
    """
    names = Namespaces()
    known = [name for name in sorted(sys.stdlib_module_names) if _is_public(name) and names.exists(name)]
    for name in packages or []:
        if name not in known:
            raise InputError(
                f"params.yaml: collect.modules: {name!r} is not in the standard library of Python "
                f"{sys.version.split()[0]}; known: {', '.join(known)}"
            )
    symbols: dict[str, Symbol] = {}
    for package in sorted(packages or known):
        for module in modules_of(names, package):
            for symbol in _symbols_of(names, module, module):
                symbols.setdefault(symbol.name, symbol)
    public = _public_names(symbols.values())
    return [
        replace(symbol, bases=tuple(public.get(base, base) for base in symbol.bases))
        for _, symbol in sorted(symbols.items())
    ]


def _public_names(symbols: Iterable[Symbol]) -> dict[str, str]:
    """Where classes are really defined, and the shortest public name of each."""
    names: dict[str, str] = {}
    classes = (symbol for symbol in symbols if symbol.kind == "class")
    for symbol in sorted(classes, key=lambda symbol: (symbol.name.count("."), symbol.name)):
        names.setdefault(symbol.family.replace(":", "."), symbol.name)
        # `_weakref.ref` is shown as weakref.ref.
        names.setdefault(f"_{symbol.name}", symbol.name)
    return names


def modules_of(names: Namespaces, package: str) -> list[str]:
    """A package and its public submodules, sorted."""
    folder = names.folder / package
    parts = (path.relative_to(names.folder).with_suffix("").parts for path in sorted(folder.rglob("*.py")))
    modules = {part[:-1] if part[-1] == "__init__" else part for part in parts}
    return [package, *sorted(".".join(part) for part in modules if len(part) > 1 and all(map(_is_public, part)))]


def _is_public(name: str) -> bool:
    return not name.startswith("_") and name not in NOT_PUBLIC and name not in NOT_A_LIBRARY


def _symbols_of(names: Namespaces, module: str, shown_as: str) -> Iterator[Symbol]:
    source = names.source(module)
    docstring = ast.get_docstring(source.tree) if source else inspect.getdoc(names.extension(module))
    yield Symbol(shown_as, "module", shown_as, f"{module}:", docstring or "")
    for name in names.exports(module):
        target = names.target(module, name)
        qualified = name if module == "builtins" else f"{shown_as}.{name}"
        if isinstance(target, InSource):
            yield from _from_source(names, target, qualified, shown_as)
        elif isinstance(target, InMemory):
            yield from _from_object(target, qualified, shown_as)
        elif (
            target
            and source
            and name in (source.declared or ())
            and "." not in shown_as
            and not _inside(target, module)
        ):
            # A module bound as a public name of another: os.path.
            yield from _symbols_of(names, target.module, qualified)


def _inside(target: Imported, module: str) -> bool:
    return target.module.startswith(f"{module}.")


def _from_source(names: Namespaces, definition: InSource, qualified: str, module: str) -> Iterator[Symbol]:
    node, family = definition.node, f"{definition.module}:{definition.owner or definition.node.name}"
    docstring, text = ast.get_docstring(node) or "", "" if definition.owner else _text_of(names, definition)
    if not isinstance(node, ast.ClassDef):
        yield Symbol(qualified, "function", module, family, docstring, source=text)
        return
    yield Symbol(qualified, "class", module, family, docstring, names.bases(definition), text)
    for member in node.body:
        if not isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef) or member.name.startswith("_"):
            continue
        if about := ast.get_docstring(member):
            yield Symbol(f"{qualified}.{member.name}", "method", module, family, about)


def _text_of(names: Namespaces, definition: InSource) -> str:
    source = names.source(definition.module)
    assert source is not None
    first = min([definition.node.lineno, *(decorator.lineno for decorator in definition.node.decorator_list)])
    return "\n".join(source.lines[first - 1 : definition.node.end_lineno])


def _from_object(in_memory: InMemory, qualified: str, module: str) -> Iterator[Symbol]:
    value, family = in_memory.value, _family(in_memory)
    if not isinstance(value, type):
        if callable(value):
            yield Symbol(qualified, "function", module, family, _own_doc(value))
        return
    bases = tuple(_base_name(base, value) for base in value.__bases__)
    yield Symbol(qualified, "class", module, family, _own_doc(value), bases)
    for name in sorted(vars(value)):
        member = getattr(value, name, None)
        if not name.startswith("_") and callable(member) and (docstring := _own_doc(member)):
            yield Symbol(f"{qualified}.{name}", "method", module, family, docstring)


def _family(member: InMemory) -> str:
    """Where the object says it is from: `io.BlockingIOError` is the builtin."""
    own = member.value if isinstance(member.value, type | BuiltinFunctionType) else None
    module, name = getattr(own, "__module__", None), getattr(own, "__qualname__", member.name)
    return f"{module or member.module}:{name.partition('.')[0]}"


def _own_doc(value: object) -> str:
    """The docstring of the object itself, not that of its type."""
    docstring = getattr(value, "__doc__", None)
    inherited = docstring is getattr(type(value), "__doc__", None) and not isinstance(value, type)
    return docstring if isinstance(docstring, str) and not inherited else ""


def _base_name(base: type, derived: type) -> str:
    return (
        base.__qualname__
        if base.__module__ in ("builtins", derived.__module__)
        else f"{base.__module__}.{base.__qualname__}"
    )
