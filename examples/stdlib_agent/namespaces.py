"""What the names of a module stand for, read from its source without importing it.

Some modules act on import (`antigravity` opens a browser, `idlelib` a window), so Python modules are parsed and their
imports and aliases followed by hand. Only what has no source, builtins and extension modules, is imported.
"""

from __future__ import annotations

import ast
import importlib
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
MAX_HOPS = 8
"""Imports and aliases followed from one name; cycles end here."""
# What these become when a class is made from them.
REAL_BASES = {"NamedTuple": "tuple", "TypedDict": "dict"}


@dataclass(frozen=True)
class Imported:
    """A binding made by an import; `name` is empty when the module itself is bound."""

    module: str
    name: str = ""


@dataclass(frozen=True)
class InSource:
    """A name resolved to a definition in a source file; `owner` is the class of a method."""

    module: str
    node: Definition
    owner: str = ""


@dataclass(frozen=True)
class InMemory:
    """A name resolved to an object of an extension module."""

    module: str
    name: str
    value: object


Found = InSource | InMemory
Binding = Definition | ast.expr | Imported


@dataclass
class SourceModule:
    """A parsed file and what its top level binds."""

    name: str
    path: Path
    text: str
    tree: ast.Module
    bindings: dict[str, Binding] = field(default_factory=dict)
    declared: set[str] | None = None
    """The part of `__all__` that is written out; None without one."""
    bound_at: dict[str, int] = field(default_factory=dict)
    """When each name was bound last, counted in statements."""
    stars: list[tuple[int, str]] = field(default_factory=list)
    """When every public name of which module was imported."""

    @cached_property
    def lines(self) -> list[str]:
        return self.text.split("\n")

    @property
    def package(self) -> str:
        """What a relative import starts from."""
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]


class Namespaces:
    """The modules under one library folder and the extension modules beside it, each read once."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or Path(sysconfig.get_path("stdlib"))
        self._sources: dict[str, SourceModule | None] = {}
        self._extensions: dict[str, ModuleType | None] = {}
        self._exports: dict[str, list[str]] = {}

    def exists(self, module: str) -> bool:
        return self._file(module) is not None or self.extension(module) is not None

    def source(self, module: str) -> SourceModule | None:
        """The parsed file of a module; None when it has none."""
        if module not in self._sources:
            self._sources[module] = self._parse(module)
        return self._sources[module]

    def extension(self, module: str) -> ModuleType | None:
        """A module without source, imported; None when there is none of this name."""
        if module not in self._extensions:
            self._extensions[module] = _import(module) if self._is_compiled(module) else None
        return self._extensions[module]

    def exports(self, module: str) -> list[str]:
        """The public names of a module, sorted: its `__all__`, else what it defines or takes over by `import *`."""
        if module not in self._exports:
            self._exports[module] = sorted(name for name in self._all_exports(module) if not name.startswith("_"))
        return self._exports[module]

    def _all_exports(self, module: str) -> set[str]:
        source = self.source(module)
        if source is None:
            extension = self.extension(module)
            return set(getattr(extension, "__all__", None) or dir(extension)) if extension else set()
        defined = {name for name, binding in source.bindings.items() if isinstance(binding, Definition)}
        names = defined if source.declared is None else set(source.declared)
        return names.union(*(self.exports(star) for _, star in source.stars))

    def target(self, module: str, name: str, hops: int = 0) -> Found | Imported | None:
        """What a name is bound to: a definition, an object, or (Imported without a name) a module."""
        source = self.source(module)
        if hops > MAX_HOPS:
            return None
        if source is None:
            value = getattr(self.extension(module), name, None)
            return None if value is None else InMemory(module, name, value)
        for moment, star in reversed(source.stars):
            if source.bound_at.get(name, -1) < moment and name in self.exports(star):
                return self.target(star, name, hops + 1)
        binding = source.bindings.get(name)
        if isinstance(binding, Definition):
            return InSource(module, binding)
        if isinstance(binding, Imported):
            return self._imported(binding, hops)
        if isinstance(binding, ast.expr):
            return self._alias(module, binding, hops)
        # Names that a module's `__getattr__` hands out, as in concurrent.futures.
        return self._in_submodules(source, name) if name in (source.declared or ()) else None

    def resolve(self, module: str, name: str, hops: int = 0) -> Found | None:
        """The definition behind a name; None for a module or an unknown name."""
        target = self.target(module, name, hops)
        return None if isinstance(target, Imported) else target

    def bases(self, definition: InSource) -> tuple[str, ...]:
        """A class's direct bases, qualified unless built in or of the same module; empty when they are computed."""
        assert isinstance(definition.node, ast.ClassDef)
        names: list[str] = []
        for expression in [*definition.node.bases, *_enumerated(definition.node)]:
            written = _dotted(expression.value if isinstance(expression, ast.Subscript) else expression)
            if not written:
                return ()
            names.append(REAL_BASES.get(written.rpartition(".")[2]) or self._qualified(definition.module, written))
        return tuple(names) or ("object",)

    def _qualified(self, module: str, written: str) -> str:
        source = self.source(module)
        first, _, rest = written.partition(".")
        binding = source.bindings.get(first) if source else None
        if not isinstance(binding, Imported):
            return written
        return ".".join(part for part in (binding.module, binding.name, rest) if part).removeprefix("builtins.")

    def _imported(self, binding: Imported, hops: int) -> Found | Imported | None:
        if not binding.name:
            return binding if self.exists(binding.module) else None
        target = self.target(binding.module, binding.name, hops + 1)
        submodule = f"{binding.module}.{binding.name}"
        return Imported(submodule) if target is None and self.exists(submodule) else target

    def _alias(self, module: str, value: ast.expr, hops: int) -> Found | None:
        """`a = b`, `a = module.b`, and `a = instance.method` as the functions of `random` are made."""
        if isinstance(value, ast.Name):
            return self.resolve(module, value.id, hops + 1)
        if not isinstance(value, ast.Attribute) or not isinstance(value.value, ast.Name):
            return None
        owner = self.target(module, value.value.id, hops + 1)
        if isinstance(owner, Imported):
            return self.resolve(owner.module, value.attr, hops + 1)
        source = self.source(module)
        maker = source.bindings.get(value.value.id) if source else None
        if isinstance(maker, ast.Call) and isinstance(maker.func, ast.Name):
            return self._member(self.resolve(module, maker.func.id, hops + 1), value.attr)
        return None

    def _member(self, owner: Found | None, name: str) -> Found | None:
        """A method of a class, searched through its bases."""
        if isinstance(owner, InMemory):
            value = getattr(owner.value, name, None)
            return None if value is None else InMemory(owner.module, f"{owner.name}.{name}", value)
        if owner is None or not isinstance(owner.node, ast.ClassDef):
            return None
        for member in owner.node.body:
            if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef) and member.name == name:
                return InSource(owner.module, member, owner.node.name)
        bases = (base.rpartition(".") for base in self.bases(owner))
        inherited = (self._member(self.resolve(module or owner.module, base), name) for module, _, base in bases)
        return next((definition for definition in inherited if definition), None)

    def _in_submodules(self, source: SourceModule, name: str) -> Found | None:
        if source.path.name != "__init__.py":
            return None
        for path in sorted(source.path.parent.glob("*.py")):
            inner = self.source(f"{source.name}.{path.stem}")
            if inner and isinstance(binding := inner.bindings.get(name), Definition):
                return InSource(inner.name, binding)
        return None

    def _is_compiled(self, module: str) -> bool:
        files = (self.folder / "lib-dynload" / f"{module}{suffix}" for suffix in EXTENSION_SUFFIXES)
        compiled = module in sys.builtin_module_names or any(file.is_file() for file in files)
        return compiled and self._file(module) is None

    def _file(self, module: str) -> Path | None:
        stem = self.folder.joinpath(*module.split("."))
        files = (stem / "__init__.py", stem.with_name(f"{stem.name}.py"))
        return next((file for file in files if file.is_file()), None)

    def _parse(self, module: str) -> SourceModule | None:
        path = self._file(module)
        if path is None:
            return None
        text = path.read_text(encoding="utf-8", errors="replace")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            source = SourceModule(module, path, text, ast.parse(text))
        for moment, statement in enumerate(_top_level(source.tree.body)):
            _bind(source, statement, moment)
        return source


def _import(module: str) -> ModuleType | None:
    with warnings.catch_warnings():
        # Some extension modules warn on import that a later Python drops them.
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(module)
        except ImportError:
            return None


def _enumerated(node: ast.ClassDef) -> list[ast.expr]:
    """The base that enum's own decorator gives a class: `@_simple_enum(IntEnum)`."""
    calls = (decorator for decorator in node.decorator_list if isinstance(decorator, ast.Call) and decorator.args)
    return [call.args[0] for call in calls if _dotted(call.func).endswith("_simple_enum")]


def _top_level(statements: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements in an order in which the last binding wins as it does when the module runs here."""
    for statement in statements:
        if isinstance(statement, ast.Try):
            # A fallback is bound only where the import it stands in for fails.
            for handler in statement.handlers:
                yield from _top_level(handler.body)
            yield from _top_level([*statement.body, *statement.orelse, *statement.finalbody])
        elif isinstance(statement, ast.If):
            chosen = _here(statement.test)
            yield from _top_level(statement.orelse if chosen is not True else [])
            yield from _top_level(statement.body if chosen is not False else [])
        else:
            yield statement


def _here(test: ast.expr) -> bool | None:
    """Whether a condition on the platform holds on this machine; None for any other condition."""
    here = {"sys.platform": sys.platform, "os.name": os.name, "name": os.name, "name__": "imported"}
    if isinstance(test, ast.Compare) and (fact := here.get(_dotted(test.left).lstrip("_") or "")):
        other = test.comparators[0]
        if isinstance(other, ast.Constant) and isinstance(test.ops[0], ast.Eq | ast.NotEq):
            return (fact == other.value) is isinstance(test.ops[0], ast.Eq)
    return None


def _bind(source: SourceModule, statement: ast.stmt, moment: int) -> None:
    bound: dict[str, Binding] = {}
    if isinstance(statement, Definition):
        bound[statement.name] = statement
    elif isinstance(statement, ast.Import):
        for alias in statement.names:
            first = alias.name.partition(".")[0]
            bound[alias.asname or first] = Imported(alias.name if alias.asname else first)
    elif isinstance(statement, ast.ImportFrom):
        module = _absolute(source, statement)
        source.stars += [(moment, module) for alias in statement.names if alias.name == "*"]
        bound |= {alias.asname or alias.name: Imported(module, alias.name) for alias in statement.names}
    elif isinstance(statement, ast.Assign):
        bound |= {target.id: statement.value for target in statement.targets if isinstance(target, ast.Name)}
    if declared := _declared(statement):
        source.declared = (source.declared or set()) | declared
    source.bindings |= bound
    source.bound_at |= dict.fromkeys(bound, moment)


def _declared(statement: ast.stmt) -> set[str]:
    """The names that a statement puts into `__all__`."""
    value = getattr(statement, "value", None)
    if isinstance(statement, ast.Assign) and any(_dotted(target) == "__all__" for target in statement.targets):
        return _strings(statement.value)
    if isinstance(statement, ast.AugAssign) and _dotted(statement.target) == "__all__":
        return _strings(statement.value)
    if isinstance(value, ast.Call) and _dotted(value.func) in ("__all__.extend", "__all__.append"):
        return _strings(value)
    return set()


def _absolute(source: SourceModule, statement: ast.ImportFrom) -> str:
    """The module that a `from` statement names."""
    if not statement.level:
        return statement.module or ""
    start = source.package.split(".")
    start = start[: len(start) - statement.level + 1]
    return ".".join([*start, statement.module] if statement.module else start)


def _strings(value: ast.expr) -> set[str]:
    return {node.value for node in ast.walk(value) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def _dotted(expression: ast.expr) -> str:
    """`a.b.c` as text; empty for any other expression."""
    if isinstance(expression, ast.Attribute):
        owner = _dotted(expression.value)
        return f"{owner}.{expression.attr}" if owner else ""
    return expression.id if isinstance(expression, ast.Name) else ""
